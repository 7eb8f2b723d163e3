// combine: the weighted sum of the rows of its slots for each token.
//
// A warp owns 32 pieces of a token's row, one a lane: it loads those of eight slots before it adds the first one, in
// the order of the choices. Floor: a row read for each choice that has a slot, and tokens * hidden elements written.
#include "kernels.h"
#include "parts/launch.cuh"
#include "parts/pieces.cuh"

namespace jax_router::cuda {
namespace {

template <class P>
__global__ void __launch_bounds__(32 * kMoveWarps) combine_rows(const Combine op, const CombinePlan plan) {
  using Bits = typename P::Bits;
  const DispatchedRows& rows = op.rows;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * plan.warps + threadIdx.x / 32;
  if (warp >= plan.token_warps) return;
  const Token token(rows, warp / plan.segments);
  const int64_t piece = (warp - token.row * plan.segments) * 32 + threadIdx.x % 32;
  const bool inside = piece < plan.pieces;
  const Bits* from = static_cast<const Bits*>(op.y) + piece;
  typename P::Floats sums = {};
  for (int first = 0; first < rows.k; first += 32) {
    const Choices choices = token.choices(rows, op.weights, first);
    const uint32_t have_slots = __ballot_sync(kFullWarp, choices.slot >= 0);
    for (int j = 0; j < 32 && first + j < rows.k; j += 8) {
      Bits held[8] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t row = token.slot_row(rows, choices.slot_of(j + i));
        if ((have_slots >> (j + i) & 1) != 0 && inside) held[i] = load_piece(from + row * plan.pieces);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float weight = choices.weight_of(j + i);
        if ((have_slots >> (j + i) & 1) == 0) continue;
        typename P::Floats floats;
        P::unpack(held[i], floats);
#pragma unroll
        for (int e = 0; e < P::kElements; ++e) sums[e] = __fmaf_rn(weight, floats[e], sums[e]);
      }
    }
  }
  if (inside) store_piece(static_cast<Bits*>(op.out) + token.row * plan.pieces + piece, P::pack(sums));
}

}  // namespace

cudaError_t run(const Combine& op, const CombinePlan& plan, cudaStream_t stream) {
  return with_piece(op.dtype, plan.wide, [&](auto piece) {
    return launch_kernel(combine_rows<decltype(piece)>, {plan.blocks, dim3(32 * plan.warps)}, stream, op, plan);
  });
}

}  // namespace jax_router::cuda
