// dense_router for many tokens: logits = x @ weight.T by warpgroup matrix products, selected from in the same kernel.
//
// A thread block owns a tile of tokens x the whole expert axis x one slice of the hidden axis. One thread keeps the
// copy engine busy: stages of kDepth hidden elements of both operands go into a ring of shared memory, and two
// warpgroups multiply them into registers. Then the sums go to shared memory, in place of the ring, and all warps
// select. A cluster of blocks is `splits` slices of the hidden axis by `sharers` neighbouring tiles. The sharers load
// the weight once between them. The slices are added up through distributed shared memory, in their order, and each of
// their blocks selects for its share of the tokens: so few tokens fill the chip too. Where the last tiles would leave
// most of the chip idle, they are split and the ones before them are not. So the order in which a token's products are
// added depends on the number of tokens, as with any library's product; it is the same in every run.
//
// Floor: x and the weight are read once from device memory, or rows * experts * hidden multiply-adds on tensor cores.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cluster.cuh"
#include "hopper.cuh"
#include "kernels.h"
#include "load.cuh"
#include "select.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kDepth = 64;  // hidden elements a stage: 128 bytes a row
constexpr int kMaxCluster = 8;
constexpr int kBoxes = 2;  // that the weight's part of a stage comes in, one from each of two blocks that share it
constexpr int kMaxPrefillExperts = 256;  // wider, the product and the selection apart are faster
constexpr int kConsumers = 256;          // threads of the two warpgroups that multiply
constexpr int kThreads = kConsumers + 128;
constexpr int kSharedBytes = 227 * 1024;

// Registers a thread: of all at the launch and of those that select, of those that multiply, of those that only copy.
constexpr int kRegisters = 168;
constexpr int kMoreRegisters = 208;
constexpr int kFewerRegisters = 88;
static_assert(kMoreRegisters * kConsumers + kFewerRegisters * (kThreads - kConsumers) <= kRegisters * kThreads);

// How a launch divides the work. Blocks are in clusters of `cluster`; in the first `whole_clusters` of these each block
// has a tile of its own, in the others `splits` blocks have one tile between them.
struct Plan {
  int cluster;
  int whole_clusters;
  int splits;
};

// A tile of kTokens x kExperts. One warpgroup computes 64 x kColumns of it.
template <int kTokens_, int kExperts_>
struct Shape {
  static constexpr int kTokens = kTokens_;
  static constexpr int kExperts = kExperts_;
  // Whether the warpgroups have the experts between them, and not the tokens.
  static constexpr bool kSplitsExperts = kTokens == 64;
  static constexpr int kColumns = kSplitsExperts ? kExperts / 2 : kExperts;
  static_assert(kSplitsExperts ? kColumns == 128 : kColumns == 128 || kColumns == 256, "what wgmma takes");

  struct Stage {
    uint16_t x[kTokens * kDepth];
    uint16_t weight[kExperts * kDepth];
  };
  static constexpr int kPitch = kExperts + 8;  // of a row of sums: rows that are written together differ in their banks
  struct Results {
    float sums[kTokens * kPitch];
    SelectScratch<32> scratch[kThreads / 32];
  };
  static constexpr int kStages = (kSharedBytes - 1024 - 256) / static_cast<int>(sizeof(Stage));
  struct Shared {
    union {
      Stage stages[kStages];
      Results results;
    };
    uint64_t full[kStages];
    uint64_t empty[kStages];
  };
};

// What a block has to do.
struct Part {
  int64_t first_token;
  int split;
  int splits;
  int sharers;
  int first_sharer;  // the rank in the cluster of the first block that has the same slice of the hidden axis
};

template <int kTokens>
__device__ __forceinline__ Part part_of_block(const Plan& plan) {
  const int cluster = static_cast<int>(blockIdx.x) / plan.cluster;
  const int rank = static_cast<int>(block_of_cluster());
  const bool whole = cluster < plan.whole_clusters;
  Part part;
  part.splits = whole ? 1 : plan.splits;
  part.sharers = plan.cluster / part.splits;
  part.split = rank / part.sharers;
  part.first_sharer = part.split * part.sharers;
  const int64_t first_tile = whole ? static_cast<int64_t>(cluster) * plan.cluster
                                   : static_cast<int64_t>(plan.whole_clusters) * plan.cluster +
                                         static_cast<int64_t>(cluster - plan.whole_clusters) * part.sharers;
  part.first_token = (first_tile + rank - part.first_sharer) * kTokens;
  return part;
}

