// dense_router: the product of hidden states and weight, and the selection of each token's experts, in one kernel.
#include <cstdint>

#include "dense_router.h"

namespace jax_router::cuda {

cudaError_t run(const DenseRouter& op, const DenseRouterPlan& plan, void* workspace, cudaStream_t stream) {
  // The copies move 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(op.x) % 16 != 0 || reinterpret_cast<uintptr_t>(op.weight) % 16 != 0) {
    return cudaErrorMisalignedAddress;
  }
  return plan.few >= 0 ? run_few(op, plan, workspace, stream) : run_many(op, plan, stream);
}

}  // namespace jax_router::cuda
