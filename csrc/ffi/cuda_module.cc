// jax_router._cuda: the CUDA kernels as FFI handlers that XLA may capture into CUDA graphs.
#include <cuda_runtime_api.h>
#include <nanobind/stl/string.h>

#include <limits>
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

// Whether an op's launcher takes none.
template <typename Op, typename = void>
constexpr bool kNeedsNoWorkspace = false;
template <typename Op>
constexpr bool kNeedsNoWorkspace<
    Op, std::void_t<decltype(cuda::launch(std::declval<const Op&>(), std::declval<cudaStream_t>()))>> = true;

// The most that XLA grants; it refuses to allocate at all when asked for more.
constexpr size_t kWorkspaceAlignment = 16;

struct Cuda {
  static constexpr std::initializer_list<ffi::Traits> kTraits{ffi::Traits::kCmdBufferCompatible};
  template <typename Op>
  static constexpr bool kHas = kNeedsWorkspace<Op> || kNeedsNoWorkspace<Op>;

  template <typename Op>
  static void check(Call&, const Op&) {}
  static void check(Call& call, const TopkSelect& op) {
    static const int64_t most = cuda::max_select_k();
    if (op.k > most) call.must_be("k", text(Range{1, most}), std::to_string(op.k));
  }

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

bool fuses_dense_router(int64_t tokens, int64_t num_experts, int64_t hidden, int64_t top_k, int64_t num_groups,
                        const std::string& dtype) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (num_experts > kMost || hidden > kMost || top_k > kMost) return false;
  DenseRouter op{};
  op.operand_dtype = dtype == "float32" ? DType::kF32 : dtype == "bfloat16" ? DType::kBF16 : DType::kF16;
  op.hidden = static_cast<int32_t>(hidden);
  op.select.rows = tokens;
  op.select.selection.experts = static_cast<int32_t>(num_experts);
  op.select.selection.k = static_cast<int32_t>(top_k);
  op.select.selection.groups.num_groups = static_cast<int32_t>(num_groups);
  return cuda::fuses(op);
}

}  // namespace
}  // namespace jax_router

NB_MODULE(_cuda, module) {
  namespace nb = nanobind;
  jax_router::define_module<jax_router::Cuda>(module);
  module.def("max_select_k", jax_router::cuda::max_select_k);
  module.attr("architectures") = JAX_ROUTER_CUDA_ARCHITECTURES;
  module.def("fuses_dense_router", jax_router::fuses_dense_router, nb::arg("tokens"), nb::arg("num_experts"),
             nb::arg("hidden"), nb::arg("top_k"), nb::arg("num_groups"), nb::arg("dtype"));
}
