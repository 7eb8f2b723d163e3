// combine_cotangent: the row of its token, weighted, to each slot, and the products of the two rows that meet there.
//
// Some warps of a block own a token. A lane has a piece of grad's row at a time, loads those of four slots of y,
// multiplies the two, and stores the first one, weighted, to these slots; the products are summed over the warp and
// then over the warps, in an order that depends on the length of a row alone. Where there are few tokens, the warps own
// one choice instead, and a lane has two pieces of both rows at a time. Where several choices of a token are in one
// slot, as a dispatch made by hand may have it, the row of the last one stays. Blocks behind those clear the rows of
// the slots that no choice is in, as in permute. Floor: tokens * hidden elements read, a row read for each choice that
// has a slot, and slots * hidden written.
#include "kernels.h"
#include "parts/launch.cuh"
#include "parts/pieces.cuh"

namespace jax_router::cuda {
namespace {

// What blocks behind those of the tokens do.
template <class Bits>
__device__ __forceinline__ void clear_behind(const DispatchedRows& rows, const CombineCotangentPlan& plan,
                                             Bits* grad_y) {
  const int64_t block = blockIdx.x - plan.token_blocks;
  clear_unused(rows, (block * plan.tokens + threadIdx.y) * plan.warps + threadIdx.x / 32, plan.pieces, grad_y);
}

// blockDim: (the lanes of a token, tokens). A multiprocessor has as many blocks as leave each lane registers for its
// pieces.
template <class P>
__global__ void __launch_bounds__(32 * kMoveWarps, P::kElements > 1 ? 3 : 4)
    combine_cotangent_tokens(const CombineCotangent op, const CombineCotangentPlan plan) {
  using Bits = typename P::Bits;
  const DispatchedRows& rows = op.rows;
  Bits* grad_y = static_cast<Bits*>(op.grad_y);
  if (blockIdx.x >= plan.token_blocks) return clear_behind(rows, plan, grad_y);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * plan.tokens + threadIdx.y;
  const bool is_there = number < rows.token_rows();
  const Token token(rows, is_there ? number : 0);

  // All lanes of a warp come along to the end of the row. Unsigned: a row may have almost 2^31 pieces.
  const uint32_t lane = threadIdx.x % 32, end = is_there ? plan.pieces : 0;
  const Bits* row = static_cast<const Bits*>(op.grad) + token.row * plan.pieces;
  uint32_t piece = threadIdx.x;
  Bits of_grad = piece < end ? load_piece(row + piece) : Bits{};  // on its way while slots are looked up

  Choices all[2];
  uint32_t here[2];  // which of them have slots
  bool is_mine[2];   // whether this lane's has it for itself
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    all[h] = token.choices(rows, op.weights, 32 * h);
    const bool is_here = is_there && all[h].slot >= 0;
    here[h] = __ballot_sync(kFullWarp, is_here);
    is_mine[h] = is_here && lies_in(rows, token.problem, token.number, all[h].slot);
  }
  ChoiceProducts sums;
  while (piece - lane < end) {
    const bool inside = piece < end;
    typename P::Floats grad;
    P::unpack(of_grad, grad);
    for (int eight = 0; 8 * eight < rows.k; ++eight) {
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
        const uint32_t are_mine = __ballot_sync(kFullWarp, low ? is_mine[0] : is_mine[1]) >> j;
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
  sums.store(threadIdx.y * plan.warps, plan.warps, is_there ? rows.k : 0, op.grad_weights + token.row * rows.k);
}

// Of how many pieces a lane loads both rows before it multiplies the first.
constexpr int kHeldPieces = 2;

// blockDim: (the lanes of a choice, choices). The same sums in the same order.
template <class P>
__global__ void __launch_bounds__(32 * kMoveWarps, kChoiceBlocks)
    combine_cotangent_choices(const CombineCotangent op, const CombineCotangentPlan plan) {
  using Bits = typename P::Bits;
  const DispatchedRows& rows = op.rows;
  Bits* grad_y = static_cast<Bits*>(op.grad_y);
  if (blockIdx.x >= plan.token_blocks) return clear_behind(rows, plan, grad_y);
  const uint32_t number = blockIdx.x * plan.tokens + threadIdx.y;
  const bool is_there = number < plan.choices;
  const uint32_t choice = is_there ? number : 0;
  const Token token(rows, plan.token_of(choice));
  const int slot = __ldg(rows.slot + choice);
  const bool has_slot = slot >= 0 && slot < rows.slots;
  const int64_t slot_row = token.slot_row(rows, has_slot ? slot : 0);
  const float weight = __ldg(op.weights + choice);
  const Bits* of_grad = static_cast<const Bits*>(op.grad) + token.row * plan.pieces;
  const Bits* of_y = static_cast<const Bits*>(op.y) + slot_row * plan.pieces;

  const uint32_t lane = threadIdx.x % 32, step = 32 * plan.warps, end = is_there ? plan.pieces : 0;
  float total = 0.0f;
  bool is_mine = false;
  for (uint32_t first = threadIdx.x; first - lane < end; first += kHeldPieces * step) {
    Bits held[2][kHeldPieces] = {};  // of grad and of y
#pragma unroll
    for (int i = 0; i < kHeldPieces; ++i) {
      if (first + i * step < end) held[0][i] = load_piece(of_grad + first + i * step);
    }
#pragma unroll
    for (int i = 0; i < kHeldPieces; ++i) {
      if (first + i * step < end && has_slot) held[1][i] = load_piece<Reuse::kNoBlock>(of_y + first + i * step);
    }
    if (first < step && has_slot) {  // a later choice in the same slot stores there
      const int owner = token.owner_of(rows, slot);
      bool is_later = false;
      for (int64_t other = choice + 1 + lane; other < (token.row + 1) * rows.k; other += 32) {
        is_later |= __ldg(rows.slot + other) == slot;
      }
      is_mine = !__any_sync(kFullWarp, is_later) && owner == static_cast<int>(token.number);
    }
#pragma unroll
    for (int i = 0; i < kHeldPieces; ++i) {
      const uint32_t piece = first + i * step;
      if (piece - lane >= end) break;
      typename P::Floats grad, y;
      P::unpack(held[0][i], grad);
      P::unpack(held[1][i], y);
      float product = 0.0f;
#pragma unroll
      for (int e = 0; e < P::kElements; ++e) product = __fmaf_rn(grad[e], y[e], product);
      total = __fadd_rn(total, sum_over_warp(product));
      if (is_mine && piece < end) store_piece(grad_y + slot_row * plan.pieces + piece, P::scale(weight, grad));
    }
  }
  __shared__ float totals[kMoveWarps];
  const uint32_t first_warp = threadIdx.y * plan.warps;
  if (lane == 0) totals[first_warp + threadIdx.x / 32] = has_slot ? total : 0.0f;
  __syncthreads();
  if (threadIdx.x != 0 || !is_there) return;
  float sum = totals[first_warp];
  for (int warp = 1; warp < plan.warps; ++warp) sum = __fadd_rn(sum, totals[first_warp + warp]);
  op.grad_weights[choice] = sum;
}

}  // namespace

cudaError_t run(const CombineCotangent& op, const CombineCotangentPlan& plan, cudaStream_t stream) {
  return with_piece(op.dtype, plan.wide, [&](auto piece) {
    using P = decltype(piece);
    const auto kernel = plan.apart ? combine_cotangent_choices<P> : combine_cotangent_tokens<P>;
    const dim3 threads(32 * plan.warps, plan.tokens);
    return launch_kernel(kernel, {plan.blocks, threads}, stream, op, plan);
  });
}

}  // namespace jax_router::cuda
