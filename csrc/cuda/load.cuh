// Loads of logits, f32, bf16 or f16, as f32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "../common/ops.h"
#include "../common/order.h"

namespace jax_router::cuda {

// Calls body(T{}) with the C++ type of dtype.
template <class Body>
auto with_type(DType dtype, Body body) {
  if (dtype == DType::kBF16) return body(__nv_bfloat16{});
  if (dtype == DType::kF16) return body(__half{});
  return body(float{});
}

__device__ __forceinline__ float load_one(const float* p) { return __ldg(p); }
// Not through the __ldg of 16-bit floats: it is assembly that the compiler may execute before the check that guards it.
__device__ __forceinline__ float load_one(const __nv_bfloat16* p) {
  return bits_float(static_cast<uint32_t>(__ldg(reinterpret_cast<const unsigned short*>(p))) << 16);
}
__device__ __forceinline__ float load_one(const __half* p) {
  return __half2float(__ushort_as_half(__ldg(reinterpret_cast<const unsigned short*>(p))));
}

// Four neighbours at once; p must be aligned to all four.
__device__ __forceinline__ float4 load_quad(const float* p) { return __ldg(reinterpret_cast<const float4*>(p)); }

// The same of 16-bit elements as they lie in memory, and as f32; for unpack_quad the pointer only names the type.
template <class T>
__device__ __forceinline__ uint2 load_packed_quad(const T* p) {
  return __ldg(reinterpret_cast<const uint2*>(p));
}
__device__ __forceinline__ float4 unpack_quad(const __nv_bfloat16*, uint2 bits) {
  return make_float4(bits_float(bits.x << 16), bits_float(bits.x & 0xFFFF0000u), bits_float(bits.y << 16),
                     bits_float(bits.y & 0xFFFF0000u));
}
__device__ __forceinline__ float4 unpack_quad(const __half*, uint2 bits) {
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
  return make_float4(low.x, low.y, high.x, high.y);
}
template <class T>
__device__ __forceinline__ float4 load_quad(const T* p) {
  return unpack_quad(p, load_packed_quad(p));
}

// Elements first .. first + 3 of a row of `length`, -inf where there is none. quads: rows_have_quads.
template <class T>
__device__ __forceinline__ float4 load_quad_of_row(const T* row, int first, int length, bool quads) {
  float4 quad = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
  if (quads) {
    if (first < length) quad = load_quad(row + first);
  } else {
    if (first + 0 < length) quad.x = load_one(row + first + 0);
    if (first + 1 < length) quad.y = load_one(row + first + 1);
    if (first + 2 < length) quad.z = load_one(row + first + 2);
    if (first + 3 < length) quad.w = load_one(row + first + 3);
  }
  return quad;
}

// A row of `length` elements into the registers of a tile of kLanes lanes, in the layout of select.cuh; -inf where
// there is no element. kFullChunks: the first so many of the kElements / 4 quads are within any row that comes here.
template <int kLanes, int kFullChunks, int kElements, class T>
__device__ __forceinline__ void load_tile(const T* row, int length, bool quads, float (&elements)[kElements]) {
  const int first = 4 * (static_cast<int>(threadIdx.x) & (kLanes - 1));
  row += first;
  asm("" : "+l"(row));  // one address with constant offsets, where the compiler would make one for each load
  const int left = length - first;
  if (quads) {
    // 16-bit quads stay packed until all loads are under way: the compiler would wait for some of them to unpack these.
    constexpr bool kPacked = sizeof(T) == 2;
    [[maybe_unused]] uint2 packed[kPacked ? kElements / 4 : 1];
    if constexpr (kPacked) {
#pragma unroll
      for (int c = 0; c < kElements / 4; ++c) {
        if (c < kFullChunks || 4 * kLanes * c < left) packed[c] = load_packed_quad(row + 4 * kLanes * c);
      }
    }
#pragma unroll
    for (int c = 0; c < kElements / 4; ++c) {
      float4 quad = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
      if (c < kFullChunks || 4 * kLanes * c < left) {
        if constexpr (kPacked) {
          quad = unpack_quad(row, packed[c]);
        } else {
          quad = load_quad(row + 4 * kLanes * c);
        }
      }
      elements[4 * c + 0] = quad.x;
      elements[4 * c + 1] = quad.y;
      elements[4 * c + 2] = quad.z;
      elements[4 * c + 3] = quad.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int offset = i / 4 * 4 * kLanes + i % 4;
      elements[i] = offset < left ? load_one(row + offset) : -INFINITY;
    }
  }
}

// Whether every row of `length` elements of `bytes` bytes can be read in quads.
__host__ __device__ inline bool rows_have_quads(const void* base, int64_t length, size_t bytes) {
  return length % 4 == 0 && reinterpret_cast<uintptr_t>(base) % (4 * bytes) == 0;
}

}  // namespace jax_router::cuda
