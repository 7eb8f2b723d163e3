// route_at: the weights of given experts.
//
// A thread block owns a few tokens, one thread a choice: it loads the id (where the ids are those of a table, which
// stays in the L2, by the token's own id), then the one logit, and the token's threads share their scores through
// shared memory, to be added up in the order of activation_topk. Softmax without renormalisation needs the whole row:
// there a warp owns a token. Floor: rows * k * (a 32-byte sector for the logit + 12 bytes for id, weight and valid id).
//
// Few tokens wait for one load after another. There a block owns one token, and scores its whole row, a thread an
// expert, while the ids are on their way.
#include "kernels.h"
#include "parts/dtype.cuh"
#include "parts/launch.cuh"
#include "parts/past_l1.cuh"
#include "parts/row_score.cuh"

namespace jax_router::cuda {
namespace {

// The id, or -1 where the expert does not exist.
__device__ __forceinline__ int load_expert(const RouteAt& op, int64_t token, int j) {
  const int32_t* ids = ids_of_row(op, token);
  if (ids == nullptr) return -1;
  const int expert = __ldg(ids + j);
  return static_cast<uint32_t>(expert) < static_cast<uint32_t>(op.experts) ? expert : -1;
}

// -inf, whose score is 0, where the expert does not exist.
template <class T>
__device__ __forceinline__ float load_logit(const RouteAt& op, int64_t token, int expert) {
  return expert < 0 ? -INFINITY : load_past_l1(static_cast<const T*>(op.logits) + token * op.experts + expert);
}

__device__ __forceinline__ void store_choice(const RouteAt& op, int64_t token, int j, int expert, float logit,
                                             float weight) {
  const int64_t place = token * op.k + j;
  op.valid_ids[place] = expert;
  op.weights[place] = expert < 0 ? 0.0f : weight;
  if (op.chosen_logits != nullptr) op.chosen_logits[place] = expert < 0 ? 0.0f : logit;
}

// blockDim: (k, tokens of the block).
template <class T>
__global__ void __launch_bounds__(kRouteAtThreads) route_at_choices(const RouteAt op) {
  __shared__ __align__(16) float shared[4 * kRouteAtThreads];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int j = static_cast<int>(threadIdx.x);
  const int expert = token < op.rows ? load_expert(op, token, j) : -1;
  const float logit = load_logit<T>(op, token, expert);
  const int padded = (op.k + 3) / 4 * 4;
  float* values = shared + static_cast<int>(threadIdx.y) * padded;
  for (int i = op.k + j; i < padded; i += op.k) values[i] = 0.0f;
  const float weight =
      finish_weight(RowScore{op.scoring.score_fn}, op.scoring, op.k, true, j, logit, values, [] { __syncthreads(); });
  if (token < op.rows) store_choice(op, token, j, expert, logit, weight);
}

// As finish_weight: the first lanes of a warp have a token's choices, and tell each other the scores.
__device__ __forceinline__ float finish_weight_of_lane(const Scoring& scoring, bool chosen, float logit, float score) {
  if (scoring.renormalize) {
    if (scoring.score_fn == ScoreFn::kSoftmax) {
      const float shift = softmax_shift(tile_max_nan<kAheadChoices>(logit));
      score = exp_nonpositive(__fadd_rn(logit, -shift));
    }
    if (!chosen) score = 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kAheadChoices; ++i) sum = __fadd_rn(sum, __shfl_sync(kFullWarp, score, i));
    score = divide(chosen ? score : 1.0f, renormalize_divisor(scoring, sum));  // as in finish_weight
  }
  return __fmul_rn(score, scoring.scale);
}

// Warp 0 has the choices, the other threads the experts.
template <class T>
__global__ void __launch_bounds__(kAheadThreads) route_at_ahead(const RouteAt op) {
  __shared__ float2 scored[kAheadExperts];  // scores and logits
  const int64_t token = blockIdx.x;
  const int j = static_cast<int>(threadIdx.x);
  const int64_t place = token * op.k + j;
  int expert = -1;
  if (j < 32) {
    if (j < op.k) {
      expert = load_expert(op, token, j);
      op.valid_ids[place] = expert;
    }
  } else {
    const RowScore score{op.scoring.score_fn};
    const T* row = static_cast<const T*>(op.logits) + token * op.experts;
#pragma unroll 1
    for (int e = j - 32; e < op.experts; e += static_cast<int>(blockDim.x) - 32) {
      const float logit = load_one(row + e);
      scored[e] = make_float2(score(logit), logit);
    }
  }
  float* weight_place = op.weights + place;
  asm("" : "+l"(weight_place));  // before the barrier, as nobody waits for it there
  __syncthreads();
  if (j >= 32) return;
  const float2 chosen = expert < 0 ? make_float2(0.0f, -INFINITY) : scored[expert];
  const float weight = finish_weight_of_lane(op.scoring, j < op.k, chosen.y, chosen.x);
  if (j >= op.k) return;
  *weight_place = expert < 0 ? 0.0f : weight;
  if (op.chosen_logits != nullptr) op.chosen_logits[place] = expert < 0 ? 0.0f : chosen.y;
}

template <class T>
__global__ void __launch_bounds__(kRouteAtThreads) route_at_rows(const RouteAt op, const bool quads) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kRouteAtThreads + threadIdx.x) / 32;
  if (token >= op.rows) return;
  const T* row = static_cast<const T*>(op.logits) + token * op.experts;
  const RowScore score = softmax_of_row(op.experts, [&](int e) { return load_quad_of_row(row, e, op.experts, quads); });
  for (int j = static_cast<int>(threadIdx.x & 31); j < op.k; j += 32) {
    const int expert = load_expert(op, token, j);
    const float logit = expert < 0 ? -INFINITY : load_one(row + expert);
    store_choice(op, token, j, expert, logit, __fmul_rn(score(logit), op.scoring.scale));
  }
}

}  // namespace

cudaError_t run(const RouteAt& op, const RouteAtPlan& plan, cudaStream_t stream) {
  return with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const bool quads = rows_have_quads(op.logits, op.experts, sizeof(T));
    switch (plan.kernel) {
      case RouteAtKernel::kAhead:
        return launch_kernel(route_at_ahead<T>, {plan.blocks, plan.threads}, stream, op);
      case RouteAtKernel::kChoices:
        return launch_kernel(route_at_choices<T>, {plan.blocks, dim3(op.k, plan.tokens)}, stream, op);
      case RouteAtKernel::kRows:
        return launch_kernel(route_at_rows<T>, {plan.blocks, kRouteAtThreads}, stream, op, quads);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace jax_router::cuda
