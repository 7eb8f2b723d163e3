// dense_router for more than 128 tokens on Hopper: logits = weight @ x.T by warpgroup matrix products, selected from in
// the same kernel.
//
// The experts are the rows of the product, so that a tile may have as many tokens as make one wave of the chip. A
// cluster of blocks owns a tile of tokens and all experts: `sharers` blocks have 128 experts each, and `splits` of
// these groups a part of the hidden axis each. One thread keeps the copy engine busy: it brings stages of 64 or 128
// hidden elements of both operands into a ring of shared memory; the sharers fetch the tokens in turn, each for all of
// them. Two warpgroups multiply, 64 experts each, and leave their sums in shared memory in place of the ring, as rows
// of tokens. Then each block gets the other blocks' sums of its share of the tokens, adds up the parts of the hidden
// axis in their order, and selects. No logit reaches device memory.
//
// The tensor cores cut off what does not fit when they add: an f32 sum of 4096 products is off by some 2^-16. So they
// begin a new sum every 128 hidden elements, and ordinary additions, which round, add these sums up.
//
// For the most tokens, blocks are wide: each owns 128 tokens, which are the rows of its product, all experts and the
// whole hidden axis. Two of them make a cluster only to fetch the weight for each other in turn, so that the chip reads
// it half as often; each selects for its own tokens. Such a block has no registers for two sums of a logit: the tensor
// cores add up all of it, as they do in XLA's product.
//
// A token's sums depend on the number of splits and on whether its block is wide, and so on the plan for the number of
// tokens, but on nothing else of its batch.
//
// Floor: x and the weight are read once from device memory. What takes longer: each cluster reads the weight from the
// L2 cache, which bounds a few tokens; the tensor cores run at nine tenths of their rate at best, as they read both
// operands from the shared memory that the copies fill; and the selection of the last tokens, which no product hides.
#include <cstdint>
#include <type_traits>

#include "dense_router.h"
#include "parts/cluster.cuh"
#include "parts/hopper.cuh"
#include "parts/launch.cuh"
#include "parts/tensor_map.cuh"
#include "parts/token.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kMultipliers = 128 * kGroups;
static_assert(kManyBlockExperts == 64 * kGroups);
template <bool kWide>
constexpr int kWarps = kWide ? kManyWideWarps : kManyWarps;
static_assert(kManyBoxDepth == kBoxColumns);
constexpr int kCopier = kMultipliers / 32;  // the warp that keeps the copy engine busy

// Registers of a thread: at the launch and for the selection, and while some multiply and the others do not.
constexpr int kRegisters = 128;
constexpr int kMoreRegisters = 176;
constexpr int kFewerRegisters = 80;

// Calls body with the tokens of a tile as a constant: those that kManyTiles has.
template <class Body>
__device__ __forceinline__ void with_tokens(int tokens, Body body) {
  switch (tokens) {
    case 24:
      return body(std::integral_constant<int, 24>{});
    case 40:
      return body(std::integral_constant<int, 40>{});
    case 56:
      return body(std::integral_constant<int, 56>{});
    case 72:
      return body(std::integral_constant<int, 72>{});
    case 112:
      return body(std::integral_constant<int, 112>{});
    case 128:
      return body(std::integral_constant<int, 128>{});
    case 144:
      return body(std::integral_constant<int, 144>{});
  }
}

// A block's part of the product.
struct Work {
  int64_t first_token;
  int rank;  // of the cluster's blocks
  int sharers;
  int sharer;
  int first_row;  // of the matrices that are multiplied
  int first_column;
  int first_step;
  int steps;  // of a stage each

  __device__ Work(const ManyTiling& tiling, int hidden)
      : first_token(static_cast<int64_t>(blockIdx.x >> tiling.tile_bits()) * tiling.tokens),
        rank(static_cast<int>(block_of_cluster())),
        sharers(1 << tiling.sharer_bits),
        sharer(rank & (sharers - 1)),
        first_row(tiling.wide ? static_cast<int>(first_token) : sharer * kManyBlockExperts),
        first_column(tiling.wide ? 0 : static_cast<int>(first_token)) {
    const int depth = boxes_of(tiling.columns()) * kManyBoxDepth;
    const int all_steps = (hidden + depth - 1) / depth;
    const int split = rank >> tiling.sharer_bits;
    first_step = (split * all_steps) >> tiling.split_bits;
    steps = (((split + 1) * all_steps) >> tiling.split_bits) - first_step;
  }
  // The block of the first sharer.
  __device__ int first_sharer() const { return rank - sharer; }
};

