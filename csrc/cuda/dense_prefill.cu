// dense_router for many tokens: logits = weight @ x.T by warpgroup matrix products, selected from in the same kernel.
//
// The experts are the rows of the product, so that a tile has as many tokens as make one wave of the chip. A cluster of
// blocks owns a tile of tokens and all experts: `sharers` blocks have 128 or 256 experts each, and `splits` of these
// groups a part of the hidden axis each. One thread keeps the copy engine busy: it brings stages of 64 or 128 hidden
// elements of both operands into a ring of shared memory. The sharers fetch the tokens in turn, each for all of them.
// Two or four warpgroups multiply, and leave their sums in shared memory in place of the ring, as rows of tokens.
// Then each block gets the other blocks' sums of its share of the tokens, adds up the parts of the hidden axis in their
// order, and selects. No logit reaches device memory.
//
// A token's sums depend on the number of splits, and so on the plan for the number of tokens, but on nothing else of
// its batch.
//
// Floor: x and the weight are read once from device memory. Each cluster reads the weight from the L2 cache, which then
// bounds a few tokens; many tokens end with a selection that no product hides.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cluster.cuh"
#include "dense_prefill.h"
#include "hopper.cuh"
#include "load.cuh"
#include "select.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kMaxPrefillExperts = 384;
constexpr int kBoxDepth = 64;  // hidden elements that a copy brings
constexpr int kBoxRowBytes = 2 * kBoxDepth;
constexpr int kMaxStages = 16;
constexpr int kPieces = 8;
constexpr int kMaxSharedBytes = 227 * 1024;

// Registers a thread where these move: at the launch of 640 threads, and then of those that multiply and the others.
constexpr int kRegisters = 96;
constexpr int kMoreRegisters = 112;
constexpr int kFewerRegisters = 32;

// How a launch divides the work.
struct Plan {
  int tokens;       // of a tile
  int sharer_bits;  // log2 of the blocks that have the same tokens and hidden elements
  int split_bits;   // log2 of the parts of the hidden axis
  int stages;       // of the ring
  int received;     // where in shared memory the sums of other blocks go
  bool apart;       // whether that is outside of the ring
};

// A block's part of a tile: 64 experts for each of kGroups warpgroups, in stages of kBoxes boxes. kAllExperts: the most
// that a token may have. kWidths: the numbers of tokens that tiles may have.
template <int kAllExperts_, int kGroups_, int kBoxes_, int... kWidths>
struct Shape {
  static constexpr int kAllExperts = kAllExperts_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kBoxes = kBoxes_;
  static constexpr int kExperts = 64 * kGroups;
  static constexpr int kConsumers = 128 * kGroups;
  static constexpr int kThreads = kGroups == 4 ? 640 : 512;
  static constexpr int kWarps = kThreads / 32;
  // Of a row of sums: rows that are written together differ in their banks.
  static constexpr int kPitch = kExperts + 4;
  static constexpr bool kMovesRegisters = kGroups == 4;  // from the threads that do not multiply to those that do

  static __host__ __device__ constexpr int stage_bytes(int tokens) {
    return kBoxes * (kExperts + tokens) * kBoxRowBytes;
  }

  // Calls body with the width that `tokens` is, as a constant.
  template <class Body>
  static __device__ __forceinline__ void with_width(int tokens, Body body) {
    (void)((tokens == kWidths && (body(std::integral_constant<int, kWidths>{}), true)) || ...);
  }
};

struct Ring {
  char* stages;
  uint64_t* full;
  // The barriers by which those who fill a slot learn that it is free: of this block, and of the sharer whose turn it
  // is to fetch the tokens, or 0 if that is this block.
  const uint2* empty;
};

