// dense_router for up to 128 tokens: one kernel multiplies all tokens by the weight and selects each token's experts.
//
// A thread block owns 8 to 48 experts x one of several slices of the hidden axis, for 16 or 64 tokens. Its warps
// take turns along the slice, 128 bytes of every expert's row at a time, each warp with its own copies to its own
// shared memory, so that no warp waits for another before the sums. A lane then reads 16 bytes of a row, neighbouring
// hidden elements; the tensor core instruction wants others, but any order of the inner axis gives the same sum as long
// as both operands use it. The block's sums go to the workspace as packets, and the last blocks of the grid also
// select, a token each. Sums are added up in an order that depends on the number of slices alone.
//
// With x in bf16 an f32 weight is three parts in bf16, which a lane makes of it as it reads it: three products on
// tensor cores take less time than one without them, and memory holds nothing but the weight.
//
// The sums of blocks are handed over by parts/packets.cuh. The readers are the blocks that start last, of which the
// plan sees to it that they all run at once. The selection is that of parts/block_token.cuh.
//
// Floor: the weight is read once, experts * hidden elements; the tokens come from the L2, once for each tile of
// experts.
#include <cstdint>

#include "dense_router.h"
#include "parts/async_copy.cuh"
#include "parts/block_token.cuh"
#include "parts/dtype.cuh"
#include "parts/launch.cuh"
#include "parts/packets.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kThreads = 32 * kFewWarps;

// What the product needs to know, small enough for one line of the constant cache: the first thing a block waits for.
struct Product {
  const char* x;
  const char* weight;
  Packet* packets;
  uint64_t tag;
  uint32_t row_bytes;
  int rows;
  int experts;
};

// A step is 128 bytes of every row of the weight, and as many elements of x. Where 16 bytes of a row lie in a stage of
// shared memory: in every second row of 128 bytes halves are swapped, or neighbours where a lane reads two, so that 8
// lanes that read as many pieces of two rows meet no bank twice.
template <class X, class W>
struct Layout {
  static constexpr int kTimes = sizeof(W) / sizeof(X);  // as many bytes of the weight as of x
  static constexpr int kXBytes = kFewStepBytes / kTimes;

  static __device__ __forceinline__ int x_place(int row, int piece) {
    return row * kXBytes + (kTimes == 1 ? piece ^ (row & 1) * 4 : piece) * 16;
  }
  static __device__ __forceinline__ int weight_place(int row, int piece) {
    return row * kFewStepBytes + (piece ^ (row & 1) * (kTimes == 1 ? 4 : 1)) * 16;
  }
};

__device__ __forceinline__ void multiply_16x8x16(__nv_bfloat16, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                 uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_16x8x16(__half, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                 uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A warp's sums, 16 * kTokenTiles tokens by 8 * kExpertTiles experts, as the tensor cores lay them out.
template <class X, class W, int kTokenTiles, int kExpertTiles>
struct WarpSums {
  float sums[kTokenTiles][kExpertTiles][4] = {};

  // Adds the products of one step. What lies in rows that do not exist only reaches sums that nobody reads.
  __device__ __forceinline__ void add(const char* x, const char* weight, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto piece = [&](const char* rows, int row) {
        return *reinterpret_cast<const uint4*>(rows + Layout<X, W>::x_place(row + lane / 4, half * 4 + lane % 4));
      };
      uint4 b[kExpertTiles];
#pragma unroll
      for (int n = 0; n < kExpertTiles; ++n) b[n] = piece(weight, 8 * n);
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) add_tile(m, piece(x, 16 * m), piece(x, 16 * m + 8), b);
    }
  }

  // Those of one tile of tokens, in half a step.
  __device__ __forceinline__ void add_tile(int m, uint4 low, uint4 high, const uint4 (&b)[kExpertTiles]) {
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) {
      multiply_16x8x16(X{}, sums[m][n], low.x, high.x, low.y, high.y, b[n].x, b[n].y);
      multiply_16x8x16(X{}, sums[m][n], low.z, high.z, low.w, high.w, b[n].z, b[n].w);
    }
  }

  // As rows of tokens.
  __device__ __forceinline__ void store(float* rows, int stride, int lane) const {
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < kExpertTiles; ++n)
          *reinterpret_cast<float2*>(rows + (16 * m + 8 * i + lane / 4) * stride + 8 * n + lane % 4 * 2) =
              make_float2(sums[m][n][2 * i], sums[m][n][2 * i + 1]);
  }
};

