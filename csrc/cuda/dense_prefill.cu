// dense_router for many tokens: logits = x @ weight.T by warpgroup matrix products, selected from in the same kernel.
//
// A thread block owns a tile of tokens x the whole expert axis x one slice of the hidden axis. One thread keeps the copy
// engine busy: stages of kDepth hidden elements of both operands go into a ring of shared memory, and two warpgroups
// multiply them into registers. Then the sums go to shared memory, in place of the ring, and all warps select.
// A cluster of blocks is `splits` slices of the hidden axis by `sharers` neighbouring tiles. The sharers load the weight
// once between them. The slices are added up through distributed shared memory, in their order, and each of their blocks
// selects for its share of the tokens: so few tokens fill the chip too. Where the last tiles would leave most of the
// chip idle, they are split and the ones before them are not.
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

constexpr int kMaxCluster = 8;
constexpr int kConsumers = 256;   // threads of the two warpgroups that multiply
constexpr int kSharedBytes = 227 * 1024;

// How a launch divides the work. Blocks are in clusters of `cluster`; in the first `whole_clusters` of these each block
// has a tile of its own, in the others `splits` blocks have one tile between them.
struct Plan {
  int cluster;
  int whole_clusters;
  int splits;
  int prefetch;     // how many steps ahead of its copy a part of x is brought into the L2 cache
  int prefetchers;  // so many tiles bring the weight there between them
  int boxes;        // that the weight's part of a stage comes in: at least the most blocks that share it
};

// A tile of kTokens x kExperts, of which one warpgroup computes kRowBlocks x kColumnBlocks blocks of 64 x kWidth.
template <int kTokens_, int kExperts_, int kExtraThreads, int kMostWidth = 256, int kDepth_ = 32>
struct Shape {
  static constexpr int kDepth = kDepth_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kExperts = kExperts_;
  static constexpr bool kSplitsExperts = kTokens == 64;  // between the warpgroups; else they split the tokens
  static constexpr int kColumns = kSplitsExperts ? kExperts / 2 : kExperts;  // of one warpgroup
  static constexpr int kBlocks = kColumns > kMostWidth ? 2 : 1;
  static constexpr int kWidth = kColumns / kBlocks;
  static constexpr int kThreads = kConsumers + 128 + kExtraThreads;

  // Registers a thread: of a block at its launch, and then of those that multiply and of the others.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kMoreRegisters = kColumns == 384 ? (kThreads == 384 ? 232 : 224) : kThreads == 384 ? 208 : 168;
  static constexpr int kFewerRegisters =
      std::min(kRegisters, (kRegisters * kThreads - kMoreRegisters * kConsumers) / (kThreads - kConsumers) / 8 * 8);

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
  int64_t tile;
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
  part.tile = first_tile + rank - part.first_sharer;
  part.first_token = part.tile * kTokens;
  return part;
}

