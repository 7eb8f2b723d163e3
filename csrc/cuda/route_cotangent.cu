// route_cotangent: the gradient of the weights with respect to the logits, a dense row that is zero but at k places.
//
// A warp owns 4 rows (k <= 8) or one (k <= 64). It holds the rows' choices in registers, sets their gradients in a
// stretch of zeros in shared memory, and copies that out with full-width stores, stretch by stretch: each result is
// written once. Rows with more choices or more experts than a router's (plain top-k's gradient) are cut into stretches
// with one thread block each.
// Parts in bf16 are written as words, which take the way of f32 numbers.
// Floor: rows * experts * sizeof(gradient) + 12 k rows bytes; softmax without renormalisation reads the logits too.
#include <type_traits>

#include "kernels.h"
#include "parts/cotangent.cuh"
#include "parts/dtype.cuh"
#include "parts/launch.cuh"
#include "parts/row_score.cuh"
#include "parts/tile.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kThreads = 32 * kCotangentWarps;

// 16 bytes of gradient from as many f32 values in shared memory.
__device__ __forceinline__ void store_vector(float* p, const float* values) {
  __stcs(reinterpret_cast<float4*>(p), *reinterpret_cast<const float4*>(values));
}
template <class T>
__device__ __forceinline__ void store_vector(T* p, const float* values) {
  const float4 a = *reinterpret_cast<const float4*>(values);
  const float4 b = *reinterpret_cast<const float4*>(values + 4);
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(pack_two(a.x, a.y, T{}), pack_two(a.z, a.w, T{}),
                                                 pack_two(b.x, b.y, T{}), pack_two(b.z, b.w, T{})));
}

// Copies `count` values of shared memory to p, by the `threads` threads whose own numbers are `thread`.
template <class T>
__device__ __forceinline__ void store_stretch(T* p, const float* values, int count, int thread, int threads) {
  constexpr int kWidth = 16 / sizeof(T);
  if (count % kWidth == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll 4
    for (int i = thread * kWidth; i < count; i += threads * kWidth) store_vector(p + i, values + i);
  } else {
    for (int i = thread; i < count; i += threads) store_one(p + i, values[i]);
  }
}

// kLanes lanes hold a row's choices, kHeld each.
template <class T, int kLanes, int kHeld, bool kWholeRow>
__global__ void __launch_bounds__(kThreads) route_cotangent_rows(const RouteCotangent op, const bool quads) {
  constexpr int kRows = 32 / kLanes;
  constexpr int kRowStretch = kCotangentStretch / kRows;
  static_assert(!kWholeRow || kRows == 1);
  __shared__ __align__(16) float shared[kCotangentWarps][kCotangentStretch];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_lane = static_cast<int>(threadIdx.x) & 31;
  const int lane = tile_lane<kLanes>();
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * kCotangentWarps + warp) * kRows;
  if (first_row >= op.rows) return;
  const int rows = static_cast<int>(min(op.rows - first_row, static_cast<int64_t>(kRows)));
  const int own_row = warp_lane / kLanes;

  int ids[kHeld];
  float grads[kHeld];
  float logits[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int j = h * kLanes + lane;
    ids[h] = -1;
    grads[h] = 0.0f;
    logits[h] = 0.0f;
    if (j < op.k && own_row < rows) {
      const int64_t place = (first_row + own_row) * op.k + j;
      ids[h] = __ldg(op.expert_ids + place);
      grads[h] = __ldg(op.grad_weights + place);
      if (!kWholeRow && op.residual != nullptr) logits[h] = __ldg(static_cast<const float*>(op.residual) + place);
      if (static_cast<uint32_t>(ids[h]) >= static_cast<uint32_t>(op.experts)) ids[h] = -1;
    }
  }

  // While the choices are on their way.
  float* const zeros = shared[warp];
  for (int i = 4 * warp_lane; i < kCotangentStretch; i += 128) {
    *reinterpret_cast<float4*>(zeros + i) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  // values: what is added at the chosen experts; for a whole row they are still grad, to be combined when copied out.
  float values[kHeld];
  RowScore score{op.scoring.score_fn};
  float mean = 0.0f;
  const T* row_logits = nullptr;
  bool chosen = false;  // a row without a valid choice, a masked one say, may hold anything and has no gradient
  if constexpr (kWholeRow) {
    row_logits = static_cast<const T*>(op.residual) + first_row * op.experts;
    score = softmax_of_row(op.experts, [&](int e) { return load_quad_of_row(row_logits, e, op.experts, quads); });
    float terms[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      values[h] = grads[h];
      terms[h] = ids[h] < 0 ? 0.0f : __fmul_rn(grads[h], score(load_one(row_logits + ids[h])));
      chosen |= ids[h] >= 0;
    }
    chosen = __any_sync(kFullWarp, chosen);
    mean = sum_over_choices<kLanes>(terms, op.k);
  } else {
    differentiate<kLanes>(op.scoring, op.k, ids, logits, grads, values);
    if (op.grad_chosen != nullptr && own_row < rows) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int j = h * kLanes + lane;
        if (j < op.k) op.grad_chosen[(first_row + own_row) * op.k + j] = values[h];
      }
    }
  }
  merge_equal_ids<kLanes>(op.k, ids, values);
  if (std::is_same_v<T, float> && op.in_parts) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) values[h] = bits_float(bf16_parts(values[h]));
  }

  __syncwarp();
  T* const out = static_cast<T*>(op.grad_logits) + first_row * op.experts;
  for (int begin = 0; begin < op.experts; begin += kRowStretch) {
    const int length = min(op.experts - begin, kRowStretch);
    const auto place = [&](int h) { return ids[h] >= begin && ids[h] < begin + length ? ids[h] - begin : -1; };
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (place(h) >= 0) zeros[own_row * length + place(h)] = values[h];
    }
    __syncwarp();
    if constexpr (kWholeRow) {
      for (int i = warp_lane; i < length; i += 32) {
        const float p = __fmul_rn(op.scoring.scale, score(load_one(row_logits + begin + i)));
        store_one(out + begin + i, chosen ? __fmul_rn(p, __fadd_rn(zeros[i], -mean)) : 0.0f);
      }
    } else if (length == op.experts) {
      store_stretch(out, zeros, rows * length, warp_lane, 32);
    } else {
      for (int r = 0; r < rows; ++r) {
        store_stretch(out + static_cast<int64_t>(r) * op.experts + begin, zeros + r * length, length, warp_lane, 32);
      }
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (place(h) >= 0) zeros[own_row * length + place(h)] = 0.0f;
    }
    __syncwarp();
  }
}

