// dense_router for many tokens: logits = x @ weight.T by warpgroup matrix products, then the kernel of activation_topk.
//
// A thread block owns kTokens tokens x kExperts experts x one slice of the hidden axis. One warp keeps the copy engine
// busy: stages of kDepth hidden elements of both operands, swizzled, in a ring of shared memory; two warpgroups multiply
// 64 tokens each into registers. A cluster is `sharers` neighbouring tiles of tokens, which load the weight once between
// them, by all `splits` slices of the hidden axis, which add their sums through distributed shared memory, in the order of
// the slices, so that few tokens fill the chip too.
// Floor: rows * experts * hidden multiply-adds on the tensor cores; x and the weight read once from device memory.
#include <algorithm>

#include "dense_router.cuh"
#include "hopper.cuh"
#include "kernels.h"
#include "load.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kTokens = 128;
constexpr int kDepth = 64;  // hidden elements a stage: 128 bytes a row
constexpr int kRingBytes = 192 * 1024;
constexpr int kMaxSplits = 8;

struct PrefillPlan {
  int experts;  // of a tile
  int sharers;
  int splits;
};

template <int kExperts>
struct Stage {
  uint16_t x[kTokens * kDepth];
  uint16_t weight[kExperts * kDepth];
};

template <int kExperts>
struct PrefillShared {
  static constexpr int kStages = kRingBytes / static_cast<int>(sizeof(Stage<kExperts>));
  union {
    Stage<kExperts> stages[kStages];
    float sums[kTokens * kExperts];
  };
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

// Where a sum lies in its row of shared memory, so that neither rows nor columns meet in one bank.
__device__ __forceinline__ int swizzled(int row, int column) { return column ^ (row & 3) << 3; }

__device__ __forceinline__ float4 load_remote(const float* p, uint32_t block_rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(p)), "r"(block_rank)
      : "memory");
  return v;
}