// What the copies fill and the products read, in turn.
struct Ring {
  char* stages;
  TransferBarrier* full;
  TransferBarrier* empty;  // by which those who fill it learn that all sharers are done with it
  int size;
};

// Fills the ring; all of it by one thread.
struct Copier {
  const CUtensorMap& rows_map;
  const CUtensorMap& columns_map;
  const Ring& ring;
  const Work& work;
  int columns;

  __device__ __forceinline__ void copy_rows(int step, int slot) const {
    announce(address_of(&ring.full[slot]), stage_bytes_of(columns));
    for (int box = 0; box < boxes_of(columns); ++box) {
      copy_box(place(slot, box), rows_map, element(step, box), work.first_row, &ring.full[slot]);
    }
  }
  __device__ __forceinline__ void copy_columns(int step, int slot, bool to_all) const {
    for (int box = 0; box < boxes_of(columns); ++box) {
      char* destination = place(slot, box) + kManyRows * kManyBoxRowBytes;
      if (to_all) {
        copy_box_to_blocks(destination, columns_map, element(step, box), work.first_column, &ring.full[slot],
                           static_cast<uint16_t>(((1 << work.sharers) - 1) << work.first_sharer()));
      } else {
        copy_box(destination, columns_map, element(step, box), work.first_column, &ring.full[slot]);
      }
    }
  }
  // As long as the other blocks' barriers may not exist, each block fetches all it needs.
  __device__ __forceinline__ void begin() const {
    for (int step = 0; step < min(work.steps, ring.size); ++step) {
      copy_rows(step, step);
      copy_columns(step, step, false);
    }
  }
  __device__ __forceinline__ void go_on() const {
    int slot = 0;
    uint32_t phase = 0;
    for (int step = ring.size; step < work.steps; ++step) {
      wait_for_transfers(&ring.empty[slot], phase);
      copy_rows(step, slot);
      if ((step & (work.sharers - 1)) == work.sharer) copy_columns(step, slot, true);
      if (++slot == ring.size) {
        slot = 0;
        ++phase;
      }
    }
  }

 private:
  __device__ __forceinline__ char* place(int slot, int box) const {
    return ring.stages + (slot * boxes_of(columns) + box) * box_bytes_of(columns);
  }
  __device__ __forceinline__ int element(int step, int box) const {
    return ((work.first_step + step) * boxes_of(columns) + box) * kManyBoxDepth;
  }
};

// One warpgroup's products, of 64 experts and kTokens tokens, into rows of tokens.
template <class T, int kTokens>
__device__ __forceinline__ void multiply(const Ring& ring, const Work& work) {
  constexpr int kBoxes = boxes_of(kTokens);
  constexpr int kDepthOfSum = 128;  // hidden elements that the tensor cores add up
  constexpr int kStepsOfSum = kDepthOfSum / (kBoxes * kManyBoxDepth);
  constexpr int kBoxPlaces = box_bytes_of(kTokens) / 16;  // of 16 bytes
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // The same in all lanes, as some more below, which the compiler does not know.
  const int group = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 128, 0);
  float sums[kTokens / 2];
  float part[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;

  const uint32_t weight = __shfl_sync(kFullWarp, wgmma_place(ring.stages + group * 64 * kManyBoxRowBytes), 0);
  const uint32_t x = __shfl_sync(kFullWarp, wgmma_place(ring.stages + kManyBlockExperts * kManyBoxRowBytes), 0);
  int slot = 0;
  uint32_t phase = 0;
  int left = work.steps;
  const uint32_t empty_of_sharer = address_in_block(ring.empty, work.first_sharer() + (lane < work.sharers ? lane : 0));
  const auto release = [&](int which, int steps_left) {
    // Nobody waits to hear of a slot that is not filled again.
    if (steps_left > ring.size && lane < work.sharers)
      arrive_in_block(empty_of_sharer + which * sizeof(TransferBarrier));
  };
  // The groups take turns to begin a sum, so that the tensor cores have products of one while the other adds. They
  // would wait for the same stages else, and add at the same time.
  const auto wait_for_turn = [&] { asm volatile("bar.sync %0, %1;" ::"r"(2 + group), "n"(kMultipliers) : "memory"); };
  const auto pass_turn = [&] { asm volatile("bar.arrive %0, %1;" ::"r"(3 - group), "n"(kMultipliers) : "memory"); };
  if (group == 1) pass_turn();
#pragma unroll 1
  while (left > 0) {
    int last_slot = 0;
    wait_for_turn();
#pragma unroll
    for (int i = 0; i < kStepsOfSum; ++i) {
      if (left - i > 0) {
        wait_for_transfers(&ring.full[slot], phase);
        wgmma_fence();
        const uint32_t offset = slot * kBoxes * kBoxPlaces;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
#pragma unroll
          for (int k = 0; k < kManyBoxDepth / 16; ++k) {
            const uint32_t place = offset + box * kBoxPlaces + 2 * k;
            wgmma(T{}, part, wgmma_descriptor(weight + place), wgmma_descriptor(x + place), i > 0 || box > 0 || k > 0);
          }
        }
        wgmma_commit();
        if (i > 0) {
          wgmma_wait<1>();
          release(last_slot, left - i + 1);
        }
        last_slot = slot;
        if (++slot == ring.size) {
          slot = 0;
          ++phase;
        }
      }
    }
    pass_turn();
    wgmma_wait<0>();
    left -= kStepsOfSum;
    release(last_slot, left + 1);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] += part[i];
  }

  if (group == 0) wait_for_turn();
  asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory");  // nobody multiplies from the ring any more
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* rows = reinterpret_cast<float*>(ring.stages) + lane % 4 * 2 * kManyPitch + 16 * warp + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 2; i += 4) {
    float* row = rows + i * 2 * kManyPitch;
    row[0] = sums[i];
    row[kManyPitch] = sums[i + 1];
    row[8] = sums[i + 2];
    row[kManyPitch + 8] = sums[i + 3];
  }
}