// Two neighbours of an f32 weight in three parts of bf16, the largest first, that add up to it: bf16 has the exponents
// of f32 and 8 of its 24 bits.
struct Parts {
  uint32_t of[3];

  __device__ __forceinline__ Parts(float low, float high) {
    of[0] = upper_halves(low, high);
    // Infinity leaves no rest, and NaN itself.
    low = fabsf(low) == INFINITY ? 0.0f : rest_of(low);
    high = fabsf(high) == INFINITY ? 0.0f : rest_of(high);
    of[1] = upper_halves(low, high);
    of[2] = upper_halves(rest_of(low), rest_of(high));
  }
  static __device__ __forceinline__ uint32_t upper_halves(float low, float high) {
    return __byte_perm(float_bits(low), float_bits(high), 0x7632);
  }
  static __device__ __forceinline__ float rest_of(float x) { return x - bits_float(float_bits(x) & 0xFFFF0000u); }
};

// x in bf16 and a weight in f32, to the accuracy of f32: a product for each part of the weight.
template <int kTokenTiles, int kExpertTiles>
struct WarpSums<__nv_bfloat16, float, kTokenTiles, kExpertTiles>
    : WarpSums<__nv_bfloat16, __nv_bfloat16, kTokenTiles, kExpertTiles> {
  __device__ __forceinline__ void add(const char* x, const char* weight, int lane) {
    using Places = Layout<__nv_bfloat16, float>;
    uint4 b[3][kExpertTiles];
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) {
      const auto quad = [&](int i) {
        return *reinterpret_cast<const float4*>(weight + Places::weight_place(8 * n + lane / 4, lane % 4 * 2 + i));
      };
      const float4 first = quad(0);
      const float4 second = quad(1);
      const Parts pairs[4] = {{first.x, first.y}, {first.z, first.w}, {second.x, second.y}, {second.z, second.w}};
#pragma unroll
      for (int i = 0; i < 3; ++i) b[i][n] = {pairs[0].of[i], pairs[1].of[i], pairs[2].of[i], pairs[3].of[i]};
    }
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
      const auto piece = [&](int row) {
        return *reinterpret_cast<const uint4*>(x + Places::x_place(row + lane / 4, lane % 4));
      };
      const uint4 low = piece(16 * m);
      const uint4 high = piece(16 * m + 8);
#pragma unroll
      for (int i = 2; i >= 0; --i) this->add_tile(m, low, high, b[i]);
    }
  }
};

// f32 in plain multiply-adds: four lanes share an expert's row, each with every token at its own columns.
template <int kTokenTiles, int kExpertTiles>
struct WarpSums<float, float, kTokenTiles, kExpertTiles> {
  static constexpr int kTokens = 16 * kTokenTiles;
  float sums[kExpertTiles][kTokens] = {};