template <class T, int kExperts>
__global__ void __launch_bounds__(384, 1)
    multiply_tiles(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                   const float* logit_bias, float* logits, int64_t rows, int experts, int hidden, int sharers) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = PrefillShared<kExperts>;
  constexpr int kColumns = kExperts <= 256 ? 1 : 2;  // wgmmas side by side
  constexpr int kWidth = kExperts / kColumns;
  extern __shared__ char raw[];
  auto& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = static_cast<int>(cluster_rank());
  const int first_sharer = rank / sharers * sharers;
  const int split = static_cast<int>(blockIdx.z);
  const int splits = static_cast<int>(gridDim.z);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int first_expert = static_cast<int>(blockIdx.y) * kExperts;
  const int steps = (hidden + kDepth - 1) / kDepth;
  const int first_step = split * steps / splits;
  const int own_steps = (split + 1) * steps / splits - first_step;

  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], 8 * sharers);
    }
    fence_mbarrier_init();
  }
  cluster_sync();

  if (warp < 4) {
    set_fewer_registers<40>();
    if (warp == 0 && lane == 0) {
      const int parts = max(sharers, 2);  // of a stage of the weight; a copy has at most 256 rows
      const int part_rows = kExperts / parts;
      const auto everyone = static_cast<uint16_t>(((1 << sharers) - 1) << first_sharer);
      for (int step = 0; step < own_steps; ++step) {
        const int slot = step % Shared::kStages;
        Stage<kExperts>& stage = shared.stages[slot];
        if (step >= Shared::kStages) mbarrier_wait(&shared.empty[slot], step / Shared::kStages + 1 & 1);
        mbarrier_expect_bytes(&shared.full[slot], sizeof(Stage<kExperts>));
        const int column = (first_step + step) * kDepth;
        copy_tile(stage.x, x_map, column, static_cast<int>(first_token), &shared.full[slot]);
        for (int part = rank - first_sharer; part < parts; part += sharers) {
          uint16_t* destination = stage.weight + part * part_rows * kDepth;
          const int row = first_expert + part * part_rows;
          if (sharers > 1) {
            copy_tile_multicast(destination, weight_map, column, row, &shared.full[slot], everyone);
          } else {
            copy_tile(destination, weight_map, column, row, &shared.full[slot]);
          }
        }
      }
    }
    __syncwarp();
    cluster_sync();
    cluster_sync();
  } else {
    set_more_registers<232>();
    const int group = warp / 4 - 1;
    float sums[kColumns][kWidth / 2];
    for (int step = 0; step < own_steps; ++step) {
      const int slot = step % Shared::kStages;
      Stage<kExperts>& stage = shared.stages[slot];
      mbarrier_wait(&shared.full[slot], step / Shared::kStages & 1);
      const uint64_t x_tile = wgmma_descriptor(stage.x + group * 64 * kDepth);
      const uint64_t weight_tile = wgmma_descriptor(stage.weight);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          // Descriptors count in 16 bytes: 32 bytes on along k, kWidth rows of 128 bytes on along the experts.
          wgmma(T{}, sums[c], x_tile + 2 * k, weight_tile + 8 * kWidth * c + 2 * k, step > 0 || k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      // The products of the step before are finished, so its stage may be filled again.
      if (step > 0 && lane < sharers) mbarrier_arrive(&shared.empty[(step - 1) % Shared::kStages], first_sharer + lane);
    }
    wgmma_wait<0>();

    const int own_row = group * 64 + warp % 4 * 16 + lane / 4;
    if (splits > 1) asm volatile("bar.sync 1, 256;" ::: "memory");  // nobody multiplies from the ring any more
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; i += 2) {
        const int row = own_row + (i & 2) * 4;
        const int column = c * kWidth + i / 4 * 8 + lane % 4 * 2;
        if (splits > 1) {
          *reinterpret_cast<float2*>(shared.sums + row * kExperts + swizzled(row, column)) =
              make_float2(sums[c][i], sums[c][i + 1]);
        } else if (first_token + row < rows) {
          const int expert = first_expert + column;
          float* place = logits + (first_token + row) * experts + expert;
          float2 sum = make_float2(sums[c][i], sums[c][i + 1]);
          if (logit_bias != nullptr) {
            if (expert < experts) sum.x += logit_bias[expert];
            if (expert + 1 < experts) sum.y += logit_bias[expert + 1];
          }
          if (experts % 2 == 0) {
            if (expert < experts) *reinterpret_cast<float2*>(place) = sum;
          } else {
            if (expert < experts) place[0] = sum.x;
            if (expert + 1 < experts) place[1] = sum.y;
          }
        }
      }
    }
    cluster_sync();
    if (splits > 1) {
      const int own_rows = kTokens / splits;
      for (int i = static_cast<int>(threadIdx.x) - 128; i < own_rows * (kExperts / 4); i += 256) {
        const int row = split * own_rows + i / (kExperts / 4);
        const int column = i % (kExperts / 4) * 4;
        const int expert = first_expert + column;
        if (first_token + row >= rows || expert >= experts) continue;
        const float* place = shared.sums + row * kExperts + swizzled(row, column);
        float4 parts[kMaxSplits];
#pragma unroll
        for (int s = 0; s < kMaxSplits; ++s) {
          if (s < splits) parts[s] = load_remote(place, s * sharers + rank - first_sharer);
        }
        float4 sum = parts[0];
#pragma unroll
        for (int s = 1; s < kMaxSplits; ++s) {
          if (s < splits) {
            sum.x += parts[s].x;
            sum.y += parts[s].y;
            sum.z += parts[s].z;
            sum.w += parts[s].w;
          }
        }
        float* out = logits + (first_token + row) * experts + expert;
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
        if (experts % 4 == 0 && logit_bias == nullptr) {
          *reinterpret_cast<float4*>(out) = sum;
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (expert + j < experts) out[j] = values[j] + (logit_bias == nullptr ? 0.0f : logit_bias[expert + j]);
          }
        }
      }
    }
    cluster_sync();  // nobody reads from this block any more
  }
#endif
}

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

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

// Tiles of box_rows x kDepth of a matrix [rows, hidden]; what lies outside the matrix reads as zero.
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

template <class T, int kExperts>
cudaError_t launch_product(const DenseRouter& op, const PrefillPlan& plan, float* logits, cudaStream_t stream) {
  const int64_t rows = op.select.rows;
  const int experts = op.select.experts;
  CUtensorMap x_map, weight_map;
  cudaError_t error = make_tensor_map(x_map, op.operand_dtype, op.x, rows, op.hidden, kTokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(weight_map, op.operand_dtype, op.weight, experts, op.hidden,
                          kExperts / std::max(plan.sharers, 2));
  if (error != cudaSuccess) return error;

  const auto kernel = multiply_tiles<T, kExperts>;
  constexpr int kSharedBytes = sizeof(PrefillShared<kExperts>) + 1023;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const auto tiles = static_cast<unsigned>((rows + kTokens - 1) / kTokens);
  const auto sharers = static_cast<unsigned>(plan.sharers);
  const auto splits = static_cast<unsigned>(plan.splits);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = sharers;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = splits;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((tiles + sharers - 1) / sharers * sharers, (experts + kExperts - 1) / kExperts, splits);
  config.blockDim = dim3(384);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, x_map, weight_map, op.logit_bias, logits, rows, experts, op.hidden,
                            plan.sharers);
}

template <class T>
cudaError_t launch_product(const DenseRouter& op, const PrefillPlan& plan, float* logits, cudaStream_t stream) {
  if (plan.experts == 128) return launch_product<T, 128>(op, plan, logits, stream);
  if (plan.experts == 256) return launch_product<T, 256>(op, plan, logits, stream);
  return launch_product<T, 384>(op, plan, logits, stream);
}
