# The XLA FFI headers of the jaxlib that Python_EXECUTABLE has: sets JAX_FFI_INCLUDE_DIR.

# Without importing jaxlib, which needs more than its headers do.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0] + '/include')"
  OUTPUT_VARIABLE JAX_FFI_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT EXISTS ${JAX_FFI_INCLUDE_DIR}/xla/ffi/api/ffi.h)
  message(FATAL_ERROR "jax_router: no XLA FFI headers under ${JAX_FFI_INCLUDE_DIR}")
endif()
