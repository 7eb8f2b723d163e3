# Which GPU architectures the CUDA module is built for, if any. Needs no compiler; `cmake -P` runs it too.

set(JAX_ROUTER_CUDA AUTO CACHE STRING "Build the CUDA module: ON, OFF, or AUTO, for the GPUs of this machine")
set_property(CACHE JAX_ROUTER_CUDA PROPERTY STRINGS AUTO ON OFF)
set(JAX_ROUTER_CUDA_ARCHS "" CACHE STRING "Build the CUDA module for these, as CMAKE_CUDA_ARCHITECTURES takes them")
option(JAX_ROUTER_CUDA_WHEELS "Take the CUDA compiler from the nvidia-cuda-* wheels of the Python that runs the build" OFF)

if(NOT JAX_ROUTER_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "jax_router: JAX_ROUTER_CUDA must be AUTO, ON or OFF, got ${JAX_ROUTER_CUDA}")
endif()

# A100 and its like, H100, B200 and B300, and PTX for all later GPUs: one pass of the compiler makes the last two.
set(JAX_ROUTER_ALL_ARCHS 80-real 90a-real 100)

# Sets `result` to the architectures of this machine's GPUs, as far as kernels run on them, and `obstacle` to why there is
# none. Asked of the driver, because CMake's own `native` says 90 of an H100, which lacks the instructions of 90a.
function(jax_router_detect_gpus result obstacle)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE output ERROR_QUIET RESULT_VARIABLE status)
  set(architectures)
  set(reason "nvidia-smi found no GPU")
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${output}")
  if(status EQUAL 0)
    foreach(capability IN LISTS capabilities)
      if(capability VERSION_LESS 8.0)
        set(reason "the GPU has compute capability ${capability}, and the kernels need 8.0")
      elseif(capability STREQUAL "9.0")
        list(APPEND architectures 90a-real)
      else()
        string(REPLACE "." "" architecture ${capability})
        list(APPEND architectures ${architecture}-real)
      endif()
    endforeach()
    list(REMOVE_DUPLICATES architectures)
  endif()
  set(${result} ${architectures} PARENT_SCOPE)
  set(${obstacle} ${reason} PARENT_SCOPE)
endfunction()

# Sets `result` to the architectures to build for, and `obstacle` to why there is none.
function(jax_router_choose_architectures result obstacle)
  set(reason)
  if(JAX_ROUTER_CUDA STREQUAL "OFF")
    set(architectures)
    set(reason "it was built with JAX_ROUTER_CUDA=OFF")
  elseif(JAX_ROUTER_CUDA_ARCHS)
    set(architectures ${JAX_ROUTER_CUDA_ARCHS})
  elseif(JAX_ROUTER_CUDA STREQUAL "ON")
    set(architectures ${JAX_ROUTER_ALL_ARCHS})
  else()
    jax_router_detect_gpus(architectures reason)
    if(JAX_ROUTER_CUDA_WHEELS AND NOT architectures) # who asks for a compiler wants it used
      set(architectures ${JAX_ROUTER_ALL_ARCHS})
    endif()
  endif()
  set(${result} ${architectures} PARENT_SCOPE)
  set(${obstacle} ${reason} PARENT_SCOPE)
endfunction()