// One warpgroup's products of all steps.
template <class T, class S>
__device__ __forceinline__ void multiply(typename S::Shared& shared, int steps, const Part& part,
                                         float (&sums)[S::kBlocks][S::kWidth / 2]) {
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
    const uint64_t x = wgmma_descriptor<2 * S::kDepth>(stage.x + (S::kSplitsExperts ? 0 : group * 64 * S::kDepth));
    const uint64_t weight = wgmma_descriptor<2 * S::kDepth>(stage.weight + (S::kSplitsExperts ? group * S::kColumns * S::kDepth : 0));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::kDepth / 16; ++k) {
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) {
        // 32 bytes on along the hidden axis, kWidth rows on along the experts.
        wgmma(T{}, sums[b], x + 2 * k, weight + S::kDepth / 8 * S::kWidth * b + 2 * k);
      }
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
  for (int base = first_row + warp * kTiles; base < rows; base += S::kThreads / 32 * kTiles) {
    const bool exists = base + tile < rows;
    const int row = exists ? base + tile : base;
    const int64_t token = first_token + row;
    const bool wanted = exists && (op.token_mask == nullptr || op.token_mask[token]);
    const float* logits_row = shared.results.sums + row * S::kPitch;
    float logits[kElements];
#pragma unroll
    for (int c = 0; c < kElements / 4; ++c) {
      const float4 quad =
          *reinterpret_cast<const float4*>(logits_row + expert_of<kLanes>(tile_lane<kLanes>(), 4 * c));
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

__device__ __forceinline__ float4 remote_quad(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
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
  const int all_steps = (op.hidden + S::kDepth - 1) / S::kDepth;
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
    if constexpr (S::kFewerRegisters < S::kRegisters) lower_registers<S::kFewerRegisters>();
    if (threadIdx.x == kConsumers) {
      const int box_rows = S::kExperts / plan.boxes;
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
        if (step == S::kStages && plan.prefetch > 0) {
          for (int64_t i = part.tile; i < steps; i += plan.prefetchers) {
            for (int box = 0; box < plan.boxes; ++box) {
              prefetch_box(weight_map, (first_step + static_cast<int>(i)) * S::kDepth, box * box_rows);
            }
          }
          for (int i = step + 1; i < min(step + plan.prefetch, steps); ++i) {
            prefetch_box(x_map, (first_step + i) * S::kDepth, static_cast<int>(part.first_token));
          }
        }
        if (step >= S::kStages && step + plan.prefetch < steps && plan.prefetch > 0) {
          prefetch_box(x_map, (first_step + step + plan.prefetch) * S::kDepth, static_cast<int>(part.first_token));
        }
        typename S::Stage& stage = shared.stages[slot];
        wait_for_slot();
        mbarrier_expect_bytes(&shared.full[slot], sizeof(typename S::Stage));
        const int column = (first_step + step) * S::kDepth;
        copy_box(stage.x, x_map, column, static_cast<int>(part.first_token), &shared.full[slot]);
        const int boxes = plan.boxes / part.sharers;
        for (int box = (rank - part.first_sharer) * boxes, end = box + boxes; box < end; ++box) {
          uint16_t* destination = stage.weight + box * box_rows * S::kDepth;
          if (part.sharers > 1) {
            copy_box_to_blocks(destination, weight_map, column, box * box_rows, &shared.full[slot], everyone);
          } else {
            copy_box(destination, weight_map, column, box * box_rows, &shared.full[slot]);
          }
        }
      }
      // This block may end only when the sharers have sent all their arrivals.
      for (int i = 0; i < S::kStages; ++i, next_slot()) wait_for_slot();
    }
    __syncwarp();
    // Not before, or a warp that is done early would take the registers that the others wait for.
    sums_are_complete();
    if constexpr (S::kFewerRegisters < S::kRegisters) raise_registers<S::kRegisters>();
  } else {
    raise_registers<S::kMoreRegisters>();
    float sums[S::kBlocks][S::kWidth / 2];
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kWidth / 2; ++i) sums[b][i] = 0.0f;
    }
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
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < S::kWidth / 2; i += 4) {
        const int column = b * S::kWidth + i * 2;
        float2 low = make_float2(sums[b][i], sums[b][i + 1]);
        float2 high = make_float2(sums[b][i + 2], sums[b][i + 3]);
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
    }
    lower_registers<S::kRegisters>();
    sums_are_complete();
  }

  const int first_row = part.split * S::kTokens / part.splits;
  const int own_rows = (part.split + 1) * S::kTokens / part.splits - first_row;
  if (part.splits > 1) {
    constexpr int kQuads = S::kExperts / 4;
    for (int i = static_cast<int>(threadIdx.x); i < own_rows * kQuads; i += S::kThreads) {
      const int row = first_row + i / kQuads;
      float* place = shared.results.sums + row * S::kPitch + i % kQuads * 4;
      float4 parts[kMaxCluster];
#pragma unroll
      for (int s = 0; s < kMaxCluster; ++s) {
        if (s < part.splits) {
          parts[s] = remote_quad(
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

#ifdef JR_PREFILL_TUNE
  if (op.select.logits != nullptr) {
    float* out = static_cast<float*>(const_cast<void*>(op.select.logits));
    for (int i = threadIdx.x; i < own_rows * op.select.experts; i += S::kThreads) {
      const int row = first_row + i / op.select.experts;
      const int e = i % op.select.experts;
      if (part.first_token + row < op.select.rows) {
        out[(part.first_token + row) * op.select.experts + e] = shared.results.sums[row * S::kPitch + e];
      }
    }
  }
  if (op.select.k > 0)
#endif
  {
  const bool few = op.select.k > kMaxTileTopK<16> || own_rows <= S::kThreads / 32;
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

// Boxes of box_rows x depth of a matrix [rows, hidden].
cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* matrix, int64_t rows, int hidden, int box_rows,
                            int depth) {
  const EncodeTensorMap encode = encode_tensor_map();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(hidden), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(hidden) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(depth), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(matrix), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             depth == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class S>
cudaError_t launch_shape(const DenseRouter& op, const Plan& plan, cudaStream_t stream) {
  CUtensorMap x_map, weight_map;
  cudaError_t error = make_tensor_map(x_map, op.operand_dtype, op.x, op.select.rows, op.hidden, S::kTokens, S::kDepth);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(weight_map, op.operand_dtype, op.weight, op.select.experts, op.hidden,
                          S::kExperts / plan.boxes, S::kDepth);
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
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, route_tiles<S>, x_map, weight_map, op, plan);
}

#ifdef JR_PREFILL_TUNE
template <class S>
int capacity(int cluster_size) {
  constexpr int kBytes = static_cast<int>(sizeof(typename S::Shared)) + 1023;
  cudaFuncSetAttribute(route_tiles<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster_size * 132);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int n = -1;
  cudaOccupancyMaxActiveClusters(&n, route_tiles<S>, &config);
  return n;
}
#endif

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
  return op.operand_dtype != DType::kF32 && op.hidden > 0 && op.hidden % 8 == 0 && aligned && select.experts <= 384 &&
         select.k <= kMaxTileTopK<32> && groups && select.rows <= INT32_MAX - 1024 && device_is_hopper();
}

#ifdef JR_PREFILL_TUNE
extern "C" int jr_capacity(int cluster_size) { return capacity<Shape<128, 256, 0>>(cluster_size); }
extern "C" int jr_tune[8];
int jr_tune[8] = {};
#endif

cudaError_t launch_prefill(const DenseRouter& op, cudaStream_t stream) {
  if (op.select.rows == 0) return cudaSuccess;
  if (!prefill_supports(op)) return cudaErrorNotSupported;
#ifdef JR_PREFILL_TUNE
  const int tile = jr_tune[3] < 5 ? 128 : 64;
  const int64_t tiles = (op.select.rows + tile - 1) / tile;
  const Plan plan{jr_tune[0], (int)std::min<int64_t>(jr_tune[1], (tiles + jr_tune[0] - 1) / jr_tune[0]), jr_tune[2], jr_tune[5], (int)std::min<int64_t>(tiles, 128), jr_tune[4]};
  switch (jr_tune[3]) {
    case 0: return launch_shape<Shape<128, 256, 0>>(op, plan, stream);
    case 1: return launch_shape<Shape<128, 256, 0, 256, 64>>(op, plan, stream);
    case 2: return launch_shape<Shape<128, 384, 128>>(op, plan, stream);
    case 3: return launch_shape<Shape<128, 384, 0, 256, 64>>(op, plan, stream);
    case 4: return launch_shape<Shape<128, 128, 0>>(op, plan, stream);
    case 5: return launch_shape<Shape<64, 256, 0>>(op, plan, stream);
    case 6: return launch_shape<Shape<64, 384, 0>>(op, plan, stream);
    case 7: return launch_shape<Shape<64, 384, 0, 256, 64>>(op, plan, stream);
    case 8: return launch_shape<Shape<64, 256, 0, 256, 64>>(op, plan, stream);
  }
#endif
  return cudaErrorNotSupported;
}

}  // namespace jax_router::cuda
