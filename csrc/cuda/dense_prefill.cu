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
// A token's sums depend on the number of splits, and so on the plan for the number of tokens, but on nothing else of
// its batch.
//
// Floor: x and the weight are read once from device memory. What takes longer: each cluster reads the weight from the
// L2 cache, which bounds a few tokens; the tensor cores run at 3/4 of their rate; and the selection of the last tokens,
// which no product hides.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cluster.cuh"
#include "dense_prefill.h"
#include "hopper.cuh"
#include "select.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kBoxDepth = 64;  // hidden elements that a copy brings
constexpr int kBoxRowBytes = 2 * kBoxDepth;
constexpr int kMaxStages = 16;
constexpr int kPieceBits = 3;
constexpr int kPieces = 1 << kPieceBits;
constexpr int kAlignment = 1024;  // of what the copy engine writes
constexpr int kMaxSharedBytes = 227 * 1024;

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kMultipliers = 128 * kGroups;
constexpr int kBlockExperts = 64 * kGroups;
constexpr int kMaxPrefillExperts = 2 * kBlockExperts;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kCopier = kMultipliers / 32;  // the warp that keeps the copy engine busy
constexpr int kPitch = kBlockExperts + 4;   // of a row of sums: rows that are written together differ in their banks

// Registers of a thread: at the launch and for the selection, and while some multiply and the others do not.
constexpr int kRegisters = 128;
constexpr int kMoreRegisters = 176;
constexpr int kFewerRegisters = 80;

// How a launch divides the work.
struct Plan {
  int tokens;       // of a tile
  int sharer_bits;  // log2 of the blocks that have the same tokens and hidden elements
  int split_bits;   // log2 of the parts of the hidden axis
  int stages;       // of the ring
  int received;     // where in shared memory the sums of other blocks go
  bool apart;       // whether that is outside of the ring
  bool half_warps;  // select, rather than whole ones: not with four parts

  __host__ __device__ int cluster_bits() const { return sharer_bits + split_bits; }
  // The most tokens that one block selects for.
  __host__ __device__ int share() const { return (tokens + (1 << cluster_bits()) - 1) >> cluster_bits(); }
};

// Boxes of each operand in a stage: small tiles would spend more time on barriers than on products.
__host__ __device__ constexpr int boxes_of(int tokens) { return tokens <= 72 ? 2 : 1; }
__host__ __device__ constexpr int box_bytes_of(int tokens) { return (kBlockExperts + tokens) * kBoxRowBytes; }
__host__ __device__ constexpr int stage_bytes_of(int tokens) { return boxes_of(tokens) * box_bytes_of(tokens); }

