// What the lanes of a warp, and the warps of a block, do together.
#pragma once

#include <cstdint>

namespace jax_router::cuda {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

// NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// NaN if one of them is. By four runs, as each step waits for the one before it.
template <int kElements>
__device__ __forceinline__ float largest_of(const float (&values)[kElements]) {
  constexpr int kRuns = kElements < 4 ? kElements : 4;
  float largest[kRuns];
#pragma unroll
  for (int i = 0; i < kRuns; ++i) largest[i] = values[i];
#pragma unroll
  for (int i = kRuns; i < kElements; ++i) largest[i % kRuns] = max_nan(largest[i % kRuns], values[i]);
#pragma unroll
  for (int i = 1; i < kRuns; ++i) largest[0] = max_nan(largest[0], largest[i]);
  return largest[0];
}

// Over each kLanes neighbouring lanes; NaN if one of them has one.
template <int kLanes>
__device__ __forceinline__ float tile_max_nan(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = max_nan(value, __shfl_xor_sync(kFullWarp, value, step));
  return value;
}

// The sum of x over the lanes up to this one.
__device__ __forceinline__ uint32_t inclusive_sum_of_lanes(uint32_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, x, step);
    if (threadIdx.x % 32 >= step) x += other;
  }
  return x;
}

// The sum of x over the earlier threads of a block of kThreads, by way of one word a warp of shared memory. Has a
// barrier in it; another must lie between the return and the next call with the same words.
template <int kThreads>
__device__ __forceinline__ uint32_t exclusive_sum_of_block(uint32_t x, uint32_t (&warp_sums)[kThreads / 32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t sum = inclusive_sum_of_lanes(x);
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  return __reduce_add_sync(kFullWarp, lane < warp ? warp_sums[lane] : 0) + sum - x;
}

}  // namespace jax_router::cuda
