// dense_router for up to 64 tokens: one kernel multiplies all tokens by the weight and selects each token's experts.
//
// A thread block owns kExperts experts x one of kSplits slices of the hidden axis, for all tokens. It asks for all its
// rows of the weight and of x at once (bulk copies to shared memory); its warps take turns along the slice, 64 bytes of
// every row at a time. A lane reads 16 bytes of a row, neighbouring hidden elements; the tensor core instruction wants
// others, but any order of the inner axis gives the same sum as long as both operands use it. The sums of the slices go
// to the workspace as packets, and the last blocks of the grid also select, a token each. Sums are added up in the same
// order whatever the number of tokens.
//
// The hand-over: a packet is two partial logits and a tag, written and read as one 16-byte word, so that a reader who
// sees the tag has the logits: no fence, no counter, nothing to initialise. The reader removes the tag. No tag is left
// when the kernel ends, and none is there when it begins, whatever else the memory holds (bytes of others equal the tag
// with a probability of 2^-64). The readers are the blocks that start last, and publish before they wait, so they never
// keep a writer from running.
//
// Floor: the weight is read once, experts * hidden elements; the tokens come from the L2, once for kExperts experts.
#include <algorithm>

#include "../common/order.h"
#include "dense_select.cuh"
#include "kernels.h"
#include "load.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kSplits = 8;
constexpr int kStepBytes = 64;       // of every row, for one warp: 16 bytes for each 4 lanes
constexpr int kMaxStepsAtOnce = 32;  // of a slice; longer slices take several passes

// Two neighbouring experts' partial logits of one token.
struct alignas(16) Packet {
  float logits[2];
  uint64_t tag;
};
constexpr uint64_t kTag = 0x9E3779B97F4A7C15;

__device__ __forceinline__ void publish(Packet* packet, float2 sum) {
  const uint64_t logits = static_cast<uint64_t>(float_bits(sum.y)) << 32 | float_bits(sum.x);
  asm volatile(
      "{\n.reg .b128 packet;\nmov.b128 packet, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], packet;\n}" ::"l"(packet),
      "l"(logits), "l"(kTag)
      : "memory");
}

__device__ __forceinline__ bool receive(const Packet* packet, float2& sum) {
  uint64_t logits, tag;
  asm volatile("{\n.reg .b128 packet;\nld.relaxed.gpu.global.b128 packet, [%2];\nmov.b128 {%0, %1}, packet;\n}"
               : "=l"(logits), "=l"(tag)
               : "l"(packet)
               : "memory");
  sum.x = bits_float(static_cast<uint32_t>(logits));
  sum.y = bits_float(static_cast<uint32_t>(logits >> 32));
  return tag == kTag;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Rows of global memory on their way to shared memory. start() is called by all threads, and again once all of them
// have used what wait() promised.
class RowCopies {
 public:
  __device__ __forceinline__ void init(uint64_t* barrier) {
    barrier_ = barrier;
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      asm volatile(
          "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
          : "memory");
    }
    __syncthreads();
#endif
  }

  // Row i of the first operand goes to place + i * stride, those of the second follow at second_place.
  __device__ __forceinline__ void start(char* place, int stride, int bytes, const char* first, int first_rows,
                                        char* second_place, const char* second, int second_rows, int64_t pitch) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x >= 32) return;
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier_)),
                   "r"(bytes * (first_rows + second_rows))
                   : "memory");
    }
    __syncwarp();
    for (int i = static_cast<int>(threadIdx.x); i < first_rows + second_rows; i += 32) {
      const bool is_first = i < first_rows;
      const char* from = is_first ? first + i * pitch : second + (i - first_rows) * pitch;
      char* to = is_first ? place + i * stride : second_place + (i - first_rows) * stride;
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(to)),
                   "l"(from), "r"(bytes), "r"(shared_address(barrier_))
                   : "memory");
    }
