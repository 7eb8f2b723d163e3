// combine: the weighted sum of the rows of its slots for each token.
//
// A block owns some columns of a token, or all those of a few, and a lane a piece of them: it loads that of eight slots
// before it adds the first one, in the order of the choices. Floor: a row read for each choice that has a slot, and
// tokens * hidden elements written.
//
// Where many tokens share few rows, a block has 32 pieces of all rows in shared memory, and each warp the choices of
// some tokens of a batch, which it adds up without waiting for the others. Floor: tokens * hidden elements written.
#include "kernels.h"
#include "parts/async_copy.cuh"
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
      if (slot >= 0) held[i] = load_piece<Reuse::kThroughL1>(place);
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

// A block owns some of the pairs of a segment and a batch, which are numbered segment by segment. Where tokens have
// more than a few choices the instructions bound it, more than half of which unpack elements and add them up.
template <class P>
__global__ void __launch_bounds__(kTableThreads) combine_from_table(const Combine op, const CombinePlan plan) {
  using Bits = typename P::Bits;
  extern __shared__ __align__(16) char shared_memory[];
  const DispatchedRows& rows = op.rows;
  constexpr uint32_t kWarps = kTableThreads / 32;
  constexpr uint32_t kTokens = kTableTokens / kWarps;  // of a warp in a batch
  constexpr uint32_t kAtOnce = 2;                      // whose sums do not wait for each other
  const uint32_t slots = static_cast<uint32_t>(rows.slots), k = static_cast<uint32_t>(rows.k);
  const uint32_t words = (k + 1) / 2;  // of a token's choices
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t batches = static_cast<uint32_t>(plan.batches);
  const uint32_t tokens_of_last = static_cast<uint32_t>(rows.tokens - int64_t{batches - 1} * kTableTokens);

  // In shared memory lie the table, [slots + 1][32] pieces, and the choices of two batches in turn, [2][kTableTokens /
  // kAtOnce][words][kAtOnce] words of these: bytes to the row, weight; and again. By their distance in bytes:
  const uint32_t first_choice = (slots + 1) * 32 * sizeof(uint4), half = kTableTokens * words * sizeof(uint4);
  const char* const column = shared_memory + lane * sizeof(uint4);

  // A thread moves every eighth choice of a token to shared memory, by way of registers; a warp, those of the tokens
  // that it adds up.
  constexpr uint32_t kMovers = kTableThreads / kTableTokens, kMoved = kTableChoices / kMovers;
  const uint32_t token_moved = threadIdx.x / kMovers, mover = threadIdx.x % kMovers;
  int own_choices = static_cast<int>(k) - static_cast<int>(mover);  // of the thread's token, from its first one on
  int own_in_last = token_moved < tokens_of_last ? own_choices : 0;
  int slot[kMoved];
  float weight[kMoved];
  const auto load_choices = [&](int64_t from, int own) {
#pragma unroll
    for (uint32_t i = 0; i < kMoved; ++i) {
      if (i * kMovers >= k) break;
      slot[i] = -1;
      if (own <= static_cast<int>(i * kMovers)) continue;
      slot[i] = __ldg(rows.slot + from + i * kMovers);
      weight[i] = op.weights == nullptr ? 1.0f : __ldg(op.weights + from + i * kMovers);
    }
  };
  int own_places = static_cast<int>(2 * words) - static_cast<int>(mover);
  // A choice without a slot adds 0 * -0, which changes no sum.
  const auto store_choices = [&](uint32_t to) {
#pragma unroll
    for (uint32_t i = 0; i < kMoved; ++i) {
      if (i * kMovers >= k) break;
      if (own_places <= static_cast<int>(i * kMovers)) continue;
      const bool has_slot = static_cast<uint32_t>(slot[i]) < slots;
      *reinterpret_cast<uint2*>(shared_memory + to + i * kMovers / 2 * kAtOnce * sizeof(uint4)) =
          make_uint2((has_slot ? slot[i] : slots) * 32 * sizeof(uint4), has_slot ? float_bits(weight[i]) : 0);
    }
  };
  const uint32_t token_to =
      first_choice + ((token_moved / kAtOnce * words + mover / 2) * kAtOnce + token_moved % kAtOnce) * sizeof(uint4) +
      mover % 2 * sizeof(uint2);
  if (warp == 0) *reinterpret_cast<Bits*>(shared_memory + (slots * 32 + lane) * sizeof(uint4)) = P::pack_all(-0.0f);

  const int64_t pairs = plan.segments * plan.batches;
  const uint32_t last = static_cast<uint32_t>((blockIdx.x + 1) * pairs / gridDim.x);
  for (uint32_t pair = static_cast<uint32_t>(blockIdx.x * pairs / gridDim.x); pair < last;) {
    const uint32_t segment = pair / batches;
    const uint32_t end = min(last - segment * batches, batches);
    const int64_t piece = int64_t{segment} * 32 + lane;
    const bool inside = piece < plan.pieces;
    uint32_t batch = pair - segment * batches;
    pair += end - batch;

    const uint4* from = static_cast<const uint4*>(op.y) + piece;
    for (uint32_t row = warp; row < slots && inside; row += kWarps) {
      copy_async(static_cast<uint32_t>(__cvta_generic_to_shared(column + row * 32 * sizeof(uint4))),
                 from + static_cast<uint64_t>(row) * plan.pieces);
    }
    int64_t moved_from = (int64_t{batch} * kTableTokens + token_moved) * k + mover;
    uint32_t moved_to = token_to, choices = first_choice + warp * kTokens * words * sizeof(uint4);
    uint32_t both_moved_to = 2 * moved_to + half, both_choices = 2 * choices + half;
    uint32_t left = inside ? kTokens : 0;  // of the warp's tokens; and of the last batch
    uint32_t left_in_last = inside && tokens_of_last > warp * kTokens ? tokens_of_last - warp * kTokens : 0;
    // Values to keep: the compiler would make them anew for each batch.
    asm volatile("" : "+r"(both_moved_to), "+r"(both_choices), "+r"(left), "+r"(left_in_last));
    asm volatile("" : "+r"(own_choices), "+r"(own_in_last), "+r"(own_places));
    load_choices(moved_from, batch + 1 < batches ? own_choices : own_in_last);
    store_choices(moved_to);
    wait_for_copies();
    __syncthreads();
    Bits* to = static_cast<Bits*>(op.out) + (int64_t{batch} * kTableTokens + warp * kTokens) * plan.pieces + piece;
    for (; batch < end; ++batch) {
      const bool has_next = batch + 1 < end;
      moved_from += int64_t{kTableTokens} * k;
      moved_to = both_moved_to - moved_to;
      asm volatile("" : "+l"(moved_from), "+r"(moved_to));
      if (has_next) load_choices(moved_from, batch + 2 < batches ? own_choices : own_in_last);
      if (batch + 1 == batches) left = left_in_last;
      uint32_t choice = choices;
#pragma unroll 1
      for (uint32_t first = 0; first < kTokens; first += kAtOnce) {
        typename P::Floats sums[kAtOnce];
        const auto add_word = [&](bool is_first) {
          uint4 two[kAtOnce];
          Bits held[kAtOnce][2];
#pragma unroll
          for (uint32_t i = 0; i < kAtOnce; ++i) {
            two[i] = *reinterpret_cast<const uint4*>(shared_memory + choice + i * sizeof(uint4));
          }
#pragma unroll
          for (uint32_t i = 0; i < kAtOnce; ++i) {
            held[i][0] = *reinterpret_cast<const Bits*>(column + two[i].x);
            held[i][1] = *reinterpret_cast<const Bits*>(column + two[i].z);
          }
#pragma unroll
          for (uint32_t i = 0; i < kAtOnce; ++i) {
            typename P::Floats floats[2];
            P::unpack(held[i][0], floats[0]);
            P::unpack(held[i][1], floats[1]);
#pragma unroll
            for (int e = 0; e < P::kElements; ++e) {
              sums[i][e] = __fmaf_rn(bits_float(two[i].y), floats[0][e], is_first ? 0.0f : sums[i][e]);
              sums[i][e] = __fmaf_rn(bits_float(two[i].w), floats[1][e], sums[i][e]);
            }
          }
          choice += kAtOnce * sizeof(uint4);
        };
        add_word(true);
        const uint32_t end_of_token = choice + (words - 1) * kAtOnce * sizeof(uint4);
#pragma unroll 1
        while (choice != end_of_token) add_word(false);
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i) {
          const Bits sum = P::pack(sums[i]);
          if (first + i < left) store_piece(to, sum);
          to += plan.pieces;
        }
      }
      to += int64_t{kTableTokens - kTokens} * plan.pieces;
      choices = both_choices - choices;
      asm volatile("" : "+r"(choices));
      if (has_next) store_choices(moved_to);
      __syncwarp();
    }
    __syncthreads();  // nobody reads the table any more
  }
}

}  // namespace

cudaError_t run(const Combine& op, const CombinePlan& plan, cudaStream_t stream) {
  if (plan.table) {
    return with_type(op.dtype, [&](auto type) {
      const LaunchShape shape{plan.blocks, dim3(kTableThreads), plan.shared_bytes};
      return launch_kernel(combine_from_table<Piece<decltype(type), true>>, shape, stream, op, plan);
    });
  }
  return with_piece(op.dtype, plan.wide, [&](auto piece) {
    return launch_kernel(combine_rows<decltype(piece)>, {plan.blocks, threads_of(plan.row_blocks)}, stream, op, plan);
  });
}

}  // namespace jax_router::cuda
