# What comes from the Python that runs the build: nanobind, and the XLA FFI headers of its jaxlib.

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module
             OPTIONAL_COMPONENTS ${SKBUILD_SABI_COMPONENT})

# JAX_FFI_INCLUDE_DIR: without importing jaxlib, which needs more than its headers do.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0] + '/include')"
  OUTPUT_VARIABLE JAX_FFI_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT EXISTS ${JAX_FFI_INCLUDE_DIR}/xla/ffi/api/ffi.h)
  message(FATAL_ERROR "jax_router: no XLA FFI headers under ${JAX_FFI_INCLUDE_DIR}")
endif()

# Asked of this interpreter, because a plain find_package may find another environment's nanobind.
execute_process(
  COMMAND ${Python_EXECUTABLE} -m nanobind --cmake_dir
  OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(nanobind CONFIG REQUIRED NO_DEFAULT_PATH PATHS ${nanobind_ROOT})

message(STATUS "jax_router: Python ${Python_VERSION}, FFI headers in ${JAX_FFI_INCLUDE_DIR}")
