// Loads that take no place in the L1: of what no thread nearby asks for again.
#pragma once

#include "dtype.cuh"

namespace jax_router::cuda {

// Volatile, so that no load is executed before the check that guards it.
__device__ __forceinline__ int load_past_l1(const int* p) {
  int x;
  asm volatile("ld.global.nc.L1::no_allocate.s32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
__device__ __forceinline__ int2 load_past_l1(const int2* p) {
  int2 x;
  asm volatile("ld.global.nc.L1::no_allocate.v2.s32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
  return x;
}
__device__ __forceinline__ int4 load_past_l1(const int4* p) {
  int4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
}

// An element, as f32.
__device__ __forceinline__ float load_past_l1(const float* p) {
  return bits_float(static_cast<uint32_t>(load_past_l1(reinterpret_cast<const int*>(p))));
}
template <class T>
__device__ __forceinline__ float load_past_l1(const T* p) {
  unsigned short bits;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(bits) : "l"(p));
  return as_float(*reinterpret_cast<const T*>(&bits));
}

}  // namespace jax_router::cuda
