// permute_cotangent: the weighted sum of the rows of its slots for each token, and their products with the token's row.
//
// Some warps of a block own a token. A lane has a piece of its row at a time, loads those of four slots, adds them up
// and multiplies them with its own; the products are summed over the warp and then over the warps, in an order that
// depends on the length of a row alone. Floor: a row read for each choice that has a slot, and tokens * hidden elements
// read and written.
#include "kernels.h"
#include "parts/launch.cuh"
#include "parts/pieces.cuh"

namespace jax_router::cuda {
namespace {

// blockDim: (the lanes of a token, tokens).
template <class P>
__global__ void __launch_bounds__(32 * kMoveWarps)
    permute_cotangent_rows(const PermuteCotangent op, const PermuteCotangentPlan plan) {
  using Bits = typename P::Bits;
  const DispatchedRows& rows = op.rows;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * plan.tokens + threadIdx.y;
  const bool is_there = number < rows.token_rows();
  const Token token(rows, is_there ? number : 0);
  const Choices all[2] = {token.choices(rows, op.weights, 0), token.choices(rows, op.weights, 32)};
  ChoiceProducts sums;
  const Bits* grad = static_cast<const Bits*>(op.grad);
  const int64_t first = token.row * plan.pieces;
  // All lanes of a warp come along to the end of the row. Unsigned: a row may have almost 2^31 pieces.
  const uint32_t lane = threadIdx.x % 32, end = is_there ? plan.pieces : 0;
  for (uint32_t piece = threadIdx.x; piece - lane < end; piece += 32 * plan.warps) {
    const bool inside = piece < end;
    typename P::Floats x, grad_x = {};
    P::unpack(inside ? load_piece(static_cast<const Bits*>(op.x) + first + piece) : Bits{}, x);
    for (int eight = 0; 8 * eight < rows.k; ++eight) {
      const Choices choices = eight < 4 ? all[0] : all[1];
      const int first_choice = 8 * (eight % 4);  // of these
      const uint32_t have_slots = __ballot_sync(kFullWarp, choices.slot >= 0);
      float products[8] = {};
#pragma unroll
      for (int half = 0; half < 8; half += kHeldRows) {
        Bits held[kHeldRows] = {};
#pragma unroll
        for (int i = 0; i < kHeldRows; ++i) {
          const int choice = first_choice + half + i;
          const int64_t row = token.slot_row(rows, choices.slot_of(choice));
          if ((have_slots >> choice & 1) != 0 && inside) held[i] = load_piece(grad + row * plan.pieces + piece);
        }
#pragma unroll
        for (int i = 0; i < kHeldRows; ++i) {
          const int choice = first_choice + half + i;
          const float weight = choices.weight_of(choice);
          if ((have_slots >> choice & 1) == 0) continue;
          typename P::Floats floats;
          P::unpack(held[i], floats);
#pragma unroll
          for (int e = 0; e < P::kElements; ++e) {
            grad_x[e] = __fmaf_rn(weight, floats[e], grad_x[e]);
            products[half + i] = __fmaf_rn(x[e], floats[e], products[half + i]);
          }
        }
      }
      sums.add(eight, products);
    }
    if (inside) store_piece(static_cast<Bits*>(op.grad_x) + first + piece, P::pack(grad_x));
  }
  sums.store(threadIdx.y * plan.warps, plan.warps, is_there ? rows.k : 0, op.grad_weights + token.row * rows.k);
}

}  // namespace

cudaError_t run(const PermuteCotangent& op, const PermuteCotangentPlan& plan, cudaStream_t stream) {
  return with_piece(op.dtype, plan.wide, [&](auto piece) {
    const dim3 threads(32 * plan.warps, plan.tokens);
    return launch_kernel(permute_cotangent_rows<decltype(piece)>, {plan.blocks, threads}, stream, op, plan);
  });
}

}  // namespace jax_router::cuda
