// dense_router for few tokens: one kernel multiplies all tokens by the weight and selects each token's experts.
//
// A thread block owns kExpertTiles * 16 experts x one of the slices of the hidden axis, for all tokens. Each warp takes
// one part of the slice, a leaf, and asks for its operands at once, through its own ring of shared memory: a lane copies
// exactly the 16-byte pieces that it will feed to the tensor cores, so nobody waits for anybody else. A lane's piece
// holds neighbouring hidden elements; the instruction wants others, but any order of the inner axis gives the same sum as
// long as both operands use it.
//
// The sums of a block's leaves go to the workspace as packets, and the last blocks of the grid also select, a token each.
// Sums are taken in the order of one binary tree over the leaves, whatever the number of tokens.
//
// The hand-over: a packet is two partial logits and a tag, written and read as one 16-byte word, so that a reader who sees
// the tag has the logits: no fence, no counter, nothing to initialise. The reader removes the tag. No tag is left when the
// kernel ends, and none is there when it begins, whatever else the memory holds (bytes of others equal the tag with a
// probability of 2^-64). The readers are the blocks that start last, and publish before they wait, so they never keep a
// writer from running.
//
// Floor: the weight is read once: experts * hidden elements; the tokens come from the L2, once a tile of experts.
#include "../common/order.h"
#include "dense_router.cuh"
#include "load.cuh"
#include "select.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kMaxDecodeExperts = 1024;
constexpr int kLeaves = 64;   // parts of the hidden axis
constexpr int kStages = 4;    // pieces of a leaf that are on their way at once
constexpr uint64_t kTag = 0x9E3779B97F4A7C15;

// Two neighbouring experts' partial logits of one token.
struct alignas(16) Packet {
  float logits[2];
  uint64_t tag;
};

__device__ __forceinline__ void publish(Packet* packet, float first, float second) {
  const uint64_t logits = static_cast<uint64_t>(float_bits(second)) << 32 | float_bits(first);
  asm volatile("{\n.reg .b128 packet;\nmov.b128 packet, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], packet;\n}" ::"l"(packet),
               "l"(logits), "l"(kTag)
               : "memory");
}

__device__ __forceinline__ bool receive(const Packet* packet, float& first, float& second) {
  uint64_t logits, tag;
  asm volatile("{\n.reg .b128 packet;\nld.relaxed.gpu.global.b128 packet, [%2];\nmov.b128 {%0, %1}, packet;\n}"
               : "=l"(logits), "=l"(tag)
               : "l"(packet)
               : "memory");
  first = bits_float(static_cast<uint32_t>(logits));
  second = bits_float(static_cast<uint32_t>(logits >> 32));
  return tag == kTag;
}

