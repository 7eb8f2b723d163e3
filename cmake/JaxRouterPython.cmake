# What comes from the Python that runs the build: nanobind, and the XLA FFI headers of its jaxlib.

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module
             OPTIONAL_COMPONENTS ${SKBUILD_SABI_COMPONENT})

include(JaxRouterHeaders) # JAX_FFI_INCLUDE_DIR

# Asked of this interpreter, because a plain find_package may find another environment's nanobind.
execute_process(
  COMMAND ${Python_EXECUTABLE} -m nanobind --cmake_dir
  OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(nanobind CONFIG REQUIRED NO_DEFAULT_PATH PATHS ${nanobind_ROOT})

message(STATUS "jax_router: Python ${Python_VERSION}, FFI headers in ${JAX_FFI_INCLUDE_DIR}")
