// permute: the rows of tokens to the slots of their choices.
//
// A warp owns a segment of a token's row: it loads that once, 16 bytes a lane and up to four at a time, and stores it
// to each slot of the token, so that every access of a warp is to 512 bytes in a row. Warps behind those look at a few
// slots each, and clear the rows of those that no choice is in. A slot has one owner: the token that it names, if that
// names the slot too, and else the warp that looks. If several of its choices do, the last one's row stays. Floor:
// tokens * hidden elements read, and slots * hidden written.
//
// Where there are few slots, a block owns a part of a slot's row, or those of a few slots, and looks up whose it is:
// then a store waits for two loads, and for no other store.
#include "kernels.h"
#include "parts/launch.cuh"
#include "parts/pieces.cuh"

namespace jax_router::cuda {
namespace {

// What is stored of a piece: the bits that were loaded.
template <int kBytes>
struct Copy {
  using Bits = BitsOf<kBytes>;
  static constexpr bool kHasWeight = false;
  __device__ __forceinline__ explicit Copy(const Bits& bits) : bits(bits) {}
  __device__ __forceinline__ Bits weighed(float) const { return bits; }
  Bits bits;
};

// Or its elements times a weight.
template <class P>
struct Weighted {
  using Bits = typename P::Bits;
  static constexpr bool kHasWeight = true;
  __device__ __forceinline__ explicit Weighted(const Bits& bits) : bits(bits) {}
  __device__ __forceinline__ Bits weighed(float weight) const {
    typename P::Floats floats;
    P::unpack(bits, floats);
    return P::scale(weight, floats);
  }
  Bits bits;
};

// Warps own tokens.
template <class Content, int kDepth>
__global__ void __launch_bounds__(32 * kMoveWarps) permute_tokens(const Permute op, const PermutePlan plan) {
  using Bits = typename Content::Bits;
  const DispatchedRows& rows = op.rows;
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * plan.warps + threadIdx.x / 32;
  Bits* out = static_cast<Bits*>(op.out);
  if (warp >= plan.token_warps) return clear_unused(rows, warp - plan.token_warps, plan.pieces, out);
  const Token token(rows, warp / plan.segments);
  const int64_t first = (warp - token.row * plan.segments) * (32 * kDepth) + lane;
  const Bits* row = static_cast<const Bits*>(op.x) + token.row * plan.pieces;
  Bits held[kDepth] = {};
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    if (first + 32 * i < plan.pieces) held[i] = load_piece(row + first + 32 * i);
  }
  for (int j = 0; j < rows.k; j += 32) {
    const Choices choices = token.choices(rows, op.weights, j);
    const int owner = token.owner_of(rows, choices.slot);
    for (uint32_t left = __ballot_sync(kFullWarp, owner == static_cast<int>(token.number)); left != 0;
         left &= left - 1) {
      const int choice = __ffs(static_cast<int>(left)) - 1;
      Bits* to = out + token.slot_row(rows, choices.slot_of(choice)) * plan.pieces;
      const float weight = choices.weight_of(choice);
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        if (first + 32 * i < plan.pieces) store_piece(to + first + 32 * i, Content(held[i]).weighed(weight));
      }
    }
  }
}

// Or slots. No jump stands before the loads: what the kernel reads of its arguments then comes all at once.
template <class Content>
__global__ void __launch_bounds__(32 * kMoveWarps) permute_slots(const Permute op, const PermutePlan plan) {
  using Bits = typename Content::Bits;
  const DispatchedRows& rows = op.rows;
  const auto [any_row, piece, is_there] = LaneOfRow(plan.slots);
  const uint32_t slot_row = is_there ? any_row : 0;
  const bool inside = is_there && piece < plan.pieces;
  const int64_t problem = plan.problem_of(slot_row);
  const int slot = static_cast<int>(slot_row - problem * rows.slots), lane = threadIdx.x % 32;
  // The lane's piece and choice of the problem's first token, from where it is one instruction to any other token's.
  const int64_t first_token = problem * rows.tokens;
  const char* from = static_cast<const char*>(op.x) + first_token * plan.row_bytes + int64_t{piece} * sizeof(Bits);
  const int32_t* choice = rows.slot + first_token * rows.k + lane;
  asm volatile("" : "+l"(from), "+l"(choice));

  const int number = __ldg(rows.token_index + slot_row);
  const bool has_token = number >= 0 && number < rows.tokens;
  const uint64_t token = static_cast<uint32_t>(number);
  Bits held = {};
  if (inside && has_token) held = load_piece(reinterpret_cast<const Bits*>(from + token * plan.row_bytes));
  choice += token * static_cast<uint32_t>(rows.k);
  bool is_in_use = false;
  float weight = 1.0f;
#pragma unroll 1
  for (int j = 0; j < rows.k; j += 32) {
    const bool is_choice = has_token && j + lane < rows.k;
    float of_choice = 1.0f;
    if (Content::kHasWeight && is_choice) of_choice = __ldg(op.weights + (first_token + number) * rows.k + j + lane);
    const uint32_t here = __ballot_sync(kFullWarp, is_choice && __ldg(choice + j) == slot);
    if (here == 0) continue;
    is_in_use = true;
    if constexpr (Content::kHasWeight) {
      weight = __shfl_sync(kFullWarp, of_choice, 31 - __clz(static_cast<int>(here)));
    }
  }
  held = is_in_use ? Content(held).weighed(weight) : Bits{};
  if (inside) store_piece(static_cast<Bits*>(op.out) + int64_t{slot_row} * plan.pieces + piece, held);
}

template <class Content>
cudaError_t launch_permute(const Permute& op, const PermutePlan& plan, cudaStream_t stream) {
  const auto kernel = plan.depth == 4   ? permute_tokens<Content, 4>
                      : plan.depth == 2 ? permute_tokens<Content, 2>
                      : plan.depth == 1 ? permute_tokens<Content, 1>
                                        : permute_slots<Content>;
  const dim3 threads = plan.depth == kOfOneSlot ? threads_of(plan.slots) : dim3(32 * plan.warps);
  return launch_kernel(kernel, {plan.blocks, threads}, stream, op, plan);
}

}  // namespace

cudaError_t run(const Permute& op, const PermutePlan& plan, cudaStream_t stream) {
  if (op.weights != nullptr) {
    return with_piece(op.dtype, plan.wide,
                      [&](auto piece) { return launch_permute<Weighted<decltype(piece)>>(op, plan, stream); });
  }
  if (plan.wide) return launch_permute<Copy<kPieceBytes>>(op, plan, stream);
  if (op.element_bytes == 4) return launch_permute<Copy<4>>(op, plan, stream);
  if (op.element_bytes == 2) return launch_permute<Copy<2>>(op, plan, stream);
  return launch_permute<Copy<1>>(op, plan, stream);
}

}  // namespace jax_router::cuda