  __device__ __forceinline__ void add(const char* x, const char* weight, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto piece = [&](const char* rows, int row) {
        return *reinterpret_cast<const float4*>(rows + Layout<float, float>::x_place(row, half * 4 + lane % 4));
      };
      float4 a[kExpertTiles];
#pragma unroll
      for (int n = 0; n < kExpertTiles; ++n) a[n] = piece(weight, 8 * n + lane / 4);
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        const float4 b = piece(x, m);
#pragma unroll
        for (int n = 0; n < kExpertTiles; ++n) {
          sums[n][m] = fmaf(a[n].w, b.w, fmaf(a[n].z, b.z, fmaf(a[n].y, b.y, fmaf(a[n].x, b.x, sums[n][m]))));
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* rows, int stride, int lane) const {
#pragma unroll
    for (int m = 0; m < kTokens; ++m)
#pragma unroll
      for (int n = 0; n < kExpertTiles; ++n) {
        float sum = sums[n][m];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        if (lane % 4 == m % 4) rows[m * stride + 8 * n + lane / 4] = sum;
      }
  }
};

// kTokenTiles: of 16 tokens; kExpertTiles: of 8 experts; kSplits of the hidden axis; kOwn: experts of a thread that
// selects.
template <class X, class W, int kTokenTiles, int kExpertTiles, int kSplits, KeyMode kMode, int kOwn>
__global__ void __launch_bounds__(kThreads, 1)
    dense_router_few_tokens(const Product product, const __grid_constant__ DenseRouter op) {
  constexpr int kTokens = 16 * kTokenTiles;
  constexpr int kExperts = 8 * kExpertTiles;
  using Places = Layout<X, W>;
  constexpr int kXBytes = Places::kXBytes;
  constexpr int kStageBytes = kTokens * kXBytes + kExperts * kFewStepBytes;
  constexpr int kStride = kExperts + (kExperts % 16 == 8 ? 0 : 8);  // of sums in shared memory
  static_assert(kTokens * kStride * 4 <= kFewStages * kStageBytes);
  extern __shared__ __align__(128) char shared[];
  __shared__ BlockScratch<kThreads * kOwn> scratch;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int blocks = static_cast<int>(gridDim.x * gridDim.y * gridDim.z);
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const int first_expert = static_cast<int>(blockIdx.x) * kExperts;
  const int first_token = static_cast<int>(blockIdx.z) * kTokens;
  const uint32_t split = blockIdx.y;

  // The product of this block's slice.
  char* stages = shared + warp * kFewStages * kStageBytes;
  {
    const uint32_t row_bytes = product.row_bytes;
    const uint32_t steps = (row_bytes + kXBytes - 1) / kXBytes;
    const int end = static_cast<int>((split + 1) * steps / kSplits);
    int step = static_cast<int>(split * steps / kSplits) + warp;
    int next = step;
    // A lane copies 16 bytes of every fourth row of the weight, and of as many bytes of x.
    constexpr int kAtOnce = 32 * 16 / kFewStepBytes;
    constexpr int kXAtOnce = 32 * 16 / kXBytes;
    const int row = lane * kAtOnce / 32;
    const int x_row = lane * kXAtOnce / 32;
    const int piece = lane % (32 / kAtOnce);
    const int x_piece = lane % (32 / kXAtOnce);
    const int experts = min(product.experts - first_expert, kExperts) - row;
    const int tokens = min(product.rows - first_token, kTokens) - x_row;
    const uint32_t weight_row_bytes = row_bytes * Places::kTimes;
    const char* weight = product.weight + static_cast<uint64_t>(first_expert + row) * weight_row_bytes + 16 * piece;
    const char* x = product.x + static_cast<uint64_t>(first_token + x_row) * row_bytes + 16 * x_piece;
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(stages)) + Places::x_place(x_row, x_piece);
    const uint32_t between = kTokens * kXBytes + Places::weight_place(row, piece) - Places::x_place(x_row, x_piece);
    // Values to keep: the compiler would make them anew for each copy.
    asm volatile("" : "+l"(weight), "+l"(x), "+r"(to));
    int stage = 0;
    const auto copy = [&] {
      if (next < end) {
        const uint32_t x_to = to + stage * kStageBytes;
        const uint32_t weight_to = x_to + between;
        uint32_t offset = next * kFewStepBytes;
        bool exists = offset + 16 * piece < weight_row_bytes;
        const char* from = weight + (exists ? offset : 0);
#pragma unroll
        for (int i = 0; i < kExperts; i += kAtOnce, from += kAtOnce * weight_row_bytes) {
          if (i < experts) copy_async_if(weight_to + i * kFewStepBytes, from, exists);
        }
        offset = next * kXBytes;
        exists = offset + 16 * x_piece < row_bytes;
        from = x + (exists ? offset : 0);
#pragma unroll
        for (int i = 0; i < kTokens; i += kXAtOnce, from += kXAtOnce * row_bytes) {
          if (i < tokens) copy_async_if(x_to + i * kXBytes, from, exists);
        }
      }
      commit_copies();
      next += kFewWarps;
      stage ^= 1;
    };
#pragma unroll
    for (int s = 0; s < kFewStages; ++s) copy();
    WarpSums<X, W, kTokenTiles, kExpertTiles> sums;
#pragma unroll 1
    while (step < end) {
      wait_for_groups<kFewStages - 1>();
      __syncwarp();
      const char* arrived = stages + stage * kStageBytes;
      sums.add(arrived, arrived + kTokens * kXBytes, lane);
      __syncwarp();
      step += kFewWarps;
      if (step < end) copy();
    }
    wait_for_copies();
    __syncwarp();
    sums.store(reinterpret_cast<float*>(stages), kStride, lane);
  }
  __syncthreads();
  const int rows = product.rows;
  const int pairs = (product.experts + 1) / 2;
  Packet* packets = product.packets;
#pragma unroll 1
  for (int i = thread; i < min(rows - first_token, kTokens) * (kExperts / 2); i += kThreads) {
    const int token = i / (kExperts / 2);
    const int pair = i % (kExperts / 2);
    const char* place = shared + (token * kStride + 2 * pair) * 4;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kFewWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(place + w * kFewStages * kStageBytes);
      sum.x += part.x;
      sum.y += part.y;
    }
    if (first_expert + 2 * pair < product.experts) {
      publish(packets + (static_cast<int>(split) * rows + first_token + token) * pairs + first_expert / 2 + pair, sum,
              product.tag);
    }
  }

  const ActivationTopk& select = op.select;
  const Selection& selection = select.selection;
  const auto experts = static_cast<unsigned>(selection.experts);
  const auto expert = [&](int j) { return j * kThreads + threadIdx.x; };
  const bool has_bias = kMode == KeyMode::kScores || (kMode == KeyMode::kGroups && select.bias != nullptr);
