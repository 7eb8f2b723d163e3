// What the files of dense_router share: the sizes that its two paths take, and the paths themselves.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/ops.h"

namespace jax_router::cuda {

// Up to this many tokens one kernel multiplies and selects; above, a product goes before the kernel of activation_topk.
constexpr int kDecodeRows = 64;

bool decode_supports(const DenseRouter& op);
size_t decode_workspace_bytes(const DenseRouter& op);
cudaError_t launch_decode(const DenseRouter& op, void* workspace, cudaStream_t stream);

bool prefill_supports(const DenseRouter& op);
size_t prefill_workspace_bytes(const DenseRouter& op);
cudaError_t launch_prefill(const DenseRouter& op, void* workspace, cudaStream_t stream);

}  // namespace jax_router::cuda