// Calls body with the tokens of a tile as a constant: those that kChoices has.
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
  int first_step;
  int steps;  // of a stage each

  __device__ Work(const Plan& plan, int hidden)
      : first_token(static_cast<int64_t>(blockIdx.x >> plan.cluster_bits()) * plan.tokens),
        rank(static_cast<int>(block_of_cluster())),
        sharers(1 << plan.sharer_bits),
        sharer(rank & (sharers - 1)) {
    const int depth = boxes_of(plan.tokens) * kBoxDepth;
    const int all_steps = (hidden + depth - 1) / depth;
    const int split = rank >> plan.sharer_bits;
    first_step = (split * all_steps) >> plan.split_bits;
    steps = (((split + 1) * all_steps) >> plan.split_bits) - first_step;
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
  const CUtensorMap& x_map;
  const CUtensorMap& weight_map;
  const Ring& ring;
  const Work& work;
  int tokens;

  __device__ __forceinline__ void copy_weight(int step, int slot) const {
    announce(address_of(&ring.full[slot]), stage_bytes_of(tokens));
    for (int box = 0; box < boxes_of(tokens); ++box) {
      copy_box(place(slot, box), weight_map, column(step, box), work.sharer * kBlockExperts, &ring.full[slot]);
    }
  }
  __device__ __forceinline__ void copy_x(int step, int slot, bool to_all) const {
    for (int box = 0; box < boxes_of(tokens); ++box) {
      char* destination = place(slot, box) + kBlockExperts * kBoxRowBytes;
      const int row = static_cast<int>(work.first_token);
      if (to_all) {
        copy_box_to_blocks(destination, x_map, column(step, box), row, &ring.full[slot],
                           static_cast<uint16_t>(((1 << work.sharers) - 1) << work.first_sharer()));
      } else {
        copy_box(destination, x_map, column(step, box), row, &ring.full[slot]);
      }
    }
  }
  // As long as the other blocks' barriers may not exist, each block fetches all it needs.
  __device__ __forceinline__ void begin() const {
    for (int step = 0; step < min(work.steps, ring.size); ++step) {
      copy_weight(step, step);
      copy_x(step, step, false);
    }
  }
  __device__ __forceinline__ void go_on() const {
    int slot = 0;
    uint32_t phase = 0;
    for (int step = ring.size; step < work.steps; ++step) {
      wait_for_transfers(&ring.empty[slot], phase);
      copy_weight(step, slot);
      if ((step & (work.sharers - 1)) == work.sharer) copy_x(step, slot, true);
      if (++slot == ring.size) {
        slot = 0;
        ++phase;
      }
    }
  }

 private:
  __device__ __forceinline__ char* place(int slot, int box) const {
    return ring.stages + (slot * boxes_of(tokens) + box) * box_bytes_of(tokens);
  }
  __device__ __forceinline__ int column(int step, int box) const {
    return ((work.first_step + step) * boxes_of(tokens) + box) * kBoxDepth;
  }
};

