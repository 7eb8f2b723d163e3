// f32, bf16 and f16 to f32 and back. Branch-free, and without arithmetic on denormal f32 numbers, which XLA's threads
// flush to zero: every f16 denormal survives.
#pragma once

#include <cstdint>

#include "../common/ops.h"
#include "../common/order.h"

namespace jax_router::cpu::JR_ISA {

struct BF16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

inline float to_f32(float x) { return x; }

inline float to_f32(BF16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_f32(F16 x) {
  constexpr uint32_t kBias = (127 - 15) << 23;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t denormal = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7C00u ? kBias : 2 * kBias);
  return bits_float(sign | (magnitude < 0x0400u ? denormal : normal));
}

template <typename T>
inline T from_f32(float x);

template <>
inline float from_f32<float>(float x) {
  return x;
}

template <>
inline BF16 from_f32<BF16>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7FC0u : rounded)};
}

template <>
inline F16 from_f32<F16>(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000u;
  const uint32_t magnitude = float_bits(x) & 0x7FFFFFFFu;
  // Adding 0.5 leaves a denormal result's bits, rounded, at the low end of the sum.
  const uint32_t denormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
  const uint32_t bits = magnitude >= 0x47800000u ? (x != x ? 0x7E00u : 0x7C00u) : finite;
  return {static_cast<uint16_t>(sign | bits)};
}

// body(a value of the C++ type of dtype)
template <typename Body>
inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32:
      return body(float{});
    case DType::kBF16:
      return body(BF16{});
    case DType::kF16:
      return body(F16{});
  }
}

}  // namespace jax_router::cpu::JR_ISA
