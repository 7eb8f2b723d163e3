// jax_router._cuda: the CUDA kernels as FFI handlers that XLA may capture into CUDA graphs.
#include <cuda_runtime_api.h>

#include <string>
#include <type_traits>
#include <utility>

#include "../cuda/kernels.h"
#include "module.h"
#include "plans.h"

namespace jax_router {
namespace {

template <typename Op, typename = void>
constexpr bool kHasPlan = false;
template <typename Op>
constexpr bool
    kHasPlan<Op, std::void_t<decltype(cuda::planned(std::declval<const Op&>(), std::declval<const cuda::Device&>()))>> =
        true;

struct Cuda {
  static constexpr std::initializer_list<ffi::Traits> kTraits{ffi::Traits::kCmdBufferCompatible};
  template <typename Op>
  static constexpr bool kHas = kHasPlan<Op>;

  template <typename Op>
  static void check(Call&, const Op&) {}
  static void check(Call& call, const TopkSelect& op) {
    static const int64_t most = cuda::max_select_k();
    if (op.k > most) call.must_be("k", text(Range{1, most}), std::to_string(op.k));
  }

  template <typename Binding>
  static auto add_context(Binding binding) {
    return std::move(binding).template Ctx<ffi::PlatformStream<cudaStream_t>>();
  }

  // Of which kernel, and on what device.
  template <typename Op>
  static std::string launched(const Op& op) {
    const cuda::Device* device = cuda::current_device();
    if (device == nullptr) return "";
    const auto plan = cuda::planned(op, *device);
    return " (" + (plan ? cuda::name(op, *plan) : std::string("no plan")) + "; compute capability " +
           std::to_string(device->compute_capability / 10) + "." + std::to_string(device->compute_capability % 10) +
           ", " + std::to_string(device->multiprocessors) + " multiprocessors)";
  }

  template <typename Op>
  static ffi::Error run(const Op& op, cudaStream_t stream) {
    const cudaError_t status = cuda::launch(op, stream);
    if (status == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string(kPrefix) + Target<Op>::kName + ": kernel launch failed" + launched(op) +
                                ": " + cudaGetErrorString(status));
  }
};

}  // namespace
}  // namespace jax_router

NB_MODULE(_cuda, module) {
  jax_router::define_module<jax_router::Cuda>(module);
  jax_router::define_plans(module);
  module.attr("architectures") = JAX_ROUTER_CUDA_ARCHITECTURES;
  module.attr("cuda_version") = CUDART_VERSION;  // of its runtime: 13000 for 13.0
}
