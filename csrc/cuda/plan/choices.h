// What the plans of expert_dispatch and expert_counts share: the numbers of choices, and whose each is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/macros.h"

namespace jax_router::cuda {

// Whether there are any, and they have numbers of 32 bits.
template <class Op>
constexpr bool has_numbered_choices(const Op& op) {
  return op.batch > 0 && op.tokens <= INT32_MAX / std::max(op.k, 1);
}

// The token of a choice, choice / k without a division: exact for choices below 2^31.
struct TokenOfChoice {
  uint32_t factor, shift;

  static constexpr TokenOfChoice of(int32_t k) {
    TokenOfChoice token_of{0, 31};
    while ((int64_t{1} << (token_of.shift - 31)) < k) ++token_of.shift;
    token_of.factor = static_cast<uint32_t>((uint64_t{1} << token_of.shift) / std::max(k, 1) + 1);
    return token_of;
  }
  JR_DEVICE_TOO constexpr uint32_t operator()(uint32_t choice) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(choice) * factor >> shift);
  }
};

}  // namespace jax_router::cuda