// The same of 64 tokens and all experts, for a wide block.
template <class T>
__device__ __forceinline__ void multiply_wide(const Ring& ring, const Work& work) {
  constexpr int kBoxPlaces = box_bytes_of(kManyExperts) / 16;  // of 16 bytes
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 128, 0);
  float sums[kManyExperts / 2];
#pragma unroll
  for (int i = 0; i < kManyExperts / 2; ++i) sums[i] = 0.0f;

  const uint32_t x = __shfl_sync(kFullWarp, wgmma_place(ring.stages + group * 64 * kManyBoxRowBytes), 0);
  const uint32_t weight = __shfl_sync(kFullWarp, wgmma_place(ring.stages + kManyRows * kManyBoxRowBytes), 0);
  const uint32_t empty_of_sharer = address_in_block(ring.empty, lane < work.sharers ? lane : 0);
  int slot = 0;
  int last_slot = 0;
  uint32_t phase = 0;
#pragma unroll 1
  for (int left = work.steps; left > 0; --left) {
    wait_for_transfers(&ring.full[slot], phase);
    wgmma_fence();
    const uint32_t offset = slot * kBoxPlaces;
#pragma unroll
    for (int k = 0; k < kManyBoxDepth / 16; ++k) {
      const uint32_t place = offset + 2 * k;
      wgmma(T{}, sums, wgmma_descriptor(x + place), wgmma_descriptor(weight + place), true);
    }
    wgmma_commit();
    wgmma_wait<1>();
    // Nobody waits to hear of a slot that is not filled again.
    if (left < work.steps && left >= ring.size && lane < work.sharers) {
      arrive_in_block(empty_of_sharer + last_slot * sizeof(TransferBarrier));
    }
    last_slot = slot;
    if (++slot == ring.size) {
      slot = 0;
      ++phase;
    }
  }

  wgmma_wait<0>();
  asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory");  // nobody multiplies from the ring any more
  float* rows = reinterpret_cast<float*>(ring.stages) + (16 * warp + lane / 4) * kManyPitch + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kManyExperts / 2; i += 4) {
    constexpr int kHalf = kManyWideTokens * kManyPitch;
    float* row = rows + i * 2 / kManyBlockExperts * kHalf + i * 2 % kManyBlockExperts;
    *reinterpret_cast<float2*>(row) = make_float2(sums[i], sums[i + 1]);
    *reinterpret_cast<float2*>(row + 8 * kManyPitch) = make_float2(sums[i + 2], sums[i + 3]);
  }
}

// The sums of a block's share of the tokens, from all blocks of the cluster. They come in pieces of 1 << piece_bits
// tokens, so that the first are selected from while the last are on their way.
struct Parts {
  int first_row;  // of the tile
  int rows;
  float* own;
  float* received;  // of the other blocks; where there are none, the second half of the experts
  int stride;       // between blocks
  int rank;         // this block
  int sharer_bits;
  TransferBarrier* pieces;  // their barriers, or null if there are no other blocks
  int piece_bits;

