// dense_router for many tokens, a part of dense_router.cu's: see the declarations without `prefill` in kernels.h.
#pragma once

#include "kernels.h"

namespace jax_router::cuda {

// Looks at the devices too: the kernel is for compute capability 9.0 alone.
bool prefill_fuses(const DenseRouter& op);
cudaError_t launch_prefill(const DenseRouter& op, cudaStream_t stream);

}  // namespace jax_router::cuda