// One warpgroup's products, of 64 experts and kTokens tokens, into rows of tokens.
template <class T, int kTokens>
__device__ __forceinline__ void multiply(const Ring& ring, const Work& work) {
  constexpr int kBoxes = boxes_of(kTokens);
  constexpr int kDepthOfSum = 128;  // hidden elements that the tensor cores add up
  constexpr int kStepsOfSum = kDepthOfSum / (kBoxes * kBoxDepth);
  constexpr int kBoxPlaces = box_bytes_of(kTokens) / 16;  // of 16 bytes
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = static_cast<int>(threadIdx.x) / 128;
  float sums[kTokens / 2];
  float part[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;

  // The same in all lanes, which the compiler does not know.
  const uint32_t weight = __shfl_sync(kFullWarp, wgmma_place(ring.stages + group * 64 * kBoxRowBytes), 0);
  const uint32_t x = __shfl_sync(kFullWarp, wgmma_place(ring.stages + kBlockExperts * kBoxRowBytes), 0);
  int slot = 0;
  uint32_t phase = 0;
  int left = work.steps;
  const uint32_t empty_of_sharer = address_in_block(ring.empty, work.first_sharer() + (lane < work.sharers ? lane : 0));
  const auto release = [&](int which, int steps_left) {
    // Nobody waits to hear of a slot that is not filled again.
    if (steps_left > ring.size && lane < work.sharers)
      arrive_in_block(empty_of_sharer + which * sizeof(TransferBarrier));
  };
#pragma unroll 1
  while (left > 0) {
    int last_slot = 0;
#pragma unroll
    for (int i = 0; i < kStepsOfSum; ++i) {
      if (left - i > 0) {
        wait_for_transfers(&ring.full[slot], phase);
        wgmma_fence();
        const uint32_t offset = slot * kBoxes * kBoxPlaces;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
#pragma unroll
          for (int k = 0; k < kBoxDepth / 16; ++k) {
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
    wgmma_wait<0>();
    left -= kStepsOfSum;
    release(last_slot, left + 1);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] += part[i];
  }

  asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory");  // nobody multiplies from the ring any more
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* rows = reinterpret_cast<float*>(ring.stages) + lane % 4 * 2 * kPitch + 16 * warp + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 2; i += 4) {
    float* row = rows + i * 2 * kPitch;
    row[0] = sums[i];
    row[kPitch] = sums[i + 1];
    row[8] = sums[i + 2];
    row[kPitch + 8] = sums[i + 3];
  }
}

// The sums of a block's share of the tokens, from all blocks of the cluster. They come in pieces of 1 << piece_bits
// tokens, so that the first are selected from while the last are on their way.
struct Parts {
  int first_row;  // of the tile
  int rows;
  float* own;
  float* received;  // of the other blocks
  int stride;       // between blocks
  int rank;         // this block
  int sharer_bits;
  TransferBarrier* pieces;  // their barriers, or null if there are no other blocks
  int piece_bits;

  // A sharer's sums of a token over a part of the hidden axis.
  __device__ __forceinline__ float* of(int split, int sharer, int row) const {
    const int block = (split << sharer_bits) + sharer;
    return (block == rank ? own : received + block * stride) + row * kPitch;
  }
};

// Sends the other blocks of the cluster their shares of this block's sums, `tokens` rows of them, and tells where its
// own share is. For a whole warp, and for the others without `sends`.
__device__ __forceinline__ Parts exchange_sums(const Plan& plan, int rank, int tokens, char* shared,
                                               TransferBarrier* pieces, bool sends) {
  constexpr int kRowBytes = kPitch * 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int cluster_bits = plan.cluster_bits();
  const int blocks = 1 << cluster_bits;
  float* sums = reinterpret_cast<float*>(shared);
  const auto first_row_of = [&](int block) { return (block * tokens) >> cluster_bits; };
  const auto rows_of = [&](int block) { return first_row_of(block + 1) - first_row_of(block); };
  // At least two rows, so that both halves of a warp wait for one piece.
  const auto piece_bits_of = [](int rows) { return max(1, 32 - __clz(max(rows, 1) - 1) - kPieceBits); };
  const int first_row = first_row_of(rank);
  const int rows = rows_of(rank);
  const Parts parts{first_row,
                    rows,
                    sums + first_row * kPitch,
                    reinterpret_cast<float*>(shared + plan.received),
                    plan.share() * kPitch,
                    rank,
                    plan.sharer_bits,
                    blocks > 1 ? pieces : nullptr,
                    piece_bits_of(rows)};
  if (!sends || blocks == 1) return parts;
  if (lane < kPieces) {
    const int begin = min(lane << parts.piece_bits, rows);
    const int end = min((lane + 1) << parts.piece_bits, rows);
    announce(address_of(&pieces[lane]), (blocks - 1) * (end - begin) * kRowBytes);
  }
  for (int i = lane; i < blocks * kPieces; i += 32) {
    const int block = i & (blocks - 1);
    const int piece = i >> cluster_bits;
    const int bits = piece_bits_of(rows_of(block));
    const int begin = min(piece << bits, rows_of(block));
    const int end = min((piece + 1) << bits, rows_of(block));
    if (block != rank && begin < end) {
      float* destination = parts.received + rank * parts.stride + begin * kPitch;
      copy_in_cluster(address_in_block(destination, block), sums + (first_row_of(block) + begin) * kPitch,
                      (end - begin) * kRowBytes, address_in_block(&pieces[piece], block));
    }
  }
  return parts;
}

// A token's logits, in the layout of select.cuh, and once more where the sums of the first part were.
template <int kSplits, int kLanes, int kElements>
__device__ __forceinline__ void add_parts(const DenseRouter& op, const Parts& parts, int row, bool exists,
                                          float (&logits)[kElements]) {
  constexpr int kChunk = 4 * kLanes;  // experts, all of one sharer
  static_assert(kBlockExperts % kChunk == 0);
  const int experts = op.select.selection.experts;
  const int first = 4 * tile_lane<kLanes>();
  float4 quads[kSplits][kElements / 4];
#pragma unroll
  for (int s = 0; s < kSplits; ++s) {
#pragma unroll
    for (int c = 0; c < kElements / 4; ++c) {
      const float* sums = parts.of(s, c * kChunk / kBlockExperts, row) + c * kChunk % kBlockExperts;
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
      float* sums = parts.of(0, c * kChunk / kBlockExperts, row) + c * kChunk % kBlockExperts;
      *reinterpret_cast<float4*>(sums + first) = sum;
    }
    logits[4 * c + 0] = sum.x;
    logits[4 * c + 1] = sum.y;
    logits[4 * c + 2] = sum.z;
    logits[4 * c + 3] = sum.w;
  }
}

// Selects for the tokens of `parts`; the tile's first is `first_token`.
template <KeyMode kMode, int kLanes>
__device__ __forceinline__ void select_rows(const DenseRouter& op, const Plan& plan, const Parts& parts,
                                            int64_t first_token, SelectScratch<32>* scratches) {
  constexpr int kTiles = 32 / kLanes;  // of a warp
  const ActivationTopk& select = op.select;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int tile = static_cast<int>(threadIdx.x) % 32 / kLanes;
  SelectScratch<kLanes>& scratch = reinterpret_cast<SelectScratch<kLanes>*>(&scratches[warp])[tile];
  const int rows = parts.rows;
  // When all threads of the cluster have arrived here, no block reads another one's sums any more.
  const auto arrive = [&] {
    __syncwarp();
    if (parts.pieces != nullptr) cluster_arrive_relaxed();
  };
  if (warp * kTiles >= rows) arrive();
#pragma unroll 1
  for (int base = warp * kTiles; base < rows; base += kWarps * kTiles) {
    if (parts.pieces != nullptr) wait_for_transfers(&parts.pieces[base >> parts.piece_bits], 0);
    if (base + kWarps * kTiles >= rows) arrive();
    const int row = base + tile;
    const bool exists = row < rows;
    const int64_t token = first_token + parts.first_row + row;
    const bool wanted = exists && (select.token_mask == nullptr || select.token_mask[token]);
    float logits[kMaxPrefillExperts / kLanes];
    if (plan.split_bits == 0) {
      add_parts<1, kLanes>(op, parts, row, exists, logits);
    } else if (plan.split_bits == 1) {
      add_parts<2, kLanes>(op, parts, row, exists, logits);
    } else if constexpr (kLanes == 32) {
      add_parts<4, kLanes>(op, parts, row, exists, logits);
    }
    __syncwarp();
    const TokenOutput output{select.weights, select.expert_ids, select.chosen_logits,
                             exists ? token * select.selection.k : -1};
    const float* bias = select.bias == nullptr ? nullptr : select.bias + (exists ? token * select.bias_stride : 0);
    select_token<kMode, kLanes>(
        select.selection, logits, wanted, bias,
        [&](int expert) { return parts.of(0, expert / kBlockExperts, row)[expert % kBlockExperts]; }, output, scratch);
  }
}

// What a block does.
__device__ __forceinline__ void route_tile(const CUtensorMap& x_map, const CUtensorMap& weight_map,
                                           const DenseRouter& op, const Plan& plan) {
  extern __shared__ char raw[];
  __shared__ TransferBarrier full[kMaxStages];
  __shared__ TransferBarrier empty[kMaxStages];
  __shared__ TransferBarrier pieces[kPieces];
  __shared__ SelectScratch<32> scratches[kWarps];
  // Aligned by an offset, so that the compiler still knows it for shared memory.
  char* shared = raw + (0u - address_of(raw)) % kAlignment;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Work work(plan, op.hidden);
  const Ring ring{shared, full, empty, plan.stages};
  const Copier copier{x_map, weight_map, ring, work, plan.tokens};

  if (warp == kCopier) {
    if (lane < ring.size) {
      init_transfers(&full[lane], 1);
      init_transfers(&empty[lane], kMultipliers / 32 * work.sharers);
    }
    if (lane < kPieces) init_transfers(&pieces[lane], 1);
    __syncwarp();
    if (lane == 0) copier.begin();
    __syncwarp();
  }
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();

  if (warp < kCopier) {
    raise_registers<kMoreRegisters>();
    with_tokens(plan.tokens, [&](auto tokens) {
      constexpr int kTokens = decltype(tokens)::value;
      if (op.operand_dtype == DType::kBF16) {
        multiply<__nv_bfloat16, kTokens>(ring, work);
      } else {
        multiply<__half, kTokens>(ring, work);
      }
    });
  } else {
    lower_registers<kFewerRegisters>();
    if (warp == kCopier && lane == 0) copier.go_on();
    __syncwarp();
  }
  fence_copies();
  __syncthreads();
  if (warp < kCopier) {
    lower_registers<kRegisters>();
  } else {
    raise_registers<kRegisters>();
  }
  if (!plan.apart) {
    // Other blocks may multiply from what is to be overwritten.
    cluster_arrive_relaxed();
    cluster_wait();
  }

  const int64_t left = op.select.rows - work.first_token;
  const int tokens = left < plan.tokens ? static_cast<int>(left) : plan.tokens;
  const Parts parts = exchange_sums(plan, work.rank, tokens, shared, pieces, warp == kCopier);
  __syncwarp();
  const auto select = [&](auto mode) {
    constexpr KeyMode kMode = decltype(mode)::value;
    if (!plan.half_warps || kMode == KeyMode::kGroups) {
      select_rows<kMode, 32>(op, plan, parts, work.first_token, scratches);
    } else if constexpr (kMode != KeyMode::kGroups) {
      select_rows<kMode, 16>(op, plan, parts, work.first_token, scratches);
    }
  };
  if (op.select.selection.groups.num_groups > 1) {
    select(std::integral_constant<KeyMode, KeyMode::kGroups>{});
  } else if (op.select.bias != nullptr) {
    select(std::integral_constant<KeyMode, KeyMode::kScores>{});
  } else {
    select(std::integral_constant<KeyMode, KeyMode::kLogits>{});
  }
  __syncwarp();
  if (parts.pieces != nullptr) cluster_wait();
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kOnHopper = true;
#else
constexpr bool kOnHopper = false;
#endif

__global__ void __launch_bounds__(kThreads, 1)
    route_tiles(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ DenseRouter op, const Plan plan) {
  if constexpr (kOnHopper) route_tile(x_map, weight_map, op, plan);
}

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// From the driver, so that nothing needs to link with it.
EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    const bool exists = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<EncodeTensorMap>(exists ? entry : nullptr);
  }();
  return function;
}

// Boxes of box_rows x kBoxDepth of a matrix [rows, hidden].
cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* matrix, int64_t rows, int hidden, int box_rows) {
  const EncodeTensorMap encode = encode_tensor_map();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto type = dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(hidden), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(hidden) * 2};
  const cuuint32_t box[] = {kBoxDepth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(matrix), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Divides the shared memory; returns the bytes that a block needs, or 0 if it has less.
int place_in_shared_memory(Plan& plan, int most) {
  constexpr int kEnoughBoxes = 8;  // under way, so that a ring that leaves room for the sums is no slower
  const int stage_bytes = stage_bytes_of(plan.tokens);
  const int sums_bytes = plan.tokens * kPitch * 4;
  const int received_bytes = plan.cluster_bits() == 0 ? 0 : (plan.share() * kPitch * 4) << plan.cluster_bits();
  const auto stages_in = [&](int bytes) { return std::min(bytes / stage_bytes, kMaxStages); };
  plan.stages = stages_in(most - received_bytes);
  plan.apart = plan.cluster_bits() == 0 || plan.stages * boxes_of(plan.tokens) >= kEnoughBoxes;
  if (!plan.apart) plan.stages = stages_in(most);
  plan.received = std::max(sums_bytes, plan.apart ? plan.stages * stage_bytes : 0);
  const int bytes = std::max(plan.stages * stage_bytes, plan.received + received_bytes);
  return plan.stages > 0 && bytes <= most ? bytes : 0;
}

cudaError_t launch_plan(const DenseRouter& op, Plan plan, cudaStream_t stream) {
  CUtensorMap x_map, weight_map;
  cudaError_t error = make_tensor_map(x_map, op.operand_dtype, op.x, op.select.rows, op.hidden, plan.tokens);
  if (error != cudaSuccess) return error;
  error =
      make_tensor_map(weight_map, op.operand_dtype, op.weight, op.select.selection.experts, op.hidden, kBlockExperts);
  if (error != cudaSuccess) return error;

  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, route_tiles);
  if (error != cudaSuccess) return error;
  const int bytes =
      place_in_shared_memory(plan, kMaxSharedBytes - static_cast<int>(attributes.sharedSizeBytes) - kAlignment);
  if (bytes == 0) return cudaErrorInvalidConfiguration;
  error = cudaFuncSetAttribute(route_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes + kAlignment);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (op.select.rows + plan.tokens - 1) / plan.tokens;
  const unsigned cluster_size = 1u << plan.cluster_bits();
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cluster_size, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(tiles) * cluster_size;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = static_cast<size_t>(bytes) + kAlignment;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, route_tiles, x_map, weight_map, op, plan);
}

