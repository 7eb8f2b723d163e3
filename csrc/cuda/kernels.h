// The CUDA launchers, one an op: raw pointers and a stream in, cudaError_t out. They never synchronise, allocate or
// read device memory on the host, and choose their launch configuration by shapes and options alone, so that a CUDA
// graph may hold them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../common/ops.h"

namespace jax_router::cuda {

cudaError_t launch(const HashRouter& op, cudaStream_t stream);
cudaError_t launch(const ActivationTopk& op, cudaStream_t stream);
cudaError_t launch(const RouteAt& op, cudaStream_t stream);
cudaError_t launch(const RouteCotangent& op, cudaStream_t stream);

// Above this k, which every device of the process can do, the reference implementation takes over. Starts CUDA, which
// an import must not do.
int max_select_k();
cudaError_t launch(const TopkSelect& op, cudaStream_t stream);

// These need scratch memory: as many bytes as workspace_bytes says, aligned to 16, with any content.
size_t workspace_bytes(const ExpertDispatch& op);
cudaError_t launch(const ExpertDispatch& op, void* workspace, cudaStream_t stream);

// The fused dense_router; x and weight must be aligned to 16 bytes. `fuses` looks at shapes, dtypes, options and the
// process's devices: where it says no, XLA's product and the kernel of activation_topk take over.
bool fuses(const DenseRouter& op);
size_t workspace_bytes(const DenseRouter& op);
cudaError_t launch(const DenseRouter& op, void* workspace, cudaStream_t stream);

}  // namespace jax_router::cuda