// Any number of choices of a row, each with a gradient of its own. blockIdx.x: row * stretches + stretch.
template <class T>
__global__ void __launch_bounds__(kLongCotangentThreads)
    route_cotangent_stretches(const RouteCotangent op, const int stretches) {
  __shared__ __align__(16) float sums[kLongCotangentStretch];
  __shared__ int owners[kLongCotangentStretch];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x / stretches;
  const int begin = static_cast<int>(blockIdx.x % stretches) * kLongCotangentStretch;
  const int length = min(op.experts - begin, kLongCotangentStretch);
  for (int i = thread; i < kLongCotangentStretch; i += kLongCotangentThreads) {
    sums[i] = 0.0f;
    owners[i] = kLongCotangentThreads;
  }
  __syncthreads();
  for (int first = 0; first < op.k; first += kLongCotangentThreads) {
    const int j = first + thread;
    const int64_t place = row * op.k + j;
    const int i = j < op.k ? __ldg(op.expert_ids + place) - begin : -1;
    bool pending = i >= 0 && i < length;
    // Equal ids add up in their order: in each round the first of those that are left.
    while (__syncthreads_or(pending)) {
      if (pending) atomicMin(owners + i, thread);
      __syncthreads();
      const bool first_of_equals = pending && owners[i] == thread;
      __syncthreads();
      if (first_of_equals) {
        const float logit = op.residual == nullptr ? 0.0f : __ldg(static_cast<const float*>(op.residual) + place);
        const float slope = __fmul_rn(op.scoring.scale, __ldg(op.grad_weights + place));
        sums[i] = __fadd_rn(sums[i], __fmul_rn(slope, score_derivative(op.scoring.score_fn, logit)));
        owners[i] = kLongCotangentThreads;
        pending = false;
      }
    }
  }
  store_stretch(static_cast<T*>(op.grad_logits) + row * op.experts + begin, sums, length, thread,
                kLongCotangentThreads);
}

}  // namespace

cudaError_t run(const RouteCotangent& op, const RouteCotangentPlan& plan, cudaStream_t stream) {
  return with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const LaunchShape shape{plan.blocks, plan.threads};
    switch (plan.kernel) {
      case CotangentKernel::kFewChoices:
        return launch_kernel(route_cotangent_rows<T, kFewChoiceLanes, 1, false>, shape, stream, op, false);
      case CotangentKernel::kChoices:
        return launch_kernel(route_cotangent_rows<T, 32, kMaxTopK / 32, false>, shape, stream, op, false);
      case CotangentKernel::kWholeRow: {
        const bool quads = rows_have_quads(op.residual, op.experts, sizeof(T));
        return launch_kernel(route_cotangent_rows<T, 32, kMaxTopK / 32, true>, shape, stream, op, quads);
      }
      case CotangentKernel::kStretches:
        return launch_kernel(route_cotangent_stretches<T>, shape, stream, op, plan.stretches);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace jax_router::cuda
