# Whether the CUDA module is built, and with which compiler: enables the CUDA language and sets CMAKE_CUDA_ARCHITECTURES, or
# sets JAX_ROUTER_CUDA_OBSTACLE to what is in the way.

include(JaxRouterArchitectures)
jax_router_choose_architectures(CMAKE_CUDA_ARCHITECTURES JAX_ROUTER_CUDA_OBSTACLE)
if(NOT CMAKE_CUDA_ARCHITECTURES)
  message(STATUS "jax_router: CPU kernels only: ${JAX_ROUTER_CUDA_OBSTACLE}. With CUDA kernels: JAX_ROUTER_CUDA=ON")
  return()
endif()
unset(JAX_ROUTER_CUDA_OBSTACLE)

if(JAX_ROUTER_CUDA_WHEELS)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia.cu13; print(nvidia.cu13.__path__[0])"
    OUTPUT_VARIABLE CUDA_WHEELS_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(CMAKE_CUDA_COMPILER ${CUDA_WHEELS_DIR}/bin/nvcc)
  # The wheels keep their libraries in lib, where nvcc does not look, and have no libcudart.so without a version.
  set(ENV{LIBRARY_PATH} ${CUDA_WHEELS_DIR}/lib)
  set(CUDA_CUDART ${CUDA_WHEELS_DIR}/lib/libcudart.so.13 CACHE FILEPATH "The shared CUDA runtime")
endif()

set(CUDA_MINIMUM 12.8) # the first release for 100
include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_version)
  string(REGEX MATCH "release ([0-9.]+)" nvcc_version "${nvcc_version}")
  if(CMAKE_MATCH_1 VERSION_LESS CUDA_MINIMUM)
    set(JAX_ROUTER_CUDA_OBSTACLE "${CMAKE_CUDA_COMPILER} (${nvcc_version}) is older than CUDA ${CUDA_MINIMUM}")
  endif()
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known)
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    string(REGEX REPLACE "[a-z]?-real$" "\n" code "sm_${architecture}") # as nvcc lists them
    if(architecture MATCHES "-real$" AND NOT known MATCHES "${code}")
      set(JAX_ROUTER_CUDA_OBSTACLE "${CMAKE_CUDA_COMPILER} (${nvcc_version}) does not know ${architecture}")
    endif()
  endforeach()
else()
  set(JAX_ROUTER_CUDA_OBSTACLE "found no nvcc (CUDA ${CUDA_MINIMUM} or later)")
endif()

if(NOT JAX_ROUTER_CUDA_OBSTACLE)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  list(JOIN CMAKE_CUDA_ARCHITECTURES ", " architectures)
  message(STATUS "jax_router: CPU and CUDA kernels, by ${CMAKE_CUDA_COMPILER} for ${architectures}. "
                 "Each of these takes a minute or two on two cores.")
elseif(JAX_ROUTER_CUDA STREQUAL "ON" OR JAX_ROUTER_CUDA_ARCHS OR JAX_ROUTER_CUDA_WHEELS)
  message(FATAL_ERROR "jax_router: CUDA kernels were asked for, but ${JAX_ROUTER_CUDA_OBSTACLE}. Put a newer nvcc on PATH, "
                      "name one with CUDACXX, or set the environment variable JAX_ROUTER_CUDA_WHEELS=1 to take it from "
                      "wheels.")
else()
  message(WARNING "jax_router: CPU kernels only, although there is a GPU: ${JAX_ROUTER_CUDA_OBSTACLE}. Put a newer nvcc on "
                  "PATH, or set the environment variable JAX_ROUTER_CUDA_WHEELS=1 to take it from wheels.")
endif()
