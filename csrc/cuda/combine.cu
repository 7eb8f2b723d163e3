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

// A block owns some of the pairs of a segment and a batch, which are numbered segment by segment.
template <class P>
__global__ void __launch_bounds__(kTableThreads) combine_from_table(const Combine op, const CombinePlan plan) {
  using Bits = typename P::Bits;
  extern __shared__ __align__(16) uint4 shared_memory[];
  const DispatchedRows& rows = op.rows;
  const uint32_t slots = static_cast<uint32_t>(rows.slots), words = (rows.k + 1) / 2;  // of a token's choices
  uint4* const table = shared_memory;                                                  // [slots + 1][32]
  uint4* const choices = table + (slots + 1) * 32;  // [2][kTableTokens][words]: bytes to the row, weight; and again
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr uint32_t kWarps = kTableThreads / 32;

  // A thread moves one choice of some tokens of a batch to shared memory, by way of registers; a warp, all choices of
  // the tokens that it adds up.
  constexpr uint32_t kStep = kTableThreads / kTableChoices, kMoved = kTableTokens / kStep;
  constexpr uint32_t kAtOnce = 32 / kTableChoices;  // tokens of a warp, whose sums do not wait for each other
  const uint32_t token_moved = threadIdx.x / kTableChoices, j = threadIdx.x % kTableChoices;
  int slot[kMoved];
  float weight[kMoved];
  const auto load_choices = [&](uint32_t batch) {
#pragma unroll
    for (uint32_t i = 0; i < kMoved; ++i) {
      const int64_t token = int64_t{batch} * kTableTokens + token_moved + i * kStep;
      slot[i] = -1;
      if (j >= rows.k || token >= rows.tokens) continue;
      slot[i] = __ldg(rows.slot + token * rows.k + j);
      weight[i] = op.weights == nullptr ? 1.0f : __ldg(op.weights + token * rows.k + j);
    }
  };
  // A choice without a slot adds 0 * -0, which changes no sum.
  const auto store_choices = [&](uint32_t half) {
    if (j >= 2 * words) return;
    auto* to = reinterpret_cast<uint2*>(choices + half * kTableTokens * words) + j;
#pragma unroll
    for (uint32_t i = 0; i < kMoved; ++i) {
      const bool has_slot = static_cast<uint32_t>(slot[i]) < slots;
      to[(token_moved + i * kStep) * 2 * words] =
          make_uint2((has_slot ? slot[i] : slots) * 32 * sizeof(uint4), has_slot ? float_bits(weight[i]) : 0);
    }
  };
  if (warp == 0) table[slots * 32 + lane] = P::pack_all(-0.0f);

  const int64_t pairs = plan.segments * plan.batches;
  const uint32_t last = static_cast<uint32_t>((blockIdx.x + 1) * pairs / gridDim.x);
  const unsigned char* const column = reinterpret_cast<const unsigned char*>(table + lane);
  for (uint32_t pair = static_cast<uint32_t>(blockIdx.x * pairs / gridDim.x); pair < last;) {
    const uint32_t segment = pair / static_cast<uint32_t>(plan.batches);
    const uint32_t end = min(last - segment * static_cast<uint32_t>(plan.batches), static_cast<uint32_t>(plan.batches));
    const int64_t piece = int64_t{segment} * 32 + lane;
    const bool inside = piece < plan.pieces;
    uint32_t batch = pair - segment * static_cast<uint32_t>(plan.batches);
    pair += end - batch;

    const uint4* from = static_cast<const uint4*>(op.y) + piece;
    for (uint32_t row = warp; row < slots && inside; row += kWarps) {
      copy_async(static_cast<uint32_t>(__cvta_generic_to_shared(table + row * 32 + lane)),
                 from + static_cast<uint64_t>(row) * plan.pieces);
    }
    load_choices(batch);
    store_choices(batch % 2);
    wait_for_copies();
    __syncthreads();
    for (; batch < end; ++batch) {
      load_choices(batch + 1);
#pragma unroll 1
      for (uint32_t t = 0; t < kMoved; ++t) {
        const uint32_t first = warp * kAtOnce + t * kStep;
        const uint4* of_tokens = choices + (batch % 2 * kTableTokens + first) * words;
        typename P::Floats sums[kAtOnce] = {};
#pragma unroll 1
        for (uint32_t word = 0; word < words; ++word) {
#pragma unroll
          for (uint32_t i = 0; i < kAtOnce; ++i) {
            const uint4 two = of_tokens[i * words + word];
            typename P::Floats floats[2];
            P::unpack(*reinterpret_cast<const Bits*>(column + two.x), floats[0]);
            P::unpack(*reinterpret_cast<const Bits*>(column + two.z), floats[1]);
#pragma unroll
            for (int e = 0; e < P::kElements; ++e) {
              sums[i][e] = __fmaf_rn(bits_float(two.y), floats[0][e], sums[i][e]);
              sums[i][e] = __fmaf_rn(bits_float(two.w), floats[1][e], sums[i][e]);
            }
          }
        }
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i) {
          const int64_t token = int64_t{batch} * kTableTokens + first + i;
          if (token < rows.tokens && inside) {
            store_piece(static_cast<Bits*>(op.out) + token * plan.pieces + piece, P::pack(sums[i]));
          }
        }
      }
      store_choices((batch + 1) % 2);
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
