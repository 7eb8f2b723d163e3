// topk_select: the k largest of each row. Short rows have a warp each, or half of one (topk_select_short.cu), and so
// have longer ones where they are many and the choices few (topk_select_warp.cu); others have a thread block that holds
// them in registers (topk_select_block.cu), and the longest are streamed through one or several blocks
// (topk_select_streamed.cu).
#include "topk_select.cuh"

namespace jax_router::cuda {

cudaError_t run(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream) {
  switch (plan.kernel()) {
    case TopkKernel::kTile:
    case TopkKernel::kWarp:
      return run_short(op, plan, stream);
    case TopkKernel::kSorting:
      return run_warp(op, plan, stream);
    case TopkKernel::kFew:
    case TopkKernel::kMany:
      return run_block(op, plan, stream);
    case TopkKernel::kStreamed:
      return run_streamed(op, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_router::cuda