  // A sharer's sums of a token over a part of the hidden axis.
  __device__ __forceinline__ float* of(int split, int sharer, int row) const {
    const int block = (split << sharer_bits) + sharer;
    return (block == rank ? own : received + block * stride) + row * kManyPitch;
  }
};

// Sends the other blocks of the cluster their shares of this block's sums, `tokens` rows of them, and tells where its
// own share is. For a whole warp, and for the others without `sends`.
__device__ __forceinline__ Parts exchange_sums(const ManyTiling& tiling, int rank, int tokens, char* shared,
                                               TransferBarrier* pieces, bool sends) {
  constexpr int kRowBytes = kManyPitch * 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int cluster_bits = tiling.cluster_bits();
  const int blocks = 1 << cluster_bits;
  float* sums = reinterpret_cast<float*>(shared);
  const auto first_row_of = [&](int block) { return (block * tokens) >> cluster_bits; };
  const auto rows_of = [&](int block) { return first_row_of(block + 1) - first_row_of(block); };
  // At least two rows, so that both halves of a warp wait for one piece.
  const auto piece_bits_of = [](int rows) { return max(1, 32 - __clz(max(rows, 1) - 1) - kManyPieceBits); };
  const int first_row = first_row_of(rank);
  const int rows = rows_of(rank);
  const Parts parts{first_row,
                    rows,
                    sums + first_row * kManyPitch,
                    reinterpret_cast<float*>(shared + tiling.received),
                    tiling.share() * kManyPitch,
                    rank,
                    tiling.sharer_bits,
                    blocks > 1 ? pieces : nullptr,
                    piece_bits_of(rows)};
  if (!sends || blocks == 1) return parts;
  if (lane < kManyPieces) {
    const int begin = min(lane << parts.piece_bits, rows);
    const int end = min((lane + 1) << parts.piece_bits, rows);
    announce(address_of(&pieces[lane]), (blocks - 1) * (end - begin) * kRowBytes);
  }
  for (int i = lane; i < blocks * kManyPieces; i += 32) {
    const int block = i & (blocks - 1);
    const int piece = i >> cluster_bits;
    const int bits = piece_bits_of(rows_of(block));
    const int begin = min(piece << bits, rows_of(block));
    const int end = min((piece + 1) << bits, rows_of(block));
    if (block != rank && begin < end) {
      float* destination = parts.received + rank * parts.stride + begin * kManyPitch;
      copy_in_cluster(address_in_block(destination, block), sums + (first_row_of(block) + begin) * kManyPitch,
                      (end - begin) * kRowBytes, address_in_block(&pieces[piece], block));
    }
  }
  return parts;
}

// A token's logits, in the layout of tile.cuh, and once more where the sums of the first part were.
template <int kSplits, int kLanes, int kElements>
__device__ __forceinline__ void add_parts(const DenseRouter& op, const Parts& parts, int row, bool exists,
                                          float (&logits)[kElements]) {
  constexpr int kChunk = 4 * kLanes;  // experts, all of one sharer
  static_assert(kManyBlockExperts % kChunk == 0);
  const int experts = op.select.selection.experts;
  const int first = 4 * tile_lane<kLanes>();
  float4 quads[kSplits][kElements / 4];
#pragma unroll
  for (int s = 0; s < kSplits; ++s) {
#pragma unroll
    for (int c = 0; c < kElements / 4; ++c) {
      const float* sums = parts.of(s, c * kChunk / kManyBlockExperts, row) + c * kChunk % kManyBlockExperts;
      quads[s][c] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
      if (exists && c * kChunk + first < experts) quads[s][c] = *reinterpret_cast<const float4*>(sums + first);
    }
  }
#pragma unroll
  for (int c = 0; c < kElements / 4; ++c) {
    const int expert = c * kChunk + first;
    float4 sum = quads[0][c];
#pragma unroll
    for (int s = 1; s < kSplits; ++s) {
      sum.x += quads[s][c].x;
      sum.y += quads[s][c].y;
      sum.z += quads[s][c].z;
      sum.w += quads[s][c].w;
    }
    if (op.logit_bias != nullptr) {
      if (expert + 0 < experts) sum.x += __ldg(op.logit_bias + expert + 0);
      if (expert + 1 < experts) sum.y += __ldg(op.logit_bias + expert + 1);
      if (expert + 2 < experts) sum.z += __ldg(op.logit_bias + expert + 2);
      if (expert + 3 < experts) sum.w += __ldg(op.logit_bias + expert + 3);
    }
    if (experts % 4 != 0) {
      // An expert that does not exist may have got a NaN from an infinite x.
      if (expert + 1 >= experts) sum.y = -INFINITY;
      if (expert + 2 >= experts) sum.z = -INFINITY;
      if (expert + 3 >= experts) sum.w = -INFINITY;
    }
    if ((kSplits > 1 || op.logit_bias != nullptr) && exists && expert < experts) {
      float* sums = parts.of(0, c * kChunk / kManyBlockExperts, row) + c * kChunk % kManyBlockExperts;
      *reinterpret_cast<float4*>(sums + first) = sum;
    }
    logits[4 * c + 0] = sum.x;
    logits[4 * c + 1] = sum.y;
    logits[4 * c + 2] = sum.z;
    logits[4 * c + 3] = sum.w;
  }
}

