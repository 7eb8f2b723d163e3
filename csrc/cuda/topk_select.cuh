// What the kernels of topk_select share: vectors of a row, and (key, index) pairs.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common/order.h"
#include "kernels.h"
#include "parts/dtype.cuh"
#include "parts/tile.cuh"
#include "parts/warp.cuh"

namespace jax_router::cuda {

// topk_select_short.cu, topk_select_warp.cu, topk_select_block.cu and topk_select_streamed.cu
cudaError_t run_short(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream);
cudaError_t run_warp(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream);
cudaError_t run_block(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream);
cudaError_t run_streamed(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream);

__device__ __forceinline__ uint32_t length_of_row(const TopkSelect& op, int64_t row) {
  const int32_t length = static_cast<int32_t>(op.length);
  return op.lengths == nullptr ? length : min(max(op.lengths[row], 0), length);
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

// The largest element of some vectors, NaN if one is.
template <typename T, int kVectors>
__device__ __forceinline__ float largest_element(const uint4 (&vectors)[kVectors]) {
  uint4 largest = make_uint4(vectors[0].x, 0, 0, 0);
#pragma unroll
  for (int i = 1; i < 4 * kVectors; ++i) largest.x = max_of_words(largest.x, word_of(vectors[i / 4], i % 4), T{});
  const float element = element_of(largest, 0, T{});
  return sizeof(T) == 4 ? element : max_nan(element, element_of(largest, 1, T{}));
}

// Bit v * kElements + e for each element of some vectors that is not below `bound`, an element or infinite. A NaN is
// not below anything.
template <typename T, int kVectors>
__device__ __forceinline__ uint32_t elements_reaching(const uint4 (&vectors)[kVectors], float bound) {
  constexpr int kElements = kVectors * 16 / sizeof(T);
  static_assert(kElements <= 32);
  if constexpr (sizeof(T) == 4) {
    SumOfTrue halves[2];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      halves[i / 16].add_unless_below(bits_float(word_of(vectors[i / 4], i % 4)), bound, 1u << i % 16);
    }
    return halves[0].value() | halves[1].value() << 16;
  } else {
    const uint32_t bounds = two_no_less(bound, T{});
    uint32_t below[2] = {};  // 16 elements each, the odd ones in the upper half of the word
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      const uint32_t word = word_of(vectors[i / 4], i % 4);
      below[i / 8] |= below_of_two(word, bounds, T{}) & (0x00020001u << (2 * (i % 8)));
    }
    const auto joined = [](uint32_t halves) { return (halves | halves >> 16) & 0xFFFF; };
    const uint32_t mask = ~(joined(below[0]) | joined(below[1]) << 16);
    return kElements < 32 ? mask & (1u << kElements % 32) - 1 : mask;
  }
}

// The pairs of a row in as few bits as they need: order_key without the bits that a T does not have, and below it the
// index, inverted. Larger is better, equal keys go to the lower index, and no pair is 0.
template <typename T>
struct PairFormat {
  static constexpr int kKeyShift = std::is_same_v<T, float> ? 0 : std::is_same_v<T, __half> ? 13 : 16;
  static constexpr uint32_t kNaN = 0xFFFFFFFFu >> kKeyShift;
  static constexpr uint32_t kInfinity = 0xFF800000u >> kKeyShift;
  static constexpr uint32_t kZero = 0x80000000u >> kKeyShift;

  int index_bits;  // from 1 to 32

  __device__ __forceinline__ uint32_t last_index() const { return 0xFFFFFFFFu >> (32 - index_bits); }
  static __device__ __forceinline__ PairFormat of(const TopkSelect& op) { return {64 - __clzll((op.length - 1) | 1)}; }

  static __device__ __forceinline__ uint32_t key_of(float x) { return order_key(x) >> kKeyShift; }
  __device__ __forceinline__ uint64_t pair(float x, uint32_t index) const {
    return static_cast<uint64_t>(key_of(x)) << index_bits | (last_index() - index);
  }
  __device__ __forceinline__ uint32_t index(uint64_t pair) const {
    return last_index() - (static_cast<uint32_t>(pair) & last_index());
  }
  __device__ __forceinline__ uint32_t key(uint64_t pair) const { return static_cast<uint32_t>(pair >> index_bits); }
  __device__ __forceinline__ bool is_nan(uint64_t pair) const { return key(pair) == kNaN; }
  // What elements are compared with, as floats, to learn if they are below a pair: infinity where only NaN is not, and
  // NaN, which nothing is smaller than, where nothing is.
  __device__ __forceinline__ float bound(uint64_t pair) const {
    return key(pair) > kInfinity ? INFINITY : element(pair);
  }
  // The same for what must be larger than the pair's element.
  __device__ __forceinline__ float larger(uint64_t pair) const {
    return element(static_cast<uint64_t>(min(key(pair) + 1, kInfinity)) << index_bits);
  }
  // The least key of an element that is not smaller than that: -0 is not smaller than 0. kNoKey if it may be any.
  __device__ __forceinline__ uint32_t least_key(uint64_t pair) const {
    const uint32_t key = min(this->key(pair), kInfinity);
    return key == kZero ? key - 1 : key;
  }
  // The element, or some NaN.
  __device__ __forceinline__ float element(uint64_t pair) const {
    const uint32_t key = this->key(pair) << kKeyShift;
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
    store_one(value, format.element(pair));
  }
  op.indices[row_index * op.k + place] = static_cast<int32_t>(index);
}

template <typename T>
__device__ __forceinline__ void write_nothing(const TopkSelect& op, int64_t row_index, int64_t place) {
  store_one(static_cast<T*>(op.values) + row_index * op.k + place, -INFINITY);
  op.indices[row_index * op.k + place] = -1;
}

}  // namespace jax_router::cuda
