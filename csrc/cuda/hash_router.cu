// hash_router: a table row of k ids for each token, with equal weights.
//
// One thread owns the same kWidth neighbouring columns of kTokens tokens: it loads their token ids, then the table
// entries (the table stays in L2, hence results are stored as streaming), then stores ids and weights.
// Floor: rows * (4 + 8 k) bytes, and the table once.
#include <algorithm>

#include "kernels.h"

namespace jax_router::cuda {
namespace {

constexpr int kTokens = 2;
constexpr int kThreads = 128;

template <int kWidth>
struct Vector;
template <>
struct Vector<1> {
  using Int = int;
  using Float = float;
  static __device__ Int ints(int x) { return x; }
  static __device__ Float floats(float x) { return x; }
};
template <>
struct Vector<2> {
  using Int = int2;
  using Float = float2;
  static __device__ Int ints(int x) { return make_int2(x, x); }
  static __device__ Float floats(float x) { return make_float2(x, x); }
};
template <>
struct Vector<4> {
  using Int = int4;
  using Float = float4;
  static __device__ Int ints(int x) { return make_int4(x, x, x, x); }
  static __device__ Float floats(float x) { return make_float4(x, x, x, x); }
};

// blockDim: (columns at a time, tokens at a time), with columns = k / kWidth.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) look_up(const HashRouter op, const int columns, const float weight) {
  using V = Vector<kWidth>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kTokens + threadIdx.y;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= columns) return;
  const auto* lut = reinterpret_cast<const typename V::Int*>(op.hash_lut) + column;
  auto* expert_ids = reinterpret_cast<typename V::Int*>(op.expert_ids) + column;
  auto* weights = reinterpret_cast<typename V::Float*>(op.weights) + column;
  int token_id[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t row = first + static_cast<int64_t>(i) * blockDim.y;
    token_id[i] = row < op.rows ? __ldg(op.token_ids + row) : -1;
  }
  typename V::Int ids[kTokens];
  bool valid[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    valid[i] = token_id[i] >= 0 && token_id[i] < op.vocab_size;
    ids[i] = valid[i] ? __ldg(lut + static_cast<int64_t>(token_id[i]) * columns) : V::ints(-1);
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t row = first + static_cast<int64_t>(i) * blockDim.y;
    if (row >= op.rows) continue;
    __stcs(expert_ids + row * columns, ids[i]);
    __stcs(weights + row * columns, V::floats(valid[i] ? weight : 0.0f));
  }
}

template <int kWidth>
cudaError_t launch_width(const HashRouter& op, cudaStream_t stream) {
  const int columns = op.k / kWidth;
  // A multiple of 16 tokens at a time keeps what a warp stores aligned to sectors.
  const int tokens_at_a_time = std::max(1, kThreads / columns);
  const dim3 block(std::min(columns, kThreads), tokens_at_a_time >= 16 ? tokens_at_a_time / 16 * 16 : tokens_at_a_time);
  const int64_t tokens = static_cast<int64_t>(block.y) * kTokens;
  const dim3 grid(static_cast<unsigned>((op.rows + tokens - 1) / tokens), (columns + kThreads - 1) / kThreads);
  look_up<kWidth><<<grid, block, 0, stream>>>(op, columns, op.scale / static_cast<float>(op.k));
  return cudaGetLastError();
}

bool aligned(const HashRouter& op, size_t bytes) {
  const auto all = reinterpret_cast<uintptr_t>(op.hash_lut) | reinterpret_cast<uintptr_t>(op.expert_ids) |
                   reinterpret_cast<uintptr_t>(op.weights);
  return all % bytes == 0;
}

}  // namespace

cudaError_t launch(const HashRouter& op, cudaStream_t stream) {
  if (op.rows == 0 || op.k == 0) return cudaSuccess;
  if (op.k % 4 == 0 && aligned(op, 16)) return launch_width<4>(op, stream);
  if (op.k % 2 == 0 && aligned(op, 8)) return launch_width<2>(op, stream);
  return launch_width<1>(op, stream);
}

}  // namespace jax_router::cuda
