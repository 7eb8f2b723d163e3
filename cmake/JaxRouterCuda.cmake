# Whether the CUDA module is built, and with which compiler: sets JAX_ROUTER_BUILDS_CUDA and enables the CUDA language.

set(JAX_ROUTER_CUDA AUTO CACHE STRING "Build the CUDA module: ON, OFF, or AUTO, where a CUDA compiler is found")
set_property(CACHE JAX_ROUTER_CUDA PROPERTY STRINGS AUTO ON OFF)
set(JAX_ROUTER_CUDA_ARCHS "90a-real;100a-real;100-virtual"
    CACHE STRING "GPU architectures, as CMAKE_CUDA_ARCHITECTURES takes them; the default ends with PTX for later GPUs")
option(JAX_ROUTER_CUDA_WHEELS "Take the CUDA compiler from the nvidia-cuda-* wheels of the Python that runs the build" OFF)

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

# Set before the compiler is tested: an nvcc too old for these architectures counts as none.
set(CMAKE_CUDA_ARCHITECTURES ${JAX_ROUTER_CUDA_ARCHS})
include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(JAX_ROUTER_BUILDS_CUDA ON)
  message(STATUS "jax_router: CUDA module with ${CMAKE_CUDA_COMPILER} for ${CMAKE_CUDA_ARCHITECTURES}")
elseif(JAX_ROUTER_CUDA STREQUAL "AUTO")
  set(JAX_ROUTER_BUILDS_CUDA OFF)
  message(STATUS "jax_router: no CUDA module, because no nvcc was found that compiles for ${JAX_ROUTER_CUDA_ARCHS}")
else()
  message(FATAL_ERROR "jax_router: JAX_ROUTER_CUDA=${JAX_ROUTER_CUDA}, but no nvcc was found that compiles for "
                      "${JAX_ROUTER_CUDA_ARCHS}. The default needs CUDA 12.8 or later; put its nvcc on PATH, "
                      "or set the environment variable JAX_ROUTER_CUDA_WHEELS=1 to take it from wheels.")
endif()
