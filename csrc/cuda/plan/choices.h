// What the plans of expert_dispatch and expert_counts share: the numbers of choices.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jax_router::cuda {

// Whether there are any, and they have numbers of 32 bits.
template <class Op>
constexpr bool has_numbered_choices(const Op& op) {
  return op.batch > 0 && op.tokens <= INT32_MAX / std::max(op.k, 1);
}

}  // namespace jax_router::cuda