// Copies 16 bytes to shared memory in the background, or writes zeros there.
__device__ __forceinline__ void copy_piece(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_pieces() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_pieces() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void multiply_16x8x16(__nv_bfloat16, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                 uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_16x8x16(__half, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                 uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A warp's sums, kExpertTiles * 16 experts by kTokenTiles * 8 tokens. Its operands are pieces of 16 bytes, piece i of lane
// l at pieces[32 * i + l]: of row l / 4 of each 8 experts, then of each 8 tokens, the (l % 4)th 16 bytes.
template <class T, int kTokenTiles, int kExpertTiles>
struct WarpSums {
  float sums[kExpertTiles][kTokenTiles][4] = {};

  __device__ __forceinline__ void add(const uint4* pieces, int lane) {
    uint4 a[2 * kExpertTiles];
#pragma unroll
    for (int m = 0; m < 2 * kExpertTiles; ++m) a[m] = pieces[32 * m + lane];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const uint4 b = pieces[32 * (2 * kExpertTiles + n) + lane];
#pragma unroll
      for (int m = 0; m < kExpertTiles; ++m) {
        const uint4& low = a[2 * m];
        const uint4& high = a[2 * m + 1];
        multiply_16x8x16(T{}, sums[m][n], low.x, high.x, low.y, high.y, b.x, b.y);
        multiply_16x8x16(T{}, sums[m][n], low.z, high.z, low.w, high.w, b.z, b.w);
      }
    }
  }

  // As rows of tokens.
  __device__ __forceinline__ void store(float* rows, int stride, int lane) const {
#pragma unroll
    for (int m = 0; m < kExpertTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          rows[(8 * n + lane % 4 * 2 + i % 2) * stride + 16 * m + 8 * (i / 2) + lane / 4] = sums[m][n][i];
  }
};

// f32 in plain multiply-adds: a lane takes its own pieces of the weight, and every token's piece at the same columns.
template <int kTokenTiles, int kExpertTiles>
struct WarpSums<float, kTokenTiles, kExpertTiles> {
  float sums[2 * kExpertTiles][8 * kTokenTiles] = {};

  __device__ __forceinline__ void add(const uint4* pieces, int lane) {
    const float4* values = reinterpret_cast<const float4*>(pieces);
#pragma unroll
    for (int n = 0; n < 8 * kTokenTiles; ++n) {
      const float4 x = values[32 * (2 * kExpertTiles + n / 8) + n % 8 * 4 + lane % 4];
#pragma unroll
      for (int m = 0; m < 2 * kExpertTiles; ++m) {
        const float4 w = values[32 * m + lane];
        sums[m][n] = fmaf(w.w, x.w, fmaf(w.z, x.z, fmaf(w.y, x.y, fmaf(w.x, x.x, sums[m][n]))));
      }
    }
  }

  __device__ __forceinline__ void store(float* rows, int stride, int lane) const {
#pragma unroll
    for (int n = 0; n < 8 * kTokenTiles; ++n)
#pragma unroll
      for (int m = 0; m < 2 * kExpertTiles; ++m) {
        float sum = sums[m][n];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        if (lane % 4 == n % 4) rows[n * stride + 8 * m + lane / 4] = sum;
      }
  }
};

template <int kCount>
__device__ __forceinline__ float tree_sum(const float* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    return tree_sum<kCount / 2>(values) + tree_sum<kCount / 2>(values + kCount / 2);
  }
}

// The choice of one token whose logits lie in shared memory, by one warp.
template <KeyMode kMode, int kChunks>
__device__ __noinline__ void choose(const ActivationTopk& op, int token, const float* logits,
                                    SelectScratch<32>& scratch) {
  const bool wanted = op.token_mask == nullptr || op.token_mask[token];
  const int lane = tile_lane<32>();
  float own[4 * kChunks];
#pragma unroll
  for (int i = 0; i < 4 * kChunks; ++i) {
    const int expert = expert_of<32>(lane, i);
    own[i] = wanted && expert < op.experts ? logits[expert] : -INFINITY;
  }
  const int64_t place = static_cast<int64_t>(token) * op.k;
  const TokenOutput output{op.weights + place, op.expert_ids + place,
                           op.chosen_logits == nullptr ? nullptr : op.chosen_logits + place};
  const float* bias = op.bias == nullptr ? nullptr : op.bias + token * op.bias_stride;
  const Selection selection{op.experts, op.k, op.scoring, op.groups};
  select_token<kMode, 32>(selection, own, wanted, bias, [logits](int expert) { return logits[expert]; }, output,
                          scratch);
}

template <KeyMode kMode>
__device__ __forceinline__ void choose(const ActivationTopk& op, int token, const float* logits,
                                       SelectScratch<32>& scratch) {
  if (op.experts <= 256) return choose<kMode, 2>(op, token, logits, scratch);
  if (op.experts <= 384) return choose<kMode, 3>(op, token, logits, scratch);
  if (op.experts <= 512) return choose<kMode, 4>(op, token, logits, scratch);
  return choose<kMode, 8>(op, token, logits, scratch);
}

template <class T, int kTokenTiles, int kExpertTiles, int kWarps>
struct DecodeTile {
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kExperts = 16 * kExpertTiles;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSplits = kLeaves / kWarps;
  static constexpr int kPieces = 2 * kExpertTiles + kTokenTiles;  // of 16 bytes a lane, for 64 bytes of each row
  static constexpr int kStride = kExperts + 4;                    // of the sums in shared memory: no bank conflicts
  struct Warp {
    union {
      uint4 ring[kStages][kPieces * 32];
      float sums[kTokens * kStride];
    };
  };
};

template <class T, int kTokenTiles, int kExpertTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) multiply_and_select(const __grid_constant__ DenseRouter op, Packet* packets) {
  using Tile = DecodeTile<T, kTokenTiles, kExpertTiles, kWarps>;
  constexpr int kPieceElements = 16 / sizeof(T);
  extern __shared__ uint4 raw[];
  auto* warps = reinterpret_cast<typename Tile::Warp*>(raw);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int rows = static_cast<int>(op.select.rows);
  const int experts = op.select.experts;
  const int pairs = (experts + 1) / 2;
  const int first_expert = static_cast<int>(blockIdx.x) * Tile::kExperts;
  const int split = static_cast<int>(blockIdx.y);
  const int first_token = static_cast<int>(blockIdx.z) * Tile::kTokens;

  const int steps = (op.hidden + 4 * kPieceElements - 1) / (4 * kPieceElements);
  const int leaf = split * kWarps + warp;
  const int first_step = static_cast<int>(static_cast<int64_t>(leaf) * steps / kLeaves);
  const int last_step = static_cast<int>(static_cast<int64_t>(leaf + 1) * steps / kLeaves);
  auto fetch = [&](int step) {
    if (step < last_step) {
      const int column = (step * 4 + lane % 4) * kPieceElements;
      uint4* stage = warps[warp].ring[(step - first_step) % kStages] + lane;
      auto fetch_row = [&](int piece, const void* matrix, int row, int end) {
        const bool exists = column < op.hidden && row < end;
        const int64_t offset = exists ? static_cast<int64_t>(row) * op.hidden + column : 0;
        copy_piece(stage + 32 * piece, static_cast<const T*>(matrix) + offset, exists);
      };
#pragma unroll
      for (int m = 0; m < 2 * kExpertTiles; ++m) fetch_row(m, op.weight, first_expert + 8 * m + lane / 4, experts);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
        fetch_row(2 * kExpertTiles + n, op.x, first_token + 8 * n + lane / 4, rows);
    }
    commit_pieces();
  };
  for (int i = 0; i < kStages; ++i) fetch(first_step + i);
  WarpSums<T, kTokenTiles, kExpertTiles> sums;
  for (int step = first_step; step < last_step; ++step) {
    wait_pieces<kStages - 1>();
    __syncwarp();
    sums.add(warps[warp].ring[(step - first_step) % kStages], lane);
    __syncwarp();
    fetch(step + kStages);
  }
  __syncwarp();
  sums.store(warps[warp].sums, Tile::kStride, lane);
  __syncthreads();

  for (int i = thread; i < Tile::kTokens * Tile::kExperts / 2; i += Tile::kThreads) {
    const int token = first_token + i / (Tile::kExperts / 2);
    const int column = i % (Tile::kExperts / 2) * 2;
    if (token >= rows || first_expert + column >= experts) continue;
    float first[kWarps], second[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 sum = *reinterpret_cast<const float2*>(
          warps[w].sums + (token - first_token) * Tile::kStride + column);
      first[w] = sum.x;
      second[w] = sum.y;
    }
    publish(packets + (static_cast<int64_t>(split) * rows + token) * pairs + (first_expert + column) / 2,
            tree_sum<kWarps>(first), tree_sum<kWarps>(second));
  }

  __shared__ float logits[kMaxDecodeExperts];
  __shared__ SelectScratch<32> scratch;
  const int blocks = static_cast<int>(gridDim.x * gridDim.y * gridDim.z);
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  for (int token = blocks - 1 - block; token < rows; token += blocks) {
    for (int pair = thread; pair < pairs; pair += Tile::kThreads) {
      Packet* packet = packets + static_cast<int64_t>(token) * pairs + pair;
      const int64_t stride = static_cast<int64_t>(rows) * pairs;
      const bool has_second = 2 * pair + 1 < experts;
      const float first_bias = op.logit_bias == nullptr ? 0.0f : op.logit_bias[2 * pair];
      const float second_bias = op.logit_bias == nullptr || !has_second ? 0.0f : op.logit_bias[2 * pair + 1];
      float first[Tile::kSplits], second[Tile::kSplits];
      bool complete;
      do {
        complete = true;
#pragma unroll
        for (int s = 0; s < Tile::kSplits; ++s) complete &= receive(packet + s * stride, first[s], second[s]);
      } while (!complete);
#pragma unroll
      for (int s = 0; s < Tile::kSplits; ++s) packet[s * stride].tag = 0;
      logits[2 * pair] = tree_sum<Tile::kSplits>(first) + first_bias;
      if (has_second) logits[2 * pair + 1] = tree_sum<Tile::kSplits>(second) + second_bias;
    }
    __syncthreads();
    if (warp == 0) {
      if (op.select.groups.num_groups > 1) {
        choose<KeyMode::kGroups>(op.select, token, logits, scratch);
      } else if (op.select.bias != nullptr) {
        choose<KeyMode::kScores>(op.select, token, logits, scratch);
      } else {
        choose<KeyMode::kLogits>(op.select, token, logits, scratch);
      }
    }
    __syncthreads();
  }
}

template <class T, int kTokenTiles, int kExpertTiles, int kWarps>
cudaError_t launch_tile(const DenseRouter& op, Packet* packets, cudaStream_t stream) {
  using Tile = DecodeTile<T, kTokenTiles, kExpertTiles, kWarps>;
  constexpr int kSharedBytes = kWarps * sizeof(typename Tile::Warp);
  const auto kernel = multiply_and_select<T, kTokenTiles, kExpertTiles, kWarps>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid((op.select.experts + Tile::kExperts - 1) / Tile::kExperts, Tile::kSplits,
                  static_cast<unsigned>((op.select.rows + Tile::kTokens - 1) / Tile::kTokens));
  kernel<<<grid, Tile::kThreads, kSharedBytes, stream>>>(op, packets);
  return cudaGetLastError();
}

}  // namespace