// Whether every device of this process is one that the kernel was compiled for.
bool devices_can() {
#ifdef JAX_ROUTER_HOPPER
  static const bool can = [] {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return false;
    for (int device = 0; device < devices; ++device) {
      int major = 0, minor = 0;
      if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
      if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return false;
      if (major != 9 || minor != 0) return false;
    }
    return true;
  }();
  return can;
#else
  return false;
#endif
}

// An H100 has room for so many clusters of 1, 2, 4 and 8 blocks at a time.
constexpr int kClusters[] = {132, 66, 30, 15};

// In the order of preference, of those of which one wave has all tokens; the last is for all that is more.
struct Choice {
  int tokens;
  int split_bits;
};
constexpr Choice kChoices[] = {{24, 2}, {40, 2},  {56, 2},  {72, 2},  {56, 1},
                               {72, 1}, {112, 1}, {144, 1}, {112, 0}, {128, 0}};

Plan choose(const DenseRouter& op) {
  Plan plan{};
  plan.sharer_bits = op.select.selection.experts > kBlockExperts;
  for (const Choice& choice : kChoices) {
    plan.tokens = choice.tokens;
    plan.split_bits = choice.split_bits;
    if (op.select.rows <= int64_t{plan.tokens} * kClusters[plan.cluster_bits()]) break;
  }
  plan.half_warps = op.select.selection.k <= kMaxTileTopK<16> && plan.split_bits < 2 && plan.share() > kWarps;
  return plan;
}

