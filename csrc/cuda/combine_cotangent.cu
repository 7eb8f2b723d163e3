// combine_cotangent: the row of its token, weighted, to each slot, and the products of the two rows that meet there.
//
// Some warps of a block own a token, or where there are few tokens one choice of it. A lane has a piece of grad's row
// at a time, loads those of four slots of y, multiplies the two, and stores the first one, weighted, to these slots;
// the products are summed over the warp and then over the warps, in an order that depends on the length of a row alone.
// Where several choices of a token are in one slot, as a dispatch made by hand may have it, the row of the last one
// stays. Blocks behind those clear the rows of the slots that no choice is in, as in permute. Floor: tokens * hidden
// elements read, a row read for each choice that has a slot, and slots * hidden written.
#include "kernels.h"
#include "parts/launch.cuh"
#include "parts/pieces.cuh"

namespace jax_router::cuda {
namespace {

// blockDim: (the lanes of a token, tokens), or choices in the place of tokens where these are apart. A multiprocessor
// has as many blocks as leave each lane registers for its pieces.
template <class P, bool kApart>
__global__ void __launch_bounds__(32 * kMoveWarps, P::kElements > 1 ? 3 : 4)
    combine_cotangent_rows(const CombineCotangent op, const CombineCotangentPlan plan) {
  using Bits = typename P::Bits;
  const DispatchedRows& rows = op.rows;
  Bits* grad_y = static_cast<Bits*>(op.grad_y);
  if (blockIdx.x >= plan.token_blocks) {
    const int64_t block = blockIdx.x - plan.token_blocks;
    const int64_t warp = (block * plan.tokens + threadIdx.y) * plan.warps + threadIdx.x / 32;
    return clear_unused(rows, warp, plan.pieces, grad_y);
  }
  const int64_t number = static_cast<int64_t>(blockIdx.x) * plan.tokens + threadIdx.y;
  const int parts = kApart ? rows.k : 1;  // of a token
  const bool is_there = number < rows.token_rows() * parts;
  const Token token(rows, is_there ? number / parts : 0);
  const int first_choice = kApart ? static_cast<int>(number - token.row * parts) : 0;
  const int last_choice = !is_there ? first_choice : kApart ? first_choice + 1 : rows.k;

  // All lanes of a warp come along to the end of the row. Unsigned: a row may have almost 2^31 pieces.
  const uint32_t lane = threadIdx.x % 32, end = is_there ? plan.pieces : 0;
  const Bits* row = static_cast<const Bits*>(op.grad) + token.row * plan.pieces;
  uint32_t piece = threadIdx.x;
  Bits of_grad = piece < end ? load_piece(row + piece) : Bits{};  // on its way while slots are looked up

  Choices all[2];
  uint32_t here[2];  // which of them have slots
  bool is_mine[2];   // whether this lane's has it for itself
  int owner[2];      // where choices are apart, whose it is: few stores wait for that, and loads do not
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    all[h] = token.choices(rows, op.weights, 32 * h);
    const int j = 32 * h + static_cast<int>(threadIdx.x % 32);
    const bool is_here = all[h].slot >= 0 && j >= first_choice && j < last_choice;
    here[h] = __ballot_sync(kFullWarp, is_here);
    if constexpr (kApart) {
      owner[h] = token.owner_of(rows, all[h].slot);
    } else {
      is_mine[h] = is_here && lies_in(rows, token.problem, token.number, all[h].slot);
    }
  }
  ChoiceProducts sums;
  while (piece - lane < end) {
    const bool inside = piece < end;
    typename P::Floats grad;
    P::unpack(of_grad, grad);
    for (int eight = first_choice / 8; 8 * eight < last_choice; ++eight) {
      const bool low = eight < 4;
      const Choices choices = low ? all[0] : all[1];
      const int j = 8 * (eight % 4);
      const uint32_t have_slots = (low ? here[0] : here[1]) >> j;
      float products[8] = {};
#pragma unroll
      for (int half = 0; half < 8; half += kHeldRows) {
        Bits held[kHeldRows] = {};
#pragma unroll
        for (int i = half; i < half + kHeldRows; ++i) {
          const int64_t at = token.slot_row(rows, choices.slot_of(j + i)) * plan.pieces + piece;
          if ((have_slots >> i & 1) != 0 && inside)
            held[i - half] = load_piece<Reuse::kNoBlock>(static_cast<const Bits*>(op.y) + at);
        }
        if constexpr (kApart) is_mine[0] = (low ? owner[0] : owner[1]) == static_cast<int>(token.number);
        uint32_t are_mine = __ballot_sync(kFullWarp, kApart || low ? is_mine[0] : is_mine[1]) >> j;
        if constexpr (kApart) {  // the block of a later choice in the same slot stores there
          const int slot = choices.slot_of(first_choice), number = static_cast<int>(lane);
          const bool is_later =
              (all[0].slot == slot && number > first_choice) || (all[1].slot == slot && number + 32 > first_choice);
          if (__any_sync(kFullWarp, is_later)) are_mine = 0;
        }
#pragma unroll
        for (int i = half; i < half + kHeldRows; ++i) {
          const int64_t at = token.slot_row(rows, choices.slot_of(j + i)) * plan.pieces + piece;
          const float weight = choices.weight_of(j + i);
          if ((have_slots >> i & 1) == 0) continue;
          typename P::Floats y;
          P::unpack(held[i - half], y);
#pragma unroll
          for (int e = 0; e < P::kElements; ++e) products[i] = __fmaf_rn(grad[e], y[e], products[i]);
          if ((are_mine >> i & 1) != 0 && inside) store_piece(grad_y + at, P::scale(weight, grad));
        }
      }
      sums.add(eight, products);
    }
    piece += 32 * plan.warps;
    of_grad = piece < end ? load_piece(row + piece) : Bits{};
  }
  sums.store(threadIdx.y * plan.warps, plan.warps, first_choice, last_choice, op.grad_weights + token.row * rows.k);
}

}  // namespace

cudaError_t run(const CombineCotangent& op, const CombineCotangentPlan& plan, cudaStream_t stream) {
  return with_piece(op.dtype, plan.wide, [&](auto piece) {
    using P = decltype(piece);
    const auto kernel = plan.apart ? combine_cotangent_rows<P, true> : combine_cotangent_rows<P, false>;
    const dim3 threads(32 * plan.warps, plan.tokens);
    return launch_kernel(kernel, {plan.blocks, threads}, stream, op, plan);
  });
}

}  // namespace jax_router::cuda