// One warpgroup's products, of 64 experts and kTokens tokens, into rows of tokens.
template <class T, class S, int kTokens>
__device__ __forceinline__ void multiply(const Ring& ring, int stages, int steps) {
  constexpr int kBoxPlaces = (S::kExperts + kTokens) * kBoxRowBytes / 16;  // of 16 bytes
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = static_cast<int>(threadIdx.x) / 128;
  float sums[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;

  // The same in all lanes, which the compiler does not know.
  uint32_t weight = __shfl_sync(kFullWarp, wgmma_place(ring.stages + group * 64 * kBoxRowBytes), 0);
  uint32_t x = __shfl_sync(kFullWarp, wgmma_place(ring.stages + S::kExperts * kBoxRowBytes), 0);
  int slot = 0;
  int last_slot = 0;
  uint32_t parity = 0;
  uint32_t offset = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(&ring.full[slot], parity);
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box) {
#pragma unroll
      for (int k = 0; k < kBoxDepth / 16; ++k) {
        const uint32_t place = offset + box * kBoxPlaces + 2 * k;
        wgmma(T{}, sums, wgmma_descriptor(weight + place), wgmma_descriptor(x + place));
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    // The products of the step before are finished. Nobody waits to hear of a slot that is not filled again.
    if (step > 0 && step - 1 + stages < steps && lane < 2) {
      const uint2 barriers = ring.empty[last_slot];
      const uint32_t barrier = lane == 0 ? barriers.x : barriers.y;
      if (barrier != 0) mbarrier_arrive_in_cluster(barrier);
    }
    last_slot = slot;
    offset += S::kBoxes * kBoxPlaces;
    if (++slot == stages) {
      slot = 0;
      offset = 0;
      parity ^= 1;
    }
  }
  wgmma_wait<0>();

  asm volatile("bar.sync 1, %0;" ::"n"(S::kConsumers) : "memory");  // nobody multiplies from the ring any more
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* rows = reinterpret_cast<float*>(ring.stages) + lane % 4 * 2 * S::kPitch + 16 * warp + lane / 4;
#pragma unroll
  for (int i = 0; i < kTokens / 2; i += 4) {
    float* row = rows + i * 2 * S::kPitch;
    row[0] = sums[i];
    row[S::kPitch] = sums[i + 1];
    row[8] = sums[i + 2];
    row[S::kPitch + 8] = sums[i + 3];
  }
}

// The sums of a block's share of the tokens, from all blocks of the cluster. They come in pieces of 1 << piece_bits
// tokens, so that the first are selected from while the last are on their way.
template <class S>
struct Parts {
  float* own;
  float* received;  // of the other blocks, in their order
  int stride;       // between blocks
  int rank;         // this block
  int sharer_bits;
  uint64_t* pieces;  // their barriers, or null if there are no other blocks
  int piece_bits;

  __device__ __forceinline__ float* of(int block) const {
    return block == rank ? own : received + (block - (block > rank)) * stride;
  }
  // Where the sums of the experts from `expert` on lie, over a part of the hidden axis.
  __device__ __forceinline__ float* at(int split, int row, int expert) const {
    const int sharer = expert / S::kExperts;
    return of((split << sharer_bits) + sharer) + row * S::kPitch + expert - sharer * S::kExperts;
  }
};

// A token's logits, in the layout of select.cuh, and once more where the sums of the first part were.
template <int kSplits, int kLanes, class S, int kElements>
__device__ __forceinline__ void add_parts(const DenseRouter& op, const Parts<S>& parts, int row,
                                          float (&logits)[kElements]) {
  const int experts = op.select.experts;
  float4 quads[kSplits][kElements / 4];
#pragma unroll
  for (int s = 0; s < kSplits; ++s) {
#pragma unroll
    for (int c = 0; c < kElements / 4; ++c) {
      const int expert = expert_of<kLanes>(tile_lane<kLanes>(), 4 * c);
      quads[s][c] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
      if (expert < experts) quads[s][c] = *reinterpret_cast<const float4*>(parts.at(s, row, expert));
    }
  }
#pragma unroll
  for (int c = 0; c < kElements / 4; ++c) {
    const int expert = expert_of<kLanes>(tile_lane<kLanes>(), 4 * c);
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
    // An expert that does not exist may have got a NaN from an infinite x.
    if (expert + 1 >= experts) sum.y = -INFINITY;
    if (expert + 2 >= experts) sum.z = -INFINITY;
    if (expert + 3 >= experts) sum.w = -INFINITY;
    if ((kSplits > 1 || op.logit_bias != nullptr) && expert < experts) {
      *reinterpret_cast<float4*>(parts.at(0, row, expert)) = sum;
    }
    logits[4 * c + 0] = sum.x;
    logits[4 * c + 1] = sum.y;
    logits[4 * c + 2] = sum.z;
    logits[4 * c + 3] = sum.w;
  }
}

// Selects for `rows` tokens from first_token on.
template <KeyMode kMode, int kLanes, class S>
__device__ __forceinline__ void select_rows(const DenseRouter& op, const Plan& plan, const Parts<S>& parts,
                                            int64_t first_token, int rows, SelectScratch<32>* scratches) {
  constexpr int kTiles = 32 / kLanes;  // of a warp
  const ActivationTopk& select = op.select;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int tile = static_cast<int>(threadIdx.x) % 32 / kLanes;
  SelectScratch<kLanes>& scratch = reinterpret_cast<SelectScratch<kLanes>*>(&scratches[warp])[tile];
  // When all threads of the cluster have arrived here, no block reads another one's sums any more.
  const auto arrive = [&] {
    __syncwarp();
    if (parts.pieces != nullptr) cluster_arrive_relaxed();
  };
  if (warp * kTiles >= rows) arrive();
#pragma unroll 1
  for (int base = warp * kTiles; base < rows; base += S::kWarps * kTiles) {
    if (parts.pieces != nullptr) mbarrier_wait(&parts.pieces[base >> parts.piece_bits], 0);
    if (base + S::kWarps * kTiles >= rows) arrive();
    const bool exists = base + tile < rows;
    const int row = exists ? base + tile : base;
    const int64_t token = first_token + row;
    const bool wanted = exists && (select.token_mask == nullptr || select.token_mask[token]);
    float logits[S::kAllExperts / kLanes];
    if (plan.split_bits == 0) {
      add_parts<1, kLanes>(op, parts, row, logits);
    } else if (plan.split_bits == 1) {
      add_parts<2, kLanes>(op, parts, row, logits);
    } else {
      add_parts<4, kLanes>(op, parts, row, logits);
    }
    __syncwarp();
    const TokenOutput output{select.weights, select.expert_ids, select.chosen_logits, exists ? token * select.k : -1};
    const float* bias = select.bias == nullptr ? nullptr : select.bias + token * select.bias_stride;
    select_token<kMode, kLanes>(
        Selection{select.experts, select.k, select.scoring, select.groups}, logits, wanted, bias,
        [&](int expert) { return *parts.at(0, row, expert); }, output, scratch);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    route_tiles(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ DenseRouter op, const Plan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char raw[];
  __shared__ uint64_t full[kMaxStages];
  __shared__ uint64_t empty[kMaxStages];
  __shared__ uint2 empty_addresses[kMaxStages];
  __shared__ uint64_t pieces[kPieces];
  __shared__ SelectScratch<32> scratches[S::kWarps];
  // Aligned by an offset, so that the compiler still knows it for shared memory.
  char* shared = raw + (0u - shared_address(raw)) % 1024;
  const Ring ring{shared, full, empty_addresses};
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = static_cast<int>(block_of_cluster());
  const int cluster_bits = plan.sharer_bits + plan.split_bits;
  const int blocks = 1 << cluster_bits;
  const int sharers = 1 << plan.sharer_bits;
  const int sharer = rank & (sharers - 1);
  const int split = rank >> plan.sharer_bits;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x >> cluster_bits) * plan.tokens;
  constexpr int kDepth = S::kBoxes * kBoxDepth;
  const int all_steps = (op.hidden + kDepth - 1) / kDepth;
  const int first_step = (split * all_steps) >> plan.split_bits;
  const int steps = (((split + 1) * all_steps) >> plan.split_bits) - first_step;
  const int stage_bytes = S::stage_bytes(plan.tokens);
  const int box_bytes = stage_bytes / S::kBoxes;
  const bool is_producer = thread == S::kConsumers;

  const auto column_of = [&](int step, int box) { return ((first_step + step) * S::kBoxes + box) * kBoxDepth; };
  const auto copy_weight = [&](int step, int slot) {
    mbarrier_expect_bytes(&full[slot], stage_bytes);
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box) {
      copy_box(shared + slot * stage_bytes + box * box_bytes, weight_map, column_of(step, box), sharer * S::kExperts,
               &full[slot]);
    }
  };
  const auto copy_x = [&](int step, int slot, bool to_all) {
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box) {
      char* destination = shared + slot * stage_bytes + box * box_bytes + S::kExperts * kBoxRowBytes;
      if (to_all) {
        copy_box_to_blocks(destination, x_map, column_of(step, box), static_cast<int>(first_token), &full[slot],
                           static_cast<uint16_t>(((1 << sharers) - 1) << (rank - sharer)));
      } else {
        copy_box(destination, x_map, column_of(step, box), static_cast<int>(first_token), &full[slot]);
      }
    }
  };
  if (thread / 32 == S::kConsumers / 32) {
    const int slot = thread % 32;
    if (slot < plan.stages) {
      const int fetcher = slot & (sharers - 1);
      const bool fetches = fetcher == sharer;
      mbarrier_init(&full[slot], 1);
      mbarrier_init(&empty[slot], S::kConsumers / 32 * (fetches ? sharers : 1));
      empty_addresses[slot] = make_uint2(address_in_block(&empty[slot], rank),
                                         fetches ? 0 : address_in_block(&empty[slot], rank - sharer + fetcher));
    }
    if (slot < kPieces) mbarrier_init(&pieces[slot], 1);
    fence_mbarrier_init();
    __syncwarp();
    // As long as the other blocks' barriers may not exist, each block fetches all it needs.
    if (is_producer) {
      for (int step = 0; step < min(steps, plan.stages); ++step) {
        copy_weight(step, step);
        copy_x(step, step, false);
      }
    }
    __syncwarp();
  }
  __syncthreads();
  cluster_arrive_relaxed();
  cluster_wait();

  const auto sums_are_complete = [&] {
    fence_copies();
    __syncthreads();
    if (!plan.apart) {
      // Other blocks may multiply from what is to be overwritten.
      cluster_arrive_relaxed();
      cluster_wait();
    }
  };
  if (thread >= S::kConsumers) {
    if constexpr (S::kMovesRegisters) lower_registers<kFewerRegisters>();
    if (is_producer) {
      int slot = 0;
      uint32_t parity = 0;
      for (int step = plan.stages; step < steps; ++step) {
        mbarrier_wait(&empty[slot], parity);
        copy_weight(step, slot);
        if ((slot & (sharers - 1)) == sharer) copy_x(step, slot, sharers > 1);
        if (++slot == plan.stages) {
          slot = 0;
          parity ^= 1;
        }
      }
    }
    __syncwarp();
    sums_are_complete();
    // Not before, or a warp that is done early would take the registers that the others wait for.
    if constexpr (S::kMovesRegisters) raise_registers<kRegisters>();
  } else {
    if constexpr (S::kMovesRegisters) raise_registers<kMoreRegisters>();
    S::with_width(plan.tokens, [&](auto tokens) {
      constexpr int kTokens = decltype(tokens)::value;
      if (op.operand_dtype == DType::kBF16) {
        multiply<__nv_bfloat16, S, kTokens>(ring, plan.stages, steps);
      } else {
        multiply<__half, S, kTokens>(ring, plan.stages, steps);
      }
    });
    if constexpr (S::kMovesRegisters) lower_registers<kRegisters>();
    sums_are_complete();
  }

  // This block's share of the tile's tokens, those that exist.
  const int64_t left = op.select.rows - first_token;
  const int tokens = left < plan.tokens ? static_cast<int>(left) : plan.tokens;
  const auto first_row_of = [&](int block) { return (block * tokens) >> cluster_bits; };
  const int first_row = first_row_of(rank);
  const int rows = first_row_of(rank + 1) - first_row;
  float* sums = reinterpret_cast<float*>(shared);
  const auto piece_bits_of = [](int count) { return max(0, 32 - __clz(max(count, 1) - 1) - 3); };
  const Parts<S> parts{sums + first_row * S::kPitch,
                       reinterpret_cast<float*>(shared + plan.received),
                       ((plan.tokens + blocks - 1) >> cluster_bits) * S::kPitch,
                       rank,
                       plan.sharer_bits,
                       cluster_bits > 0 ? pieces : nullptr,
                       piece_bits_of(rows)};
  if (cluster_bits > 0 && thread / 32 == S::kConsumers / 32) {
    constexpr int kRowBytes = S::kPitch * 4;
    const int lane = thread % 32;
    if (lane < kPieces) {
      const int begin = min(lane << parts.piece_bits, rows);
      const int end = min((lane + 1) << parts.piece_bits, rows);
      mbarrier_expect_bytes(&pieces[lane], (blocks - 1) * (end - begin) * kRowBytes);
    }
    // Block `rank` is in the place of rank - 1 for those before it.
    for (int i = lane; i < blocks * kPieces; i += 32) {
      const int block = i & (blocks - 1);
      const int piece = i >> cluster_bits;
      const int first = first_row_of(block);
      const int count = first_row_of(block + 1) - first;
      const int bits = piece_bits_of(count);
      const int begin = min(piece << bits, count);
      const int end = min((piece + 1) << bits, count);
      if (block != rank && begin < end) {
        float* destination = parts.received + (rank - (rank > block)) * parts.stride + begin * S::kPitch;
        copy_in_cluster(address_in_block(destination, block), sums + (first + begin) * S::kPitch,
                        (end - begin) * kRowBytes, address_in_block(&pieces[piece], block));
      }
    }
    __syncwarp();
  }

  const bool few = op.select.k > kMaxTileTopK<16> || rows <= S::kWarps;
  const auto select = [&](auto mode) {
    constexpr KeyMode kMode = decltype(mode)::value;
    if (few || kMode == KeyMode::kGroups) {
      select_rows<kMode, 32>(op, plan, parts, first_token + first_row, rows, scratches);
    } else if constexpr (kMode != KeyMode::kGroups) {
      select_rows<kMode, 16>(op, plan, parts, first_token + first_row, rows, scratches);
    }
  };
  if (op.select.groups.num_groups > 1) {
    select(std::integral_constant<KeyMode, KeyMode::kGroups>{});
  } else if (op.select.bias != nullptr) {
    select(std::integral_constant<KeyMode, KeyMode::kScores>{});
  } else {
    select(std::integral_constant<KeyMode, KeyMode::kLogits>{});
  }
  __syncwarp();
  if (cluster_bits > 0) cluster_wait();
#endif
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
template <class S>
int place_in_shared_memory(Plan& plan, int most) {
  constexpr int kEnoughBoxes = 8;  // under way, so that a ring that leaves room for the sums is no slower
  const int cluster_bits = plan.sharer_bits + plan.split_bits;
  const int stage_bytes = S::stage_bytes(plan.tokens);
  const int share = (plan.tokens + (1 << cluster_bits) - 1) >> cluster_bits;
  const int sums_bytes = plan.tokens * S::kPitch * 4;
  const int received_bytes = share * S::kPitch * 4 * ((1 << cluster_bits) - 1);
  // A slot is always filled by the same sharer.
  const auto stages_in = [&](int bytes) {
    return std::min(bytes / stage_bytes, kMaxStages) >> plan.sharer_bits << plan.sharer_bits;
  };
  plan.stages = stages_in(most - received_bytes);
  plan.apart = cluster_bits == 0 || plan.stages * S::kBoxes >= kEnoughBoxes;
  if (!plan.apart) plan.stages = stages_in(most);
  plan.received = std::max(sums_bytes, plan.apart ? plan.stages * stage_bytes : 0);
  const int bytes = std::max(plan.stages * stage_bytes, plan.received + received_bytes);
  return plan.stages > 0 && bytes <= most ? bytes : 0;
}

template <class S>
cudaError_t launch_shape(const DenseRouter& op, Plan plan, cudaStream_t stream) {
  CUtensorMap x_map, weight_map;
  cudaError_t error = make_tensor_map(x_map, op.operand_dtype, op.x, op.select.rows, op.hidden, plan.tokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(weight_map, op.operand_dtype, op.weight, op.select.experts, op.hidden, S::kExperts);
  if (error != cudaSuccess) return error;

  constexpr int kStaticBytes = S::kWarps * sizeof(SelectScratch<32>) + kMaxStages * 24 + kPieces * 8 + 64;
  constexpr int kAlignment = 1024;
  const int bytes = place_in_shared_memory<S>(plan, kMaxSharedBytes - kStaticBytes - kAlignment);
  if (bytes == 0) return cudaErrorInvalidConfiguration;
  error = cudaFuncSetAttribute(route_tiles<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes + kAlignment);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (op.select.rows + plan.tokens - 1) / plan.tokens;
  const int cluster_size = 1 << (plan.sharer_bits + plan.split_bits);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(cluster_size);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tiles * cluster_size));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes) + kAlignment;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, route_tiles<S>, x_map, weight_map, op, plan);
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