// What the kernel can do.
bool supports(const DenseRouter& op) {
  const ActivationTopk& select = op.select;
  return op.operand_dtype != DType::kF32 && op.hidden % 8 == 0 && op.hidden > 0 &&
         select.selection.experts <= kMaxPrefillExperts && select.selection.k <= kMaxTileTopK<32> &&
         select.rows <= INT32_MAX - 1024 &&
         (select.selection.groups.num_groups == 1 ||
          tile_can_group(32, select.selection.experts, select.selection.groups.num_groups)) &&
         devices_can();
}

// Where it is faster than XLA's product and the kernel of activation_topk, as measured on an H100 for 64 to 256 experts
// and hidden sizes from 2048 to 7168: where few of the 128 experts a block are missing, and where the hidden axis is
// split, for up to 4320 tokens (9504, with 128 experts). With more tokens, only where they all but fill one wave.
bool pays(const DenseRouter& op) {
  const Plan plan = choose(op);
  const int64_t room = int64_t{plan.tokens} * kClusters[plan.cluster_bits()];
  if (op.select.selection.experts * 8 <= (kBlockExperts << plan.sharer_bits) * 7) return false;
  if (plan.split_bits > 0) return true;
  return plan.sharer_bits > 0 && op.select.rows <= room && op.select.rows * 10 >= room * 9;
}

}  // namespace

bool prefill_fuses(const DenseRouter& op) { return supports(op) && pays(op); }

cudaError_t launch_prefill(const DenseRouter& op, cudaStream_t stream) {
  return supports(op) ? launch_plan(op, choose(op), stream) : cudaErrorNotSupported;
}

}  // namespace jax_router::cuda
