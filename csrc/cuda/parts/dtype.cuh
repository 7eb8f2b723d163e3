// Elements in memory, f32, bf16 or f16, as f32: loads of one or four, and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "../../common/ops.h"
#include "../../common/order.h"
#include "warp.cuh"

namespace jax_router::cuda {

// Calls body(T{}) with the C++ type of dtype.
template <class Body>
auto with_type(DType dtype, Body body) {
  if (dtype == DType::kBF16) return body(__nv_bfloat16{});
  if (dtype == DType::kF16) return body(__half{});
  return body(float{});
}

// And back.
constexpr DType dtype_of(float) { return DType::kF32; }
constexpr DType dtype_of(const __nv_bfloat16&) { return DType::kBF16; }
constexpr DType dtype_of(const __half&) { return DType::kF16; }

__device__ __forceinline__ float load_one(const float* p) { return __ldg(p); }
// Not through the __ldg of 16-bit floats: it is assembly that the compiler may execute before the check that guards it.
__device__ __forceinline__ float load_one(const __nv_bfloat16* p) {
  return bits_float(static_cast<uint32_t>(__ldg(reinterpret_cast<const unsigned short*>(p))) << 16);
}
__device__ __forceinline__ float load_one(const __half* p) {
  return __half2float(__ushort_as_half(__ldg(reinterpret_cast<const unsigned short*>(p))));
}

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void store_one(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_one(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store_one(__half* p, float x) { *p = __float2half_rn(x); }

// Two neighbours in 32 bits, the first one in the low half.
__device__ __forceinline__ uint32_t pack_two(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ __forceinline__ uint32_t pack_two(float a, float b, __half) {
  const __half2 two = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ __forceinline__ float2 unpack_two(uint32_t bits, __nv_bfloat16) {
  return make_float2(bits_float(bits << 16), bits_float(bits & 0xFFFF0000u));
}
__device__ __forceinline__ float2 unpack_two(uint32_t bits, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
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
// Of each half, whether a is no less than b, as all bits or none.
__device__ __forceinline__ uint32_t reaches_of_two(uint32_t a, uint32_t b, __nv_bfloat16) {
  return __hge2_mask(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
}
__device__ __forceinline__ uint32_t reaches_of_two(uint32_t a, uint32_t b, __half) {
  return __hge2_mask(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
}
// Of each half, whether a is less than b, as all bits or none.
__device__ __forceinline__ uint32_t below_of_two(uint32_t a, uint32_t b, __nv_bfloat16) {
  return __hlt2_mask(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
}
__device__ __forceinline__ uint32_t below_of_two(uint32_t a, uint32_t b, __half) {
  return __hlt2_mask(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
}

// Twice the least number of the type that is no less than x.
__device__ __forceinline__ uint32_t two_no_less(float x, __nv_bfloat16) {
  const uint32_t bits = float_bits(x);
  const uint32_t high = static_cast<int32_t>(bits) < 0 ? bits : bits + 0xFFFF;
  return __byte_perm(high, high, 0x3232);
}
__device__ __forceinline__ uint32_t two_no_less(float x, __half) {
  const __half2 two = __half2half2(__float2half_ru(x));
  return *reinterpret_cast<const uint32_t*>(&two);
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

// These two, as a choice.
struct OrdinaryLoads {
  __device__ __forceinline__ float4 quad(const float* p) const { return load_quad(p); }
  template <class T>
  __device__ __forceinline__ uint2 packed_quad(const T* p) const {
    return load_packed_quad(p);
  }
};
// The same, and where `passing` is said, their places in the L2 cache are the first to be given away.
struct PassingLoads {
  uint64_t policy;

  __device__ __forceinline__ explicit PassingLoads(bool passing) {
    uint64_t normal;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(normal));
    if (!passing) policy = normal;
  }
  __device__ __forceinline__ float4 quad(const float* p) const {
    float4 x;
    asm("ld.global.nc.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
        : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
        : "l"(p), "l"(policy));
    return x;
  }
  template <class T>
  __device__ __forceinline__ uint2 packed_quad(const T* p) const {
    uint2 x;
    asm("ld.global.nc.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;" : "=r"(x.x), "=r"(x.y) : "l"(p), "l"(policy));
    return x;
  }
};

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

// Whether every row of `length` elements of `bytes` bytes can be read in quads.
__host__ __device__ inline bool rows_have_quads(const void* base, int64_t length, size_t bytes) {
  return length % 4 == 0 && reinterpret_cast<uintptr_t>(base) % (4 * bytes) == 0;
}

}  // namespace jax_router::cuda
