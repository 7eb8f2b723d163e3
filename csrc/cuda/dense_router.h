// The two kernels of dense_router, for its entry alone; what they take is in plan/dense_router.h.
#pragma once

#include "kernels.h"

namespace jax_router::cuda {

cudaError_t run_few(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream);
cudaError_t run_many(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream);

}  // namespace jax_router::cuda