#else
    const int pieces = bytes / 16;
    for (int i = static_cast<int>(threadIdx.x); i < (first_rows + second_rows) * pieces; i += kBlockThreads) {
      const int row = i / pieces;
      const int offset = i % pieces * 16;
      const bool is_first = row < first_rows;
      const char* from = is_first ? first + row * pitch : second + (row - first_rows) * pitch;
      char* to = is_first ? place + row * stride : second_place + (row - first_rows) * stride;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + offset)), "l"(from + offset)
                   : "memory");
    }
#endif
  }

  __device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}" ::
            "r"(shared_address(barrier_)),
        "r"(parity_)
        : "memory");
    parity_ ^= 1;
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
#endif
  }

 private:
  uint64_t* barrier_;
  uint32_t parity_ = 0;
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

// A warp's sums, kExpertTiles * 16 experts by kTokenTiles * 8 tokens, as the tensor cores lay them out.
template <class T, int kTokenTiles, int kExpertTiles>
struct WarpSums {
  float sums[kExpertTiles][kTokenTiles][4] = {};

  // weight_at(row) and x_at(token): the 64 bytes of the step, of which lane l takes the (l % 4)th 16; zero outside.
  template <class WeightAt, class XAt>
  __device__ __forceinline__ void add(int lane, WeightAt weight_at, XAt x_at) {
    uint4 a[2 * kExpertTiles];
#pragma unroll
    for (int m = 0; m < 2 * kExpertTiles; ++m) a[m] = weight_at(8 * m + lane / 4);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const uint4 b = x_at(8 * n + lane / 4);
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

// f32 in plain multiply-adds: four lanes share an expert's row, each with every token at its own columns.
template <int kTokenTiles, int kExpertTiles>
struct WarpSums<float, kTokenTiles, kExpertTiles> {
  float sums[2 * kExpertTiles][8 * kTokenTiles] = {};

  template <class WeightAt, class XAt>
  __device__ __forceinline__ void add(int lane, WeightAt weight_at, XAt x_at) {
    uint4 a[2 * kExpertTiles];
#pragma unroll
    for (int m = 0; m < 2 * kExpertTiles; ++m) a[m] = weight_at(8 * m + lane / 4);
#pragma unroll
    for (int n = 0; n < 8 * kTokenTiles; ++n) {
      const uint4 b = x_at(n);
#pragma unroll
      for (int m = 0; m < 2 * kExpertTiles; ++m) {
        float& sum = sums[m][n];
        sum = fmaf(bits_float(a[m].x), bits_float(b.x), sum);
        sum = fmaf(bits_float(a[m].y), bits_float(b.y), sum);
        sum = fmaf(bits_float(a[m].z), bits_float(b.z), sum);
        sum = fmaf(bits_float(a[m].w), bits_float(b.w), sum);
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

// The sizes that follow from the shapes: the same for all blocks.
struct DecodePlan {
  int row_steps;   // of kStepBytes in a row
  int pass_steps;  // at most this many of a slice at once
  int stride;      // of rows in shared memory, an odd multiple of 64 bytes: no bank conflicts
  int shared_bytes;
};

template <int kTokens, int kExperts>
DecodePlan make_plan(int row_bytes) {
  DecodePlan plan;
  plan.row_steps = (row_bytes + kStepBytes - 1) / kStepBytes;
  plan.pass_steps = std::min((plan.row_steps + kSplits - 1) / kSplits, kMaxStepsAtOnce);
  plan.stride = (plan.pass_steps + plan.pass_steps % 2 + 1) * kStepBytes;
  const int sums_bytes = kBlockWarps * kTokens * (kExperts + 4) * static_cast<int>(sizeof(float));
  plan.shared_bytes = std::max((kTokens + kExperts) * plan.stride, sums_bytes);
  return plan;
}

template <class T, int kTokenTiles, int kExpertTiles>
__global__ void __launch_bounds__(kBlockThreads)
    multiply_and_select(const __grid_constant__ DenseRouter op, const DecodePlan plan, Packet* packets) {
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kExperts = 16 * kExpertTiles;
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barrier;
  __shared__ BlockSelect chooser;
  __shared__ float logit_bias[kMaxBlockExperts];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int rows = static_cast<int>(op.select.rows);
  const int experts = op.select.experts;
  const int pairs = (experts + 1) / 2;
  const int first_expert = static_cast<int>(blockIdx.x) * kExperts;
  const int split = static_cast<int>(blockIdx.y);
  const int first_token = static_cast<int>(blockIdx.z) * kTokens;

  // The product of this block's slice.
  const int64_t pitch = static_cast<int64_t>(op.hidden) * sizeof(T);
  const char* weight = static_cast<const char*>(op.weight) + first_expert * pitch;
  const char* x = static_cast<const char*>(op.x) + first_token * pitch;
  char* weight_place = shared;
  char* x_place = shared + kExperts * plan.stride;
  const int last_step = (split + 1) * plan.row_steps / kSplits;
  int step = split * plan.row_steps / kSplits;
  RowCopies copies;
  copies.init(&barrier);
  const auto start = [&] {
    if (step >= last_step) return 0;
    const int64_t offset = static_cast<int64_t>(step) * kStepBytes;
    const int64_t end = min(static_cast<int64_t>(min(step + plan.pass_steps, last_step)) * kStepBytes, pitch);
    const int bytes = static_cast<int>(end - offset);
    copies.start(weight_place, plan.stride, bytes, weight + offset, min(experts - first_expert, kExperts), x_place,
                 x + offset, min(rows - first_token, kTokens), pitch);
    return bytes;
  };

  // Meanwhile, what the selection will want.
  const int blocks = static_cast<int>(gridDim.x * gridDim.y * gridDim.z);
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const auto load_biases = [&](int token) {
#pragma unroll 1
    for (int e = thread; e < experts; e += kBlockThreads) {
      if (op.select.bias != nullptr) chooser.bias[e] = __ldg(op.select.bias + token * op.select.bias_stride + e);
      logit_bias[e] = op.logit_bias == nullptr ? 0.0f : __ldg(op.logit_bias + e);
    }
  };
  const Selection selection{experts, op.select.k, op.select.scoring, op.select.groups};
  TokenOutput output{op.select.weights, op.select.expert_ids, op.select.chosen_logits, -1};

  WarpSums<T, kTokenTiles, kExpertTiles> sums;
  int bytes = start();
  if (blocks - 1 - block < rows) load_biases(blocks - 1 - block);
  while (step < last_step) {
    copies.wait();
    for (int begin = warp * kStepBytes; begin < bytes; begin += kBlockWarps * kStepBytes) {
      const int offset = begin + lane % 4 * 16;
      const auto piece = [&](const char* place, int row) {
        return offset < bytes ? *reinterpret_cast<const uint4*>(place + row * plan.stride + offset) : uint4{};
      };
      sums.add(lane, [&](int row) { return piece(weight_place, row); }, [&](int row) { return piece(x_place, row); });
    }
    __syncthreads();
    step += plan.pass_steps;
    bytes = start();
  }

  auto* warp_sums = reinterpret_cast<float (*)[kTokens][kExperts + 4]>(shared);
  sums.store(warp_sums[warp][0], kExperts + 4, lane);
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < kTokens * kExperts / 2; i += kBlockThreads) {
    const int token = i / (kExperts / 2);
    const int pair = i % (kExperts / 2);
    if (first_token + token >= rows || first_expert + 2 * pair >= experts) continue;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(&warp_sums[w][token][2 * pair]);
      sum.x += part.x;
      sum.y += part.y;
    }
    publish(packets + (static_cast<int64_t>(split) * rows + first_token + token) * pairs + first_expert / 2 + pair,
            sum);
  }

  for (int token = blocks - 1 - block; token < rows; token += blocks) {
    if (token >= blocks) load_biases(token);
    // Expert e's two neighbouring threads receive half of the pair's packets each, and swap.
#pragma unroll 1
    for (int begin = 0; begin < experts; begin += 2 * kBlockThreads) {
      float2 parts[2][kSplits / 2];
      bool complete;
      do {
        complete = true;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int e = begin + j * kBlockThreads + thread;
#pragma unroll
          for (int s = 0; s < kSplits / 2; ++s) {
            const int64_t row = static_cast<int64_t>(e % 2 * (kSplits / 2) + s) * rows + token;
            if (e / 2 < pairs) complete &= receive(packets + row * pairs + e / 2, parts[j][s]);
          }
        }
      } while (!complete);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int e = begin + j * kBlockThreads + thread;
        float2 sum = parts[j][0];
#pragma unroll
        for (int s = 1; s < kSplits / 2; ++s) {
          sum.x += parts[j][s].x;
          sum.y += parts[j][s].y;
        }
        const float other = __shfl_xor_sync(kFullWarp, e % 2 == 0 ? sum.y : sum.x, 1);
        if (e < experts) chooser.logits[e] = (e % 2 == 0 ? sum.x + other : other + sum.y) + logit_bias[e];
#pragma unroll
        for (int s = 0; s < kSplits / 2; ++s) {
          const int64_t row = static_cast<int64_t>(e % 2 * (kSplits / 2) + s) * rows + token;
          if (e / 2 < pairs) packets[row * pairs + e / 2].tag = 0;
        }
      }
    }
    output.place = static_cast<int64_t>(token) * op.select.k;
    const bool wanted = op.select.token_mask == nullptr || op.select.token_mask[token];
    chooser.select(selection, op.select.bias != nullptr, wanted, output);
    __syncthreads();
  }
}

template <class T, int kTokenTiles, int kExpertTiles>
cudaError_t launch_tile(const DenseRouter& op, Packet* packets, cudaStream_t stream) {
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int kExperts = 16 * kExpertTiles;
  const DecodePlan plan = make_plan<kTokens, kExperts>(op.hidden * static_cast<int>(sizeof(T)));
  const auto kernel = multiply_and_select<T, kTokenTiles, kExpertTiles>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid((op.select.experts + kExperts - 1) / kExperts, kSplits,
                  static_cast<unsigned>((op.select.rows + kTokens - 1) / kTokens));
  kernel<<<grid, kBlockThreads, plan.shared_bytes, stream>>>(op, plan, packets);
  return cudaGetLastError();
}

}  // namespace

// Up to kMaxFusedRows tokens the fused kernel is the faster one. Above, XLA's product and the kernel of activation_topk
// are: on an H100 they take 13 us for 512 tokens, 4096 hidden elements and 256 experts, 23 us for 4096 tokens and 74 us
// for 16384, and no product of ours with wgmma came below 12, 41 and 89 us before it had selected anything.
constexpr int kMaxFusedRows = 64;

bool supports(const DenseRouter& op) {
  const ActivationTopk& select = op.select;
  return select.rows <= kMaxFusedRows && op.hidden % 8 == 0 && select.experts <= kMaxBlockExperts &&
         select.k <= kMaxBlockTopK && select.groups.num_groups <= kMaxBlockGroups;
}

size_t workspace_bytes(const DenseRouter& op) {
  return kSplits * static_cast<size_t>(op.select.rows) * ((op.select.experts + 1) / 2) * sizeof(Packet);
}

cudaError_t launch(const DenseRouter& op, void* workspace, cudaStream_t stream) {
  const int64_t rows = op.select.rows;
  if (rows == 0) return cudaSuccess;
  if (!supports(op)) return cudaErrorNotSupported;
  // The copies move 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(op.x) % 16 != 0 || reinterpret_cast<uintptr_t>(op.weight) % 16 != 0) {
    return cudaErrorMisalignedAddress;
  }
  auto* packets = static_cast<Packet*>(workspace);
  return with_type(op.operand_dtype, [&](auto type) {
    using T = decltype(type);
    if (rows <= 8) return launch_tile<T, 1, 1>(op, packets, stream);
    if (rows <= 16) return launch_tile<T, 2, 1>(op, packets, stream);
    if constexpr (sizeof(T) == 4) {
      return launch_tile<T, 4, 1>(op, packets, stream);
    } else {
      if (rows <= 32) return launch_tile<T, 4, 2>(op, packets, stream);
      return launch_tile<T, 8, 2>(op, packets, stream);
    }
  });
}

}  // namespace jax_router::cuda
