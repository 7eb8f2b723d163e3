// What the kernels of topk_select share. Short rows have a warp each, or half of one (topk_select_short.cu), longer
// ones a thread block that holds them in registers (topk_select_block.cu), the longest are streamed through one or
// several blocks (topk_select.cu, which also chooses).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common/order.h"
#include "kernels.h"
#include "load.cuh"
#include "row_score.cuh"

namespace jax_router::cuda {

// The choices of a launch are measured on this device.
constexpr int kMultiprocessors = 132;

// The candidates of a row live in shared memory. What a block may have of it, an A100 at least, holds kMaxSelectK; that
// of the smaller devices of its generation kMaxSelectKOfAny. Both less what the kernels declare as __shared__.
constexpr int kMaxSelectK = 8192;
constexpr int kMaxSelectKOfAny = 4096;
constexpr size_t kSharedBytesOfMaxSelectK = 163 * 1024;
constexpr size_t kLeastSharedBytes = 99 * 1024;
constexpr size_t kStaticSharedBytes = 1024;

inline size_t shared_bytes_of_device(int device) {
  int bytes = 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) bytes = 0;
  return std::max(static_cast<size_t>(bytes), kLeastSharedBytes);
}

// topk_select_short.cu: rows of up to kMaxShortLength; k up to kMaxTileK, or kMaxWarpK.
constexpr int kMaxShortLength = 1024;
constexpr int kMaxTileK = 16;
constexpr int kMaxWarpK = 128;
cudaError_t launch_tile_rows(const TopkSelect& op, cudaStream_t stream);
cudaError_t launch_warp_rows(const TopkSelect& op, cudaStream_t stream);

// topk_select_block.cu: rows of up to kMaxBlockLength; k up to kMaxFewK, or any.
constexpr int kMaxBlockLength = 8192;
constexpr int kMaxFewK = 64;
cudaError_t launch_few_of_block_rows(const TopkSelect& op, cudaStream_t stream);
cudaError_t launch_many_of_block_rows(const TopkSelect& op, cudaStream_t stream);

__device__ __forceinline__ uint32_t length_of_row(const TopkSelect& op, int64_t row) {
  const int32_t length = static_cast<int32_t>(op.length);
  return op.lengths == nullptr ? length : min(max(op.lengths[row], 0), length);
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

__device__ __forceinline__ uint32_t word_of(uint4 vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// Element e of a vector of 16 bytes, as f32. The last argument only names the type.
__device__ __forceinline__ float element_of(uint4 vector, int e, float) { return bits_float(word_of(vector, e)); }

__device__ __forceinline__ float element_of(uint4 vector, int e, __nv_bfloat16) {
  const uint32_t word = word_of(vector, e / 2);
  return bits_float(e % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
}

__device__ __forceinline__ float element_of(uint4 vector, int e, __half) {
  const uint32_t word = word_of(vector, e / 2);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(e % 2 == 0 ? word & 0xFFFF : word >> 16)));
}

// The larger in each half of a word of 16-bit floats, or of one f32; NaN if either is.
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b, float) {
  return float_bits(max_nan(bits_float(a), bits_float(b)));
}
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b, __nv_bfloat16) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b, __half) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// The largest element of some vectors, NaN if one is.
template <typename T, int kVectors>
__device__ __forceinline__ float largest_element(const uint4 (&vectors)[kVectors]) {
  uint4 largest = make_uint4(vectors[0].x, 0, 0, 0);
#pragma unroll
  for (int i = 1; i < 4 * kVectors; ++i) largest.x = max_of_words(largest.x, word_of(vectors[i / 4], i % 4), T{});
  const float element = element_of(largest, 0, T{});
  return sizeof(T) == 4 ? element : max_nan(element, element_of(largest, 1, T{}));
}

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void set_value(float* value, float x) { *value = x; }
__device__ __forceinline__ void set_value(__nv_bfloat16* value, float x) { *value = __float2bfloat16_rn(x); }
__device__ __forceinline__ void set_value(__half* value, float x) { *value = __float2half_rn(x); }

// The pairs of a row in as few bits as they need: order_key without the bits that a T does not have, and below it the
// index, inverted. Larger is better, equal keys go to the lower index, and no pair is 0.
template <typename T>
struct PairFormat {
  static constexpr int kKeyShift = std::is_same_v<T, float> ? 0 : std::is_same_v<T, __half> ? 13 : 16;
  static constexpr uint32_t kNaN = 0xFFFFFFFFu >> kKeyShift;

  int index_bits;  // from 1 to 32

  __device__ __forceinline__ uint32_t last_index() const { return 0xFFFFFFFFu >> (32 - index_bits); }
  static __device__ __forceinline__ PairFormat of(const TopkSelect& op) { return {64 - __clzll(op.length - 1)}; }

  __device__ __forceinline__ uint64_t pair(float x, uint32_t index) const {
    return static_cast<uint64_t>(order_key(x) >> kKeyShift) << index_bits | (last_index() - index);
  }
  __device__ __forceinline__ uint32_t index(uint64_t pair) const {
    return last_index() - (static_cast<uint32_t>(pair) & last_index());
  }
  __device__ __forceinline__ bool is_nan(uint64_t pair) const { return pair >> index_bits == kNaN; }
  // The element, or some NaN.
  __device__ __forceinline__ float element(uint64_t pair) const {
    const uint32_t key = static_cast<uint32_t>(pair >> index_bits) << kKeyShift;
    return float_of_key(key >> 31 != 0 ? key : key | ((1u << kKeyShift) - 1));
  }
};

// Result number `place` of a row: the element of this pair. A NaN keeps its own bits, which its key does not have.
template <typename T>
__device__ __forceinline__ void write_result(const TopkSelect& op, int64_t row_index, const T* row, int64_t place,
                                             PairFormat<T> format, uint64_t pair) {
  T* value = static_cast<T*>(op.values) + row_index * op.k + place;
  const uint32_t index = format.index(pair);
  if (format.is_nan(pair)) {
    *value = row[index];
  } else {
    set_value(value, format.element(pair));
  }
  op.indices[row_index * op.k + place] = static_cast<int32_t>(index);
}

template <typename T>
__device__ __forceinline__ void write_nothing(const TopkSelect& op, int64_t row_index, int64_t place) {
  set_value(static_cast<T*>(op.values) + row_index * op.k + place, -INFINITY);
  op.indices[row_index * op.k + place] = -1;
}

}  // namespace jax_router::cuda
