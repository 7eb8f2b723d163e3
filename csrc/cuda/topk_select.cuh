// What the two kernels of topk_select share: one has a warp a row (topk_select_short.cu), the other a thread block or a
// cluster of blocks a row (topk_select.cu).
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/order.h"
#include "kernels.h"
#include "load.cuh"

namespace jax_router::cuda {

// Rows of up to kMaxShortLength and k up to kMaxShortK.
constexpr int kMaxShortLength = 1024;
constexpr int kMaxShortK = 16;
cudaError_t launch_short_rows(const TopkSelect& op, cudaStream_t stream);

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

__device__ __forceinline__ void set_value(float* value, float x) { *value = x; }
__device__ __forceinline__ void set_value(__nv_bfloat16* value, float x) { *value = __float2bfloat16_rn(x); }
__device__ __forceinline__ void set_value(__half* value, float x) { *value = __float2half_rn(x); }

// Result number `place` of a row: the element of this pair. A NaN keeps its own bits, which its key does not have.
template <typename T>
__device__ __forceinline__ void write_result(const TopkSelect& op, int64_t row_index, const T* row, int64_t place,
                                             uint64_t pair) {
  T* value = static_cast<T*>(op.values) + row_index * op.k + place;
  const uint32_t key = pair_key(pair);
  if (key == 0xFFFFFFFFu) {
    *value = row[pair_index(pair)];
  } else {
    set_value(value, bits_float(key >> 31 != 0 ? key ^ 0x80000000u : ~key));
  }
  op.indices[row_index * op.k + place] = static_cast<int32_t>(pair_index(pair));
}

template <typename T>
__device__ __forceinline__ void write_nothing(const TopkSelect& op, int64_t row_index, int64_t place) {
  set_value(static_cast<T*>(op.values) + row_index * op.k + place, -INFINITY);
  op.indices[row_index * op.k + place] = -1;
}

}  // namespace jax_router::cuda
