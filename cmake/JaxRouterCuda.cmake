# Whether the CUDA module is built, and with which compiler: sets JAX_ROUTER_BUILDS_CUDA and enables the CUDA language.

set(JAX_ROUTER_CUDA AUTO CACHE STRING "Build the CUDA module: ON, OFF, or AUTO, where a CUDA compiler is found")
set_property(CACHE JAX_ROUTER_CUDA PROPERTY STRINGS AUTO ON OFF)
set(JAX_ROUTER_CUDA_ARCHS "80-real;90a-real;100a-real;100-virtual"
    CACHE STRING "GPU architectures, as CMAKE_CUDA_ARCHITECTURES takes them; the default ends with PTX for later GPUs")
option(JAX_ROUTER_CUDA_WHEELS "Take the CUDA compiler from the nvidia-cuda-* wheels of the Python that runs the build" OFF)

if(NOT JAX_ROUTER_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "jax_router: JAX_ROUTER_CUDA must be AUTO, ON or OFF, got ${JAX_ROUTER_CUDA}")
endif()

if(JAX_ROUTER_CUDA STREQUAL "OFF")
  set(JAX_ROUTER_BUILDS_CUDA OFF)
  message(STATUS "jax_router: no CUDA module (JAX_ROUTER_CUDA=OFF)")
  return()
endif()

if(JAX_ROUTER_CUDA_WHEELS)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia.cu13; print(nvidia.cu13.__path__[0])"
    OUTPUT_VARIABLE CUDA_WHEELS_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(CMAKE_CUDA_COMPILER ${CUDA_WHEELS_DIR}/bin/nvcc)
  # The wheels keep their libraries in lib, where nvcc does not look, and have no libcudart.so without a version.
  set(ENV{LIBRARY_PATH} ${CUDA_WHEELS_DIR}/lib)
  set(CUDA_CUDART ${CUDA_WHEELS_DIR}/lib/libcudart.so.13 CACHE FILEPATH "The shared CUDA runtime")
endif()

# What keeps the CUDA module from being built, if anything does. 12.8 is the first release for 100a.
set(CUDA_MINIMUM 12.8)
unset(CUDA_OBSTACLE)
set(CMAKE_CUDA_ARCHITECTURES ${JAX_ROUTER_CUDA_ARCHS})
include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_version)
  string(REGEX MATCH "release ([0-9.]+)" nvcc_version "${nvcc_version}")
  if(CMAKE_MATCH_1 VERSION_LESS CUDA_MINIMUM)
    set(CUDA_OBSTACLE "${CMAKE_CUDA_COMPILER} (${nvcc_version}) is older than CUDA ${CUDA_MINIMUM}")
  endif()
else()
  set(CUDA_OBSTACLE "found no nvcc (CUDA ${CUDA_MINIMUM} or later)")
endif()

if(NOT CUDA_OBSTACLE)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(JAX_ROUTER_BUILDS_CUDA ON)
  message(STATUS "jax_router: CUDA module with ${CMAKE_CUDA_COMPILER} for ${CMAKE_CUDA_ARCHITECTURES}")
elseif(JAX_ROUTER_CUDA STREQUAL "AUTO")
  set(JAX_ROUTER_BUILDS_CUDA OFF)
  message(STATUS "jax_router: no CUDA module: ${CUDA_OBSTACLE}")
else()
  message(FATAL_ERROR "jax_router: JAX_ROUTER_CUDA=ON, but ${CUDA_OBSTACLE}. Put a newer nvcc on PATH, name one with "
                      "CUDACXX, or set the environment variable JAX_ROUTER_CUDA_WHEELS=1 to take it from wheels.")
endif()
