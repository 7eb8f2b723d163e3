// The plan that a launch takes: the chosen one or, for tests and measurements, one that was forced.
#pragma once

#include <atomic>
#include <mutex>
#include <string>

#include "plan.h"

namespace jax_router::cuda {

// The name of the plan that every launch of this op takes, in the whole process; empty for the chosen one.
template <class Op>
class ForcedPlan {
 public:
  static void set(const std::string& name) {
    const std::lock_guard lock(mutex_);
    name_ = name;
    is_set_ = !name.empty();
  }
  static std::string get() {
    if (!is_set_) return "";
    const std::lock_guard lock(mutex_);
    return name_;
  }

 private:
  static inline std::atomic<bool> is_set_ = false;
  static inline std::mutex mutex_;
  static inline std::string name_;
};

// None where no kernel can compute the op, or not with the forced plan.
template <class Op>
auto planned(const Op& op, const Device& device) -> decltype(plan(op, device)) {
  const std::string forced = ForcedPlan<Op>::get();
  if (forced.empty()) return plan(op, device);
  for (const auto& candidate : plans(op, device)) {
    if (name(op, candidate) == forced) return candidate;
  }
  return std::nullopt;
}

// Whether the plan is faster than what there is without it, unless an op has more to say.
template <class Op, class Plan>
constexpr bool pays(const Op&, const Plan&, const Device&) {
  return true;
}

}  // namespace jax_router::cuda