// The smallest tile of which one wave has them all is the best.
struct Choice {
  int tokens;
  int split_bits;
};
constexpr Choice kChoices[] = {{24, 2}, {40, 2}, {56, 2}, {72, 2}, {56, 1}, {72, 1}, {112, 1}, {144, 1}};

Plan choose(const DenseRouter& op) {
  const int64_t rows = op.select.rows;
  Plan plan{};
  plan.sharer_bits = op.select.experts > 128;
  for (const Choice& choice : kChoices) {
    if (rows <= static_cast<int64_t>(choice.tokens) * kClusters[plan.sharer_bits + choice.split_bits]) {
      plan.tokens = choice.tokens;
      plan.split_bits = choice.split_bits;
      return plan;
    }
  }
  // Tiles of one block, in as many waves as it takes.
  plan.sharer_bits = 0;
  plan.tokens = rows <= 96 * kClusters[0] ? 96 : 128;
  return plan;
}

// What the kernel can do.
bool supports(const DenseRouter& op) {
  const ActivationTopk& select = op.select;
  return op.operand_dtype != DType::kF32 && op.hidden % 8 == 0 && select.experts <= kMaxPrefillExperts &&
         select.k <= kMaxTileTopK<32> && select.rows <= INT32_MAX - 1024 &&
         (select.groups.num_groups == 1 || tile_can_group(32, select.experts, select.groups.num_groups)) &&
         devices_can();
}

