// hash_router: a table row of k ids for each token, with equal weights.
//
// One thread owns the same kWidth neighbouring columns of kHashTokens tokens: it loads their token ids, then the table
// entries (the table stays in L2, hence results are stored as streaming), then stores ids and weights. Few tokens
// rarely read a line of the table twice: then lines take no place in the L1. Floor: rows * (4 + 8 k) bytes, and the
// table once.
#include "kernels.h"
#include "parts/launch.cuh"
#include "parts/past_l1.cuh"

namespace jax_router::cuda {
namespace {

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
template <int kWidth, bool kPastL1>
__global__ void __launch_bounds__(kHashThreads)
    hash_router_rows(const HashRouter op, const int columns, const float weight) {
  using V = Vector<kWidth>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kHashTokens + threadIdx.y;
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= columns) return;
  const auto* lut = reinterpret_cast<const typename V::Int*>(op.hash_lut) + column;
  auto* expert_ids = reinterpret_cast<typename V::Int*>(op.expert_ids) + column;
  auto* weights = reinterpret_cast<typename V::Float*>(op.weights) + column;
  int token_id[kHashTokens];
#pragma unroll
  for (int i = 0; i < kHashTokens; ++i) {
    const int64_t row = first + static_cast<int64_t>(i) * blockDim.y;
    token_id[i] = row < op.rows ? __ldg(op.token_ids + row) : -1;
  }
  typename V::Int ids[kHashTokens];
  bool valid[kHashTokens];
#pragma unroll
  for (int i = 0; i < kHashTokens; ++i) {
    valid[i] = token_id[i] >= 0 && token_id[i] < op.vocab_size;
    const auto* entries = lut + static_cast<int64_t>(token_id[i]) * columns;
    ids[i] = !valid[i] ? V::ints(-1) : kPastL1 ? load_past_l1(entries) : __ldg(entries);
  }
#pragma unroll
  for (int i = 0; i < kHashTokens; ++i) {
    const int64_t row = first + static_cast<int64_t>(i) * blockDim.y;
    if (row >= op.rows) continue;
    __stcs(expert_ids + row * columns, ids[i]);
    __stcs(weights + row * columns, V::floats(valid[i] ? weight : 0.0f));
  }
}

}  // namespace

cudaError_t run(const HashRouter& op, const HashRouterPlan& plan, cudaStream_t stream) {
  LaunchShape shape{plan.blocks, dim3(plan.block_columns, plan.block_tokens)};
  shape.blocks_y = plan.column_blocks;
  const float weight = op.scale / static_cast<float>(op.k);
  const auto launch = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const auto kernel = plan.past_l1 ? hash_router_rows<kWidth, true> : hash_router_rows<kWidth, false>;
    return launch_kernel(kernel, shape, stream, op, plan.columns, weight);
  };
  if (plan.width == 4) return launch(std::integral_constant<int, 4>{});
  if (plan.width == 2) return launch(std::integral_constant<int, 2>{});
  return launch(std::integral_constant<int, 1>{});
}

}  // namespace jax_router::cuda
