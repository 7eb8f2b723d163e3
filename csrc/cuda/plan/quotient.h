// A division by a number that is known when a kernel is launched.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/macros.h"

namespace jax_router::cuda {

// number / divisor as a product and a shift, for numbers below 2^31: exact, and 0 by larger divisors. By 0 as by 1.
struct Quotient {
  uint32_t factor, shift;

  static constexpr Quotient by(int64_t any_divisor) {
    const int64_t divisor = std::clamp<int64_t>(any_divisor, 1, int64_t{1} << 31);
    Quotient quotient{0, 31};
    while ((int64_t{1} << (quotient.shift - 31)) < divisor) ++quotient.shift;
    quotient.factor = static_cast<uint32_t>((uint64_t{1} << quotient.shift) / static_cast<uint64_t>(divisor) + 1);
    return quotient;
  }
  JR_DEVICE_TOO constexpr uint32_t operator()(uint32_t number) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(number) * factor >> shift);
  }
};

}  // namespace jax_router::cuda