// Where it is faster than XLA's product and the kernel of activation_topk, as measured on an H100.
bool pays(const DenseRouter& op) {
  const int64_t rows = op.select.rows;
  const Plan plan = choose(op);
  if (op.select.experts > 256) return plan.split_bits > 0 && plan.tokens > 72;
  if (plan.split_bits > 0) return true;
  // The last wave must not leave much of the chip idle.
  const int64_t tiles = (rows + plan.tokens - 1) / plan.tokens;
  const int64_t waves = (tiles + kClusters[0] - 1) / kClusters[0];
  return tiles * 100 >= waves * kClusters[0] * 92;
}

}  // namespace

bool prefill_fuses(const DenseRouter& op) { return supports(op) && pays(op); }

cudaError_t launch_prefill(const DenseRouter& op, cudaStream_t stream) {
  if (!prefill_fuses(op)) return cudaErrorNotSupported;
  const Plan plan = choose(op);
  if (op.select.experts > 256) return launch_shape<Shape<384, 3, 1, 112, 144>>(op, plan, stream);
  if (plan.split_bits == 0) return launch_shape<Shape<256, 4, 1, 96, 128>>(op, plan, stream);
  if (plan.tokens <= 72) return launch_shape<Shape<256, 2, 2, 24, 40, 56, 72>>(op, plan, stream);
  return launch_shape<Shape<256, 2, 1, 112, 144>>(op, plan, stream);
}

}  // namespace jax_router::cuda