bool decode_supports(const DenseRouter& op) {
  const ActivationTopk& select = op.select;
  return select.rows <= kDecodeRows && op.hidden % 8 == 0 && select.experts <= kMaxDecodeExperts &&
         select.k <= kMaxTileTopK<32> &&
         (select.groups.num_groups == 1 || tile_can_group(32, select.experts, select.groups.num_groups));
}

size_t decode_workspace_bytes(const DenseRouter& op) {
  constexpr int kMostSplits = 8;
  return kMostSplits * static_cast<size_t>(op.select.rows) * ((op.select.experts + 1) / 2) * sizeof(Packet);
}

cudaError_t launch_decode(const DenseRouter& op, void* workspace, cudaStream_t stream) {
  auto* packets = static_cast<Packet*>(workspace);
  const int rows = static_cast<int>(op.select.rows);
  return with_type(op.operand_dtype, [&](auto type) {
    using T = decltype(type);
    if (rows <= 8) return launch_tile<T, 1, 1, 16>(op, packets, stream);
    if (rows <= 16) return launch_tile<T, 2, 1, 16>(op, packets, stream);
    if constexpr (sizeof(T) == 4) {
      return launch_tile<T, 4, 1, 8>(op, packets, stream);
    } else {
      if (rows <= 32) return launch_tile<T, 4, 2, 8>(op, packets, stream);
      return launch_tile<T, 8, 2, 8>(op, packets, stream);
    }
  });
}

}  // namespace jax_router::cuda
