// The one order of the project: jax.lax.top_k's total order on floats, with every NaN counted as the positive NaN, as
// unsigned keys: -inf < ... < -0 < +0 < ... < +inf < NaN. No value has key 0, so 0 can stand for "nothing here".
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace jax_router {

constexpr uint32_t kNoKey = 0;

JR_HOST_DEVICE uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

JR_HOST_DEVICE float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

JR_HOST_DEVICE uint32_t order_key(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign_fill = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
  const uint32_t key = bits ^ (sign_fill | 0x80000000u);
  return x != x ? 0xFFFFFFFFu : key;
}

// The float that has this order key.
JR_HOST_DEVICE float float_of_key(uint32_t key) {
  return bits_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// Key and index in one word: larger is better, equal keys to the lower index.
JR_HOST_DEVICE uint64_t order_pair(uint32_t key, uint32_t index) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~index);
}

JR_HOST_DEVICE uint32_t pair_index(uint64_t pair) { return ~static_cast<uint32_t>(pair); }

}  // namespace jax_router
