// jax_router._cuda: the CUDA kernels as FFI handlers that XLA may capture into CUDA graphs.
#include <cuda_runtime_api.h>

#include <string>
#include <type_traits>

#include "../cuda/kernels.h"
#include "module.h"

namespace jax_router {
namespace {

// Whether an op's launcher takes scratch memory.
template <typename Op, typename = void>
constexpr bool kNeedsWorkspace = false;
template <typename Op>
constexpr bool kNeedsWorkspace<Op, std::void_t<decltype(cuda::workspace_bytes(std::declval<const Op&>()))>> = true;

// The most that XLA grants; it refuses to allocate at all when asked for more.
constexpr size_t kWorkspaceAlignment = 16;

struct Cuda {
  static constexpr std::initializer_list<ffi::Traits> kTraits{ffi::Traits::kCmdBufferCompatible};

  template <typename Binding>
  static auto add_context(Binding binding) {
    return std::move(binding).template Ctx<ffi::PlatformStream<cudaStream_t>>().template Ctx<ffi::ScratchAllocator>();
  }

  template <typename Op>
  static ffi::Error run(const Op& op, cudaStream_t stream, ffi::ScratchAllocator scratch) {
    cudaError_t status;
    if constexpr (kNeedsWorkspace<Op>) {
      const size_t bytes = cuda::workspace_bytes(op);
      void* workspace = nullptr;
      if (bytes > 0) {
        const auto allocated = scratch.Allocate(bytes, kWorkspaceAlignment);
        if (!allocated) {
          return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_router: no scratch memory");
        }
        workspace = *allocated;
      }
      status = cuda::launch(op, workspace, stream);
    } else {
      status = cuda::launch(op, stream);
    }
    if (status == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("jax_router: kernel launch failed: ") + cudaGetErrorString(status));
  }
};

}  // namespace
}  // namespace jax_router

NB_MODULE(_cuda, module) {
  jax_router::define_module<jax_router::Cuda>(module);
  module.attr("max_select_k") = jax_router::cuda::kMaxSelectK;
  module.attr("architectures") = JAX_ROUTER_CUDA_ARCHITECTURES;
}
