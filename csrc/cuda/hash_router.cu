// hash_router: a table row of k ids for each token, with equal weights.
//
// One thread owns 16 bytes of ids and of weights, which may belong to up to 4 tokens, of kUnits runs of tokens: it
// loads their token ids, then the table entries (the table stays in L2, hence results are stored as streaming), then
// stores. Floor: rows * (4 + 8 k) bytes, and the table once.
#include <algorithm>

#include "kernels.h"

namespace jax_router::cuda {
namespace {

constexpr int kUnits = 2;
constexpr int kThreads = 256;

// kWidth table entries at once; p is aligned to them.
template <int kWidth>
__device__ __forceinline__ void load_entries(const int32_t* p, int32_t* entries) {
  if constexpr (kWidth == 4) {
    *reinterpret_cast<int4*>(entries) = __ldg(reinterpret_cast<const int4*>(p));
  } else if constexpr (kWidth == 2) {
    *reinterpret_cast<int2*>(entries) = __ldg(reinterpret_cast<const int2*>(p));
  } else {
    *entries = __ldg(p);
  }
}

// kWidth, a divisor of 4 and k: how many entries are loaded at once. A unit is 4 / kWidth tokens, k / kWidth times 16
// bytes. blockDim: (threads of a unit, units at a time). vectors: whether the results are aligned to 16 bytes.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) look_up(const HashRouter op, const float weight, const bool vectors) {
  constexpr int kPieces = 4 / kWidth;
  const int vector = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (vector >= op.k / kWidth) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kUnits + threadIdx.y;
  int token[kPieces];  // of the unit
  int column[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    token[p] = (4 * vector + p * kWidth) / op.k;
    column[p] = 4 * vector + p * kWidth - token[p] * op.k;
  }

  int token_id[kUnits][kPieces];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t row = (first + u * blockDim.y) * kPieces + token[p];
      token_id[u][p] = row < op.rows ? __ldg(op.token_ids + row) : -1;
    }
  }
  alignas(16) int32_t ids[kUnits][4];
  bool valid[kUnits][kPieces];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      valid[u][p] = token_id[u][p] >= 0 && token_id[u][p] < op.vocab_size;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) ids[u][p * kWidth + i] = -1;
      const int64_t entry = static_cast<int64_t>(token_id[u][p]) * op.k + column[p];
      if (valid[u][p]) load_entries<kWidth>(op.hash_lut + entry, ids[u] + p * kWidth);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int64_t first_row = (first + u * blockDim.y) * kPieces;
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = valid[u][i / kWidth] ? weight : 0.0f;
    const int64_t place = first_row * op.k + 4 * vector;
    if (vectors && first_row + kPieces <= op.rows) {
      __stcs(reinterpret_cast<int4*>(op.expert_ids + place), make_int4(ids[u][0], ids[u][1], ids[u][2], ids[u][3]));
      __stcs(reinterpret_cast<float4*>(op.weights + place),
             make_float4(weights[0], weights[1], weights[2], weights[3]));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first_row + token[i / kWidth] >= op.rows) continue;
        op.expert_ids[place + i] = ids[u][i];
        op.weights[place + i] = weights[i];
      }
    }
  }
}

template <int kWidth>
cudaError_t launch_width(const HashRouter& op, bool vectors, cudaStream_t stream) {
  constexpr int kTokens = 4 / kWidth;
  const int vectors_a_unit = op.k / kWidth;
  const dim3 block(std::min(vectors_a_unit, kThreads), std::max(1, kThreads / vectors_a_unit));
  const int64_t tokens = static_cast<int64_t>(block.y) * kUnits * kTokens;
  const dim3 grid(static_cast<unsigned>((op.rows + tokens - 1) / tokens), (vectors_a_unit + kThreads - 1) / kThreads);
  look_up<kWidth><<<grid, block, 0, stream>>>(op, op.scale / static_cast<float>(op.k), vectors);
  return cudaGetLastError();
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

cudaError_t launch(const HashRouter& op, cudaStream_t stream) {
  if (op.rows == 0 || op.k == 0) return cudaSuccess;
  const bool vectors = aligned(op.expert_ids, 16) && aligned(op.weights, 16);
  if (op.k % 4 == 0 && aligned(op.hash_lut, 16)) return launch_width<4>(op, vectors, stream);
  if (op.k % 2 == 0 && aligned(op.hash_lut, 8)) return launch_width<2>(op, vectors, stream);
  return launch_width<1>(op, vectors, stream);
}

}  // namespace jax_router::cuda
