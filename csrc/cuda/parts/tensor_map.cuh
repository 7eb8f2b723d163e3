// How the copy engine of Hopper is told of a matrix.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../common/ops.h"

namespace jax_router::cuda {

constexpr int kBoxColumns = 64;

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// From the driver, so that nothing needs to link with it.
inline EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    const bool exists = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<EncodeTensorMap>(exists ? entry : nullptr);
  }();
  return function;
}

// Boxes of box_rows x kBoxColumns of a matrix [rows, hidden] in half precision; in shared memory with swizzled rows of
// 128 bytes.
inline cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* matrix, int64_t rows, int hidden,
                                   int box_rows) {
  const EncodeTensorMap encode = encode_tensor_map();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto type = dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(hidden), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(hidden) * 2};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(matrix), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_router::cuda