#pragma unroll 1
  for (int token = blocks - 1 - block; token < rows; token += blocks) {
    const float* bias = select.bias == nullptr ? nullptr : select.bias + token * select.bias_stride;
    float logit_offset[kOwn];
    float biases[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const bool exists = expert(j) < experts;
      logit_offset[j] = op.logit_bias != nullptr && exists ? __ldg(op.logit_bias + expert(j)) : 0.0f;
      biases[j] = has_bias && exists ? __ldg(bias + expert(j)) : 0.0f;
    }
    const bool wanted = !is_masked(select, token);
    scratch.clear(selection);

    // Expert e's two neighbouring threads receive half of the pair's packets each, and swap. All packets are asked for
    // at once, so threads without an expert read a packet of the last one's.
    Packet* first = packets + (thread % 2 * (kSplits / 2) * rows + token) * pairs;
    float2 parts[kOwn][kSplits / 2];
    bool complete;
    uint32_t looks = 0;
    do {
      if (++looks == kMostLooks) __trap();
      uint64_t tags[kOwn][kSplits / 2];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int pair = min(static_cast<int>(expert(j) / 2), pairs - 1);
#pragma unroll
        for (int s = 0; s < kSplits / 2; ++s) tags[j][s] = receive(first + s * rows * pairs + pair, parts[j][s]);
      }
      complete = true;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
#pragma unroll
        for (int s = 0; s < kSplits / 2; ++s) complete &= tags[j][s] == product.tag;
      }
    } while (!__all_sync(kFullWarp, complete));
    float logits[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      float2 sum = parts[j][0];
#pragma unroll
      for (int s = 1; s < kSplits / 2; ++s) {
        sum.x += parts[j][s].x;
        sum.y += parts[j][s].y;
      }
      const float other = __shfl_xor_sync(kFullWarp, thread % 2 == 0 ? sum.y : sum.x, 1);
      logits[j] = thread % 2 == 0 ? sum.x + other : other + sum.y;
      if (op.logit_bias != nullptr) logits[j] += logit_offset[j];
      if (expert(j) >= experts) logits[j] = -INFINITY;
    }
    const TokenOutput output{select.weights, select.expert_ids, select.chosen_logits,
                             static_cast<int64_t>(token) * selection.k};
    select_token_of_block<kMode, kThreads>(selection, logits, has_bias, biases, wanted, output, scratch);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
#pragma unroll
      for (int s = 0; s < kSplits / 2; ++s) {
        const int pair = static_cast<int>(expert(j) / 2);
        if (pair < pairs) first[s * rows * pairs + pair].tag = kNoTag;
      }
    }
    if (token + blocks < rows) __syncthreads();
  }
}

}  // namespace

cudaError_t run_few(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream) {
  return with_types(op, [&](auto x, auto weight, auto mode) {
    using X = decltype(x);
    using W = decltype(weight);
    return with_index<kFewTileCount>(plan.few, [&](auto index) {
      constexpr FewTile kTile = kFewTiles[decltype(index)::value];
      if constexpr (takes(kTile, dtype_of(X{}), dtype_of(W{}))) {
        const int rows = static_cast<int>(op.select.rows);
        const int experts = op.select.selection.experts;
        LaunchShape shape{ceil_div(experts, kTile.experts()), kThreads, plan.shared_bytes};
        shape.blocks_y = kTile.splits;
        shape.blocks_z = static_cast<unsigned>(ceil_div(rows, kTile.tokens()));
        const Product product{static_cast<const char*>(op.x),
                              static_cast<const char*>(op.weight),
                              static_cast<Packet*>(op.workspace.data),
                              new_tag(),
                              op.hidden * static_cast<uint32_t>(sizeof(X)),
                              rows,
                              experts};
        return launch_kernel(dense_router_few_tokens<X, W, kTile.token_tiles, kTile.expert_tiles, kTile.splits,
                                                     decltype(mode)::value, kTile.experts_of_thread()>,
                             shape, stream, product, op);
      }
      return cudaErrorInvalidValue;
    });
  });
}

}  // namespace jax_router::cuda
