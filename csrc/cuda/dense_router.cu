// dense_router: the product of hidden states and weight, and the selection of each token's experts, in one kernel.
#include <cstdint>

#include "dense_router.h"

namespace jax_router::cuda {

cudaError_t run(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream) {
  // Copies and packets are 16 bytes.
  const auto all = reinterpret_cast<uintptr_t>(op.x) | reinterpret_cast<uintptr_t>(op.weight) |
                   reinterpret_cast<uintptr_t>(op.workspace.data);
  if (all % 16 != 0) {
    return cudaErrorMisalignedAddress;
  }
  if (plan.one >= 0) return run_one(op, plan, stream);
  return plan.few >= 0 ? run_few(op, plan, stream) : run_many(op, plan, stream);
}

}  // namespace jax_router::cuda
