// combine: the weighted sum of the rows of its slots for each token.
//
// A block owns some columns of a token, or all those of a few, and a lane a piece of them: it loads that of eight slots
// before it adds the first one, in the order of the choices. Floor: a row read for each choice that has a slot, and
// tokens * hidden elements written.
#include "kernels.h"
#include "parts/launch.cuh"
#include "parts/pieces.cuh"

namespace jax_router::cuda {
namespace {

// A multiprocessor has as many blocks as leave each lane registers for eight pieces.
template <class P>
__global__ void __launch_bounds__(32 * kCombineWarps, (P::kElements > 1 ? 32 : 48) / kCombineWarps)
    combine_rows(const Combine op, const CombinePlan plan) {
  using Bits = typename P::Bits;
  const DispatchedRows& rows = op.rows;
  const auto [number, piece, is_there] = LaneOfRow(plan.row_blocks);
  if (!is_there) return;
  const Token token(rows, number, plan.problem_of(number));
  const bool inside = piece < plan.pieces;
  const Bits* from = static_cast<const Bits*>(op.y) + token.problem * plan.problem_pieces + (inside ? piece : 0);
  typename P::Floats sums = {};
  for (int first = 0; first < rows.k; first += 8) {
    Choices choices = token.choices(rows, op.weights, first);
    if (choices.slot < 0) choices.weight = -0.0f;  // times 0 it is -0, which changes no sum
    Bits held[8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int slot = choices.slot_of(i);
      const Bits* place = from + static_cast<uint64_t>(static_cast<uint32_t>(slot)) * plan.pieces;
      if (slot >= 0) held[i] = load_cached_piece(place);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float weight = choices.weight_of(i);
      typename P::Floats floats;
      P::unpack(held[i], floats);
#pragma unroll
      for (int e = 0; e < P::kElements; ++e) sums[e] = __fmaf_rn(weight, floats[e], sums[e]);
    }
  }
  if (inside) store_piece(static_cast<Bits*>(op.out) + token.row * plan.pieces + piece, P::pack(sums));
}

}  // namespace

cudaError_t run(const Combine& op, const CombinePlan& plan, cudaStream_t stream) {
  return with_piece(op.dtype, plan.wide, [&](auto piece) {
    return launch_kernel(combine_rows<decltype(piece)>, {plan.blocks, threads_of(plan.row_blocks)}, stream, op, plan);
  });
}

}  // namespace jax_router::cuda