// Selects for the tokens of `parts`; the tile's first is `first_token`.
template <bool kWide, KeyMode kMode, int kLanes>
__device__ __forceinline__ void select_for_rows(const DenseRouter& op, const ManyTiling& tiling, const Parts& parts,
                                                int64_t first_token, char* scratches) {
  constexpr int kTiles = 32 / kLanes;  // of a warp
  static_assert(sizeof(SelectScratch<kLanes>) * kTiles * kWarps<kWide> <= many_scratch_bytes(kWide));
  const ActivationTopk& select = op.select;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int tile = static_cast<int>(threadIdx.x) % 32 / kLanes;
  SelectScratch<kLanes>& scratch = reinterpret_cast<SelectScratch<kLanes>*>(scratches)[warp * kTiles + tile];
  const int rows = parts.rows;
  // When all threads of the cluster have arrived here, no block reads another one's sums any more.
  const auto arrive = [&] {
    __syncwarp();
    if (parts.pieces != nullptr) cluster_arrive_relaxed();
  };
  if (warp * kTiles >= rows) arrive();
#pragma unroll 1
  for (int base = warp * kTiles; base < rows; base += kWarps<kWide> * kTiles) {
    if (parts.pieces != nullptr) wait_for_transfers(&parts.pieces[base >> parts.piece_bits], 0);
    if (base + kWarps<kWide> * kTiles >= rows) arrive();
    const int row = base + tile;
    const bool exists = row < rows;
    const int64_t token = first_token + parts.first_row + row;
    const bool wanted = exists && !is_masked(select, token);
    float logits[kManyExperts / kLanes];
    if (kWide || tiling.split_bits == 0) {
      add_parts<1, kLanes>(op, parts, row, exists, logits);
    } else if constexpr (!kWide) {
      if (tiling.split_bits == 1) {
        add_parts<2, kLanes>(op, parts, row, exists, logits);
      } else if constexpr (kLanes == 32) {
        add_parts<4, kLanes>(op, parts, row, exists, logits);
      }
    }
    __syncwarp();
    const TokenOutput output{select.weights, select.expert_ids, select.chosen_logits, token * select.selection.k,
                             exists ? 0 : -1};
    const float* bias = select.bias == nullptr ? nullptr : select.bias + (exists ? token * select.bias_stride : 0);
    select_token<kMode, kLanes>(
        select.selection, logits, wanted, bias,
        [&](int expert) { return parts.of(0, expert / kManyBlockExperts, row)[expert % kManyBlockExperts]; }, output,
        scratch);
  }
}