// One warpgroup's products of all steps.
template <class T, class S>
__device__ __forceinline__ void multiply(typename S::Shared& shared, int steps, const Part& part,
                                         float (&sums)[S::kColumns / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = static_cast<int>(threadIdx.x) / 128;
  const auto release = [&](int slot) {
    if (part.sharers == 1) {
      if (lane == 0) mbarrier_arrive(&shared.empty[slot]);
    } else if (lane < part.sharers) {
      mbarrier_arrive_in_block(&shared.empty[slot], part.first_sharer + lane);
    }
  };
  int slot = 0;
  int last_slot = 0;
  uint32_t parity = 0;
  for (int step = 0; step < steps; ++step) {
    typename S::Stage& stage = shared.stages[slot];
    mbarrier_wait(&shared.full[slot], parity);
    const uint64_t x = wgmma_descriptor(stage.x + (S::kSplitsExperts ? 0 : group * 64 * kDepth));
    const uint64_t weight = wgmma_descriptor(stage.weight + (S::kSplitsExperts ? group * S::kColumns * kDepth : 0));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      wgmma(T{}, sums, x + 2 * k, weight + 2 * k);  // 32 bytes on along the hidden axis
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) release(last_slot);  // the products of the step before are finished
    last_slot = slot;
    if (++slot == S::kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
  wgmma_wait<0>();
  if (steps > 0) release(last_slot);
}

// Selects for the tokens first_row, first_row + 1... < rows of the tile, whose logits are complete in shared memory.
template <KeyMode kMode, int kLanes, class S>
__device__ __forceinline__ void select_rows(const ActivationTopk& op, int64_t first_token, int first_row, int rows,
                                            typename S::Shared& shared) {
  constexpr int kElements = S::kExperts / kLanes;
  constexpr int kTiles = 32 / kLanes;  // of a warp
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int tile = static_cast<int>(threadIdx.x) % 32 / kLanes;
  SelectScratch<kLanes>& scratch = reinterpret_cast<SelectScratch<kLanes>*>(&shared.results.scratch[warp])[tile];
  const int64_t left = op.rows - first_token;
  rows = left < rows ? static_cast<int>(left) : rows;
#pragma unroll 1
  for (int base = first_row + warp * kTiles; base < rows; base += kThreads / 32 * kTiles) {
    const bool exists = base + tile < rows;
    const int row = exists ? base + tile : base;
    const int64_t token = first_token + row;
    const bool wanted = exists && (op.token_mask == nullptr || op.token_mask[token]);
    const float* logits_row = shared.results.sums + row * S::kPitch;
    float logits[kElements];
#pragma unroll
    for (int c = 0; c < kElements / 4; ++c) {
      const float4 quad = *reinterpret_cast<const float4*>(logits_row + expert_of<kLanes>(tile_lane<kLanes>(), 4 * c));
      logits[4 * c + 0] = quad.x;
      logits[4 * c + 1] = quad.y;
      logits[4 * c + 2] = quad.z;
      logits[4 * c + 3] = quad.w;
    }
    const TokenOutput output{op.weights, op.expert_ids, op.chosen_logits, exists ? token * op.k : -1};
    const float* bias = op.bias == nullptr ? nullptr : op.bias + token * op.bias_stride;
    select_token<kMode, kLanes>(
        Selection{op.experts, op.k, op.scoring, op.groups}, logits, wanted, bias,
        [&](int expert) { return logits_row[expert]; }, output, scratch);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    route_tiles(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                const __grid_constant__ DenseRouter op, const Plan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = typename S::Shared;
  extern __shared__ char raw[];
  // By an offset, so that the compiler still knows it for shared memory.
  auto& shared = *reinterpret_cast<Shared*>(raw + (0u - shared_address(raw)) % 1024);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Part part = part_of_block<S::kTokens>(plan);
  const int rank = static_cast<int>(block_of_cluster());
  const int all_steps = (op.hidden + kDepth - 1) / kDepth;
  const int first_step = part.split * all_steps / part.splits;
  const int steps = (part.split + 1) * all_steps / part.splits - first_step;

  if (threadIdx.x == 0) {
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(weight_map);
    for (int i = 0; i < S::kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kConsumers / 32 * part.sharers);
    }
    fence_mbarrier_init();
  }
  __syncwarp();
  cluster_arrive_relaxed();
  cluster_wait();

  const auto sums_are_complete = [&] {
    if (part.splits > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  };
  if (threadIdx.x >= kConsumers) {
    lower_registers<kFewerRegisters>();
    if (threadIdx.x == kConsumers) {
      constexpr int kBoxRows = S::kExperts / kBoxes;
      const int own_boxes = kBoxes / part.sharers;
      const auto everyone = static_cast<uint16_t>(((1 << part.sharers) - 1) << part.first_sharer);
      int slot = 0;
      uint32_t parity = 1;
      const auto wait_for_slot = [&] { mbarrier_wait(&shared.empty[slot], parity); };
      const auto next_slot = [&] {
        if (++slot == S::kStages) {
          slot = 0;
          parity ^= 1;
        }
      };
      for (int step = 0; step < steps; ++step, next_slot()) {
        typename S::Stage& stage = shared.stages[slot];
        wait_for_slot();
        mbarrier_expect_bytes(&shared.full[slot], sizeof(typename S::Stage));
        const int column = (first_step + step) * kDepth;
        copy_box(stage.x, x_map, column, static_cast<int>(part.first_token), &shared.full[slot]);
        for (int box = (rank - part.first_sharer) * own_boxes, end = box + own_boxes; box < end; ++box) {
          uint16_t* destination = stage.weight + box * kBoxRows * kDepth;
          if (part.sharers > 1) {
            copy_box_to_blocks(destination, weight_map, column, box * kBoxRows, &shared.full[slot], everyone);
          } else {
            copy_box(destination, weight_map, column, box * kBoxRows, &shared.full[slot]);
          }
        }
      }
      // This block may end only when the sharers have sent all their arrivals.
      for (int i = 0; i < S::kStages; ++i, next_slot()) wait_for_slot();
    }
    __syncwarp();
    // Not before, or a warp that is done early would take the registers that the others wait for.
    sums_are_complete();
    raise_registers<kRegisters>();
  } else {
    raise_registers<kMoreRegisters>();
    float sums[S::kColumns / 2];
#pragma unroll
    for (int i = 0; i < S::kColumns / 2; ++i) sums[i] = 0.0f;
    if (op.operand_dtype == DType::kBF16) {
      multiply<__nv_bfloat16, S>(shared, steps, part, sums);
    } else {
      multiply<__half, S>(shared, steps, part, sums);
    }

    asm volatile("bar.sync 1, 256;" ::: "memory");  // nobody multiplies from the ring any more
    const int group = warp / 4;
    const int experts = op.select.experts;
    const float* logit_bias = part.split == 0 ? op.logit_bias : nullptr;
    const int first_row = (S::kSplitsExperts ? 0 : group * 64) + warp % 4 * 16 + lane / 4;
    const int first_column = (S::kSplitsExperts ? group * S::kColumns : 0) + lane % 4 * 2;
    float* place = shared.results.sums + first_row * S::kPitch + first_column;
#pragma unroll
    for (int i = 0; i < S::kColumns / 2; i += 4) {
      const int column = i * 2;
      float2 low = make_float2(sums[i], sums[i + 1]);
      float2 high = make_float2(sums[i + 2], sums[i + 3]);
      const int expert = first_column + column;
      if (logit_bias != nullptr) {
        const float2 added = make_float2(expert < experts ? logit_bias[expert] : 0.0f,
                                         expert + 1 < experts ? logit_bias[expert + 1] : 0.0f);
        low = make_float2(low.x + added.x, low.y + added.y);
        high = make_float2(high.x + added.x, high.y + added.y);
      }
      // Not by adding: an expert that does not exist may have got a NaN from an infinite x.
      if (expert >= experts) low.x = high.x = -INFINITY;
      if (expert + 1 >= experts) low.y = high.y = -INFINITY;
      *reinterpret_cast<float2*>(place + column) = low;
      *reinterpret_cast<float2*>(place + 8 * S::kPitch + column) = high;
    }
    lower_registers<kRegisters>();
    sums_are_complete();
  }

  const int first_row = part.split * S::kTokens / part.splits;
  const int own_rows = (part.split + 1) * S::kTokens / part.splits - first_row;
  if (part.splits > 1) {
    constexpr int kQuads = S::kExperts / 4;
    for (int i = static_cast<int>(threadIdx.x); i < own_rows * kQuads; i += kThreads) {
      const int row = first_row + i / kQuads;
      float* place = shared.results.sums + row * S::kPitch + i % kQuads * 4;
      float4 parts[kMaxCluster];
#pragma unroll
      for (int s = 0; s < kMaxCluster; ++s) {
        if (s < part.splits) {
          parts[s] = remote_load_quad(
              address_in_block(place, static_cast<uint32_t>(s * part.sharers + rank - part.first_sharer)));
        }
      }
      float4 sum = parts[0];
#pragma unroll
      for (int s = 1; s < kMaxCluster; ++s) {
        if (s < part.splits) {
          sum.x += parts[s].x;
          sum.y += parts[s].y;
          sum.z += parts[s].z;
          sum.w += parts[s].w;
        }
      }
      *reinterpret_cast<float4*>(place) = sum;
    }
    cluster_arrive();  // waited for below: until then the other blocks may still read from this one
    __syncthreads();
  }

  const bool few = op.select.k > kMaxTileTopK<16> || own_rows <= kThreads / 32;
  const auto select = [&](auto mode) {
    constexpr KeyMode kMode = decltype(mode)::value;
    if (few || kMode == KeyMode::kGroups) {
      select_rows<kMode, 32, S>(op.select, part.first_token, first_row, first_row + own_rows, shared);
    } else {
      select_rows<kMode == KeyMode::kGroups ? KeyMode::kScores : kMode, 16, S>(op.select, part.first_token, first_row,
                                                                               first_row + own_rows, shared);
    }
  };
  if (op.select.groups.num_groups > 1) {
    select(std::integral_constant<KeyMode, KeyMode::kGroups>{});
  } else if (op.select.bias != nullptr) {
    select(std::integral_constant<KeyMode, KeyMode::kScores>{});
  } else {
    select(std::integral_constant<KeyMode, KeyMode::kLogits>{});
  }
  if (part.splits > 1) cluster_wait();
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
    return reinterpret_cast<EncodeTensorMap>(error == cudaSuccess && found == cudaDriverEntryPointSuccess ? entry
                                                                                                          : nullptr);
  }();
  return function;
}

// Boxes of box_rows x kDepth of a matrix [rows, hidden].
cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* matrix, int64_t rows, int hidden, int box_rows) {
  const EncodeTensorMap encode = encode_tensor_map();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(hidden), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(hidden) * 2};
  const cuuint32_t box[] = {kDepth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(matrix), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class S>
cudaError_t launch_shape(const DenseRouter& op, const Plan& plan, cudaStream_t stream) {
  CUtensorMap x_map, weight_map;
  cudaError_t error = make_tensor_map(x_map, op.operand_dtype, op.x, op.select.rows, op.hidden, S::kTokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(weight_map, op.operand_dtype, op.weight, op.select.experts, op.hidden, S::kExperts / kBoxes);
  if (error != cudaSuccess) return error;

  constexpr int kBytes = static_cast<int>(sizeof(typename S::Shared)) + 1023;
  static_assert(kBytes <= kSharedBytes);
  error = cudaFuncSetAttribute(route_tiles<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (op.select.rows + S::kTokens - 1) / S::kTokens;
  const int64_t rest = std::max<int64_t>(tiles - static_cast<int64_t>(plan.whole_clusters) * plan.cluster, 0);
  const int sharers = plan.cluster / plan.splits;
  const int64_t clusters = plan.whole_clusters + (rest + sharers - 1) / sharers;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * plan.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, route_tiles<S>, x_map, weight_map, op, plan);
}

// So many clusters of 1, 2, ... 8 such blocks an H100 holds at once: some of its processors find no company.
constexpr int kClustersAtOnce[kMaxCluster] = {132, 66, 39, 30, 22, 17, 15, 15};

// The most blocks that can have a tile between them with all tiles under way at once; 1 where there are too many tiles.
int splits_of(int64_t tiles) {
  int splits = kMaxCluster;
  while (splits > 1 && tiles > kClustersAtOnce[splits - 1]) --splits;
  return splits;
}

// For more tiles than that. Pairs of tiles, and where the last tiles are few enough, pairs of blocks for one each.
Plan plan_of_many(int64_t tiles) {
  const int64_t last = tiles % kClustersAtOnce[0];
  const int64_t whole = last <= kClustersAtOnce[1] ? tiles - last : tiles + 1;
  return Plan{2, static_cast<int>(whole / 2), 2};
}

Plan plan_of(int64_t tiles) {
  const int splits = splits_of(tiles);
  return splits > 1 ? Plan{splits, 0, splits} : plan_of_many(tiles);
}

bool device_is_hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

}  // namespace

bool prefill_supports(const DenseRouter& op) {
  const ActivationTopk& select = op.select;
  const bool aligned = reinterpret_cast<uintptr_t>(op.x) % 16 == 0 && reinterpret_cast<uintptr_t>(op.weight) % 16 == 0;
  const bool groups = select.groups.num_groups == 1 || tile_can_group(32, select.experts, select.groups.num_groups);
  return op.operand_dtype != DType::kF32 && op.hidden > 0 && op.hidden % 8 == 0 && aligned &&
         select.experts <= kMaxPrefillExperts && select.k <= kMaxTileTopK<32> && groups &&
         select.rows <= INT32_MAX - 1024 && device_is_hopper();
}

cudaError_t launch_prefill(const DenseRouter& op, cudaStream_t stream) {
  if (op.select.rows == 0 || op.select.k == 0) return cudaSuccess;
  if (!prefill_supports(op)) return cudaErrorNotSupported;
  const int64_t tiles = (op.select.rows + 127) / 128;
  if (op.select.experts <= 128) return launch_shape<Shape<128, 128>>(op, plan_of(tiles), stream);
  const int64_t half_tiles = (op.select.rows + 63) / 64;
  if (splits_of(half_tiles) > 1) return launch_shape<Shape<64, 256>>(op, plan_of(half_tiles), stream);
  return launch_shape<Shape<128, 256>>(op, plan_of(tiles), stream);
}

}  // namespace jax_router::cuda
