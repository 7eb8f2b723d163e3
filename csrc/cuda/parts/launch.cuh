// Launches: how a kernel is given its shared memory, its cluster and its place behind another one, and how a number of
// a plan becomes a constant of a template.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../device.h"

namespace jax_router::cuda {

struct LaunchShape {
  int64_t blocks;  // along x
  dim3 threads;
  int64_t shared_bytes = 0;  // that the launch asks for, besides what the kernel declares
  int cluster = 1;           // blocks
  bool overlaps = false;     // begins before the kernel before it on the stream has ended
  unsigned blocks_y = 1;
  unsigned blocks_z = 1;
};

// Lets a kernel have all the shared memory that the device grants, and clusters of any size. The same values whatever
// is launched, so that threads which launch at once do not undo each other's.
template <class Kernel>
cudaError_t prepare(Kernel* kernel, const LaunchShape& shape) {
  if (shape.shared_bytes > 0) {
    const Device* device = current_device();
    cudaFuncAttributes declared;
    cudaError_t error = cudaFuncGetAttributes(&declared, kernel);
    if (error != cudaSuccess) return error;
    if (device == nullptr) return cudaErrorInvalidDevice;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device->shared_bytes - static_cast<int>(declared.sharedSizeBytes));
    if (error != cudaSuccess) return error;
  }
  constexpr int kPortableCluster = 8;
  if (shape.cluster <= kPortableCluster) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_prepared(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                            const Arguments&... arguments) {
  if (shape.blocks == 0) return cudaSuccess;  // no rows
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), shape.blocks_y, shape.blocks_z);
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.overlaps) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                          const Arguments&... arguments) {
  const cudaError_t error = prepare(kernel, shape);
  return error != cudaSuccess ? error : launch_prepared(kernel, shape, stream, arguments...);
}

// In a kernel that was launched as one that `overlaps`: until the one before it has ended, and all that it wrote is
// seen.
__device__ __forceinline__ void wait_for_earlier_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// In the one before it: from here on it may begin.
__device__ __forceinline__ void let_later_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <class Body, int... kIndices>
cudaError_t with_one_of(std::integer_sequence<int, kIndices...>, int index, Body body) {
  cudaError_t result = cudaErrorInvalidValue;
  (void)((kIndices == index && (result = body(std::integral_constant<int, kIndices>{}), true)) || ...);
  return result;
}

// body(std::integral_constant<int, index>{}), for an index below kCount. For one that it has no kernel for, body
// returns cudaErrorInvalidValue; no plan comes to that.
template <int kCount, class Body>
cudaError_t with_index(int index, Body body) {
  return with_one_of(std::make_integer_sequence<int, kCount>{}, index, body);
}

}  // namespace jax_router::cuda