// What a block does.
template <bool kWide>
__device__ __forceinline__ void route_tile(const CUtensorMap& rows_map, const CUtensorMap& columns_map,
                                           const DenseRouter& op, const ManyTiling& tiling) {
  extern __shared__ char raw[];
  __shared__ TransferBarrier full[kManyStages];
  __shared__ TransferBarrier empty[kManyStages];
  __shared__ TransferBarrier pieces[kManyPieces];
  __shared__ __align__(16) char scratches[many_scratch_bytes(kWide)];
  // Aligned by an offset, so that the compiler still knows it for shared memory.
  char* shared = raw + (0u - address_of(raw)) % kManyAlignment;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Work work(tiling, op.hidden);
  const Ring ring{shared, full, empty, tiling.stages};
  const Copier copier{rows_map, columns_map, ring, work, tiling.columns()};

  if (warp == kCopier) {
    if (lane < ring.size) {
      init_transfers(&full[lane], 1);
      init_transfers(&empty[lane], kMultipliers / 32 * work.sharers);
    }
    if (lane < kManyPieces) init_transfers(&pieces[lane], 1);
    __syncwarp();
    if (lane == 0) copier.begin();
    __syncwarp();
  }
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();

  // A wide block's threads have registers enough for all they do.
  if (warp < kCopier) {
    const auto multiply_in = [&](auto type) {
      using T = decltype(type);
      if constexpr (kWide) {
        multiply_wide<T>(ring, work);
      } else {
        with_tokens(tiling.tokens, [&](auto tokens) { multiply<T, decltype(tokens)::value>(ring, work); });
      }
    };
    if constexpr (!kWide) raise_registers<kMoreRegisters>();
    if (op.operand_dtype == DType::kBF16) {
      multiply_in(__nv_bfloat16{});
    } else {
      multiply_in(__half{});
    }
  } else {
    if constexpr (!kWide) lower_registers<kFewerRegisters>();
    if (warp == kCopier && lane == 0) copier.go_on();
    __syncwarp();
  }
  fence_copies();
  __syncthreads();
  if constexpr (!kWide) {
    if (warp < kCopier) {
      lower_registers<kRegisters>();
    } else {
      raise_registers<kRegisters>();
    }
    if (!tiling.apart) {
      // Other blocks may multiply from what is to be overwritten.
      cluster_arrive_relaxed();
      cluster_wait();
    }
  }

  const int64_t left = op.select.rows - work.first_token;
  const int tokens = left < tiling.tokens ? static_cast<int>(left) : tiling.tokens;
  const Parts parts = [&] {
    if constexpr (kWide) {
      float* sums = reinterpret_cast<float*>(shared);
      return Parts{0, tokens, sums, sums, kManyWideTokens * kManyPitch, 0, 1, nullptr, 0};
    } else {
      return exchange_sums(tiling, work.rank, tokens, shared, pieces, warp == kCopier);
    }
  }();
  __syncwarp();
  const auto select = [&](auto mode) {
    constexpr KeyMode kMode = decltype(mode)::value;
    if constexpr (kWide) {
      select_for_rows<kWide, kMode, kManyWideLanes>(op, tiling, parts, work.first_token, scratches);
    } else if (!tiling.half_warps || kMode == KeyMode::kGroups) {
      select_for_rows<kWide, kMode, 32>(op, tiling, parts, work.first_token, scratches);
    } else if constexpr (kMode != KeyMode::kGroups) {
      select_for_rows<kWide, kMode, 16>(op, tiling, parts, work.first_token, scratches);
    }
  };
  if constexpr (kWide) {
    select(std::integral_constant<KeyMode, KeyMode::kLogits>{});
  } else if (op.select.selection.groups.num_groups > 1) {
    select(std::integral_constant<KeyMode, KeyMode::kGroups>{});
  } else if (op.select.bias != nullptr) {
    select(std::integral_constant<KeyMode, KeyMode::kScores>{});
  } else {
    select(std::integral_constant<KeyMode, KeyMode::kLogits>{});
  }
  __syncwarp();
  if (parts.pieces != nullptr) cluster_wait();
}

template <bool kWide>
__global__ void __launch_bounds__(32 * kWarps<kWide>, 1)
    dense_router_many_tokens(const __grid_constant__ CUtensorMap rows_map,
                             const __grid_constant__ CUtensorMap columns_map, const __grid_constant__ DenseRouter op,
                             const ManyTiling tiling) {
  if (kOnHopper) route_tile<kWide>(rows_map, columns_map, op, tiling);
}

}  // namespace

cudaError_t run_many(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream) {
  const bool wide = plan.many.wide;
  CUtensorMap x_map, weight_map;
  cudaError_t error = make_tensor_map(x_map, op.operand_dtype, op.x, op.select.rows, op.hidden, plan.many.tokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(weight_map, op.operand_dtype, op.weight, op.select.selection.experts, op.hidden,
                          wide ? kManyExperts : kManyBlockExperts);
  if (error != cudaSuccess) return error;
  const LaunchShape shape{plan.blocks, wide ? 32 * kWarps<true> : 32 * kWarps<false>, plan.shared_bytes,
                          1 << plan.many.cluster_bits()};
  return wide ? launch_kernel(dense_router_many_tokens<true>, shape, stream, x_map, weight_map, op, plan.many)
              : launch_kernel(dense_router_many_tokens<false>, shape, stream, weight_map, x_map, op, plan.many);
}

}  // namespace jax_router::cuda
