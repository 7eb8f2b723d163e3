#include "device.h"

#include <cuda_runtime_api.h>

namespace jax_router::cuda {
namespace {

#ifdef JAX_ROUTER_HOPPER
constexpr bool kBuiltForHopper = true;
#else
constexpr bool kBuiltForHopper = false;
#endif

int ask(cudaDeviceAttr attribute, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

std::vector<Device> ask_for_all() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return {};
  std::vector<Device> all;
  for (int device = 0; device < count; ++device) {
    const int capability = 10 * ask(cudaDevAttrComputeCapabilityMajor, device) +  //
                           ask(cudaDevAttrComputeCapabilityMinor, device);
    all.push_back({capability, ask(cudaDevAttrMultiProcessorCount, device),
                   ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), ask(cudaDevAttrClusterLaunch, device) != 0,
                   kBuiltForHopper && capability == 90});
  }
  return all;
}

}  // namespace

const std::vector<Device>& devices() {
  static const std::vector<Device> all = ask_for_all();
  return all;
}

const Device* current_device() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= static_cast<int>(devices().size())) return nullptr;
  return &devices()[device];
}

}  // namespace jax_router::cuda
