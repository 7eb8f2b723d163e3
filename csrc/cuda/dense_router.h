// What the kernels of dense_router share with its entry; what they take is in plan/dense_router.h.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "parts/dtype.cuh"

namespace jax_router::cuda {

cudaError_t run_one(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream);
cudaError_t run_few(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream);
cudaError_t run_many(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream);

// Calls body(X{}, W{}, std::integral_constant<KeyMode, mode>{}), with the types of x and weight.
template <class Body>
cudaError_t with_types(const DenseRouter& op, Body body) {
  const auto with_mode = [&](auto x, auto weight) {
    switch (key_mode(op.select)) {
      case KeyMode::kLogits:
        return body(x, weight, std::integral_constant<KeyMode, KeyMode::kLogits>{});
      case KeyMode::kScores:
        return body(x, weight, std::integral_constant<KeyMode, KeyMode::kScores>{});
      case KeyMode::kGroups:
        return body(x, weight, std::integral_constant<KeyMode, KeyMode::kGroups>{});
    }
    return cudaErrorInvalidValue;
  };
  if (op.operand_dtype != op.weight_dtype) return with_mode(__nv_bfloat16{}, float{});
  return with_type(op.operand_dtype, [&](auto type) { return with_mode(type, type); });
}

}  // namespace jax_router::cuda
