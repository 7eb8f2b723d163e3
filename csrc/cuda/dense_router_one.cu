// dense_router of one token: one kernel multiplies it by the weight and selects its experts.
//
// A thread block owns two experts: it multiplies their whole rows by the token, in f32, and hands the two logits over
// as one packet (parts/packets.cuh). The last block of the grid also waits for all packets and selects
// (parts/block_token.cuh). A thread copies 16 bytes of each row and the same elements of the token to places in shared
// memory that it alone reads, kOneStages times before it waits for the first: no thread waits for another before the
// sums, and with up to 8192 hidden elements of 16 bits all that the kernel reads is under way at once.
//
// Floor: the weight is read once, experts * hidden elements; the token comes from the L2.
#include <cstdint>
#include <type_traits>

#include "dense_router.h"
#include "parts/async_copy.cuh"
#include "parts/block_token.cuh"
#include "parts/dtype.cuh"
#include "parts/launch.cuh"
#include "parts/packets.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kWarps = kOneThreads / 32;

// What the product needs to know, small enough for one line of the constant cache: the first thing a block waits for.
struct Product {
  const char* weight;
  const char* x;
  uint32_t row_bytes;  // of the weight
  int experts;
  Packet* packets;
  uint64_t tag;
};

// The elements that 16 bytes of the weight are, or as many of x, as f32.
template <class T, int kCount>
__device__ __forceinline__ void unpack(const char* place, float (&elements)[kCount]) {
  if constexpr (sizeof(T) == 4) {
    const float4 quad = *reinterpret_cast<const float4*>(place);
    elements[0] = quad.x;
    elements[1] = quad.y;
    elements[2] = quad.z;
    elements[3] = quad.w;
  } else {
    using Words = std::conditional_t<kCount == 8, uint4, uint2>;
    const Words words = *reinterpret_cast<const Words*>(place);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 two = unpack_two(reinterpret_cast<const uint32_t*>(&words)[i], T{});
      elements[2 * i] = two.x;
      elements[2 * i + 1] = two.y;
    }
  }
}

// The sums over the warp's lanes of two numbers: lanes 0 to 15 get that of `low`, the others that of `high`.
__device__ __forceinline__ float sum_of_lanes(float low, float high) {
  const bool upper = threadIdx.x % 32 >= 16;
  float sum = (upper ? high : low) + __shfl_xor_sync(kFullWarp, upper ? low : high, 16);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

// kOwn: experts of a thread of the block that selects.
template <class X, class W, KeyMode kMode, int kOwn>
__global__ void __launch_bounds__(kOneThreads)
    dense_router_one_token(const Product product, const __grid_constant__ DenseRouter op) {
  constexpr int kElements = 16 / sizeof(W);       // that a thread copies at once
  constexpr int kXBytes = kElements * sizeof(X);  // of them
  extern __shared__ __align__(128) char stages[];
  __shared__ __align__(16) float warp_sums[2][kWarps];
  __shared__ BlockScratch<kOneThreads * kOwn> scratch;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int block = static_cast<int>(blockIdx.x);

  // The product.
  const uint32_t row_bytes = product.row_bytes;
  const char* weight = product.weight + static_cast<uint64_t>(2 * block) * row_bytes + 16 * thread;
  const char* x = product.x + kXBytes * thread;
  // Where there is no second expert, the first one's row will do.
  const uint32_t second = 2 * block + 1 < product.experts ? row_bytes : 0;
  const int left = static_cast<int>(row_bytes) - 16 * thread;
  const auto place = [&](int stage) { return stages + stage * kOneStageBytes + 16 * thread; };
  const auto x_place = [&](int stage) { return stages + stage * kOneStageBytes + 32 * kOneThreads + kXBytes * thread; };
  const auto copy = [&](int step, int stage) {
    const int offset = step * 16 * kOneThreads;
    if (offset < left) {
      const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(place(stage)));
      copy_async(to, weight + offset);
      copy_async(to + 16 * kOneThreads, weight + second + offset);
      const auto x_to = static_cast<uint32_t>(__cvta_generic_to_shared(x_place(stage)));
      const char* x_from = x + step * kXBytes * kOneThreads;
      if constexpr (kXBytes == 16) {
        copy_async(x_to, x_from);
      } else {
        copy_half_async(x_to, x_from);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kOneStages; ++i) copy(i, i);
  float sums[2][2] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step * 16 * kOneThreads < left; ++step) {
    wait_for_groups<kOneStages - 1>();
    float b[kElements];
    unpack<X>(x_place(stage), b);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float a[kElements];
      unpack<W>(place(stage) + row * 16 * kOneThreads, a);
#pragma unroll
      for (int i = 0; i < kElements; ++i) sums[row][i % 2] = fmaf(a[i], b[i], sums[row][i % 2]);
    }
    copy(step + kOneStages, stage);
    stage = (stage + 1) % kOneStages;
  }
  const float sum = sum_of_lanes(sums[0][0] + sums[0][1], sums[1][0] + sums[1][1]);
  if (lane % 16 == 0) warp_sums[lane / 16][thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    float logits[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const auto quad_sum = [&](int i) {
        const float4 quad = *reinterpret_cast<const float4*>(&warp_sums[row][i]);
        return (quad.x + quad.y) + (quad.z + quad.w);
      };
      logits[row] = quad_sum(0) + quad_sum(4);
    }
    publish(product.packets + block, make_float2(logits[0], logits[1]), product.tag);
  }
  if (blockIdx.x != gridDim.x - 1) return;

  // The selection. All packets are asked for at once, so threads without an expert read the last one.
  const ActivationTopk& select = op.select;
  const Selection& selection = select.selection;
  const auto experts = static_cast<unsigned>(selection.experts);
  const auto expert = [&](int j) { return j * kOneThreads + threadIdx.x; };
  const bool has_bias = kMode == KeyMode::kScores || (kMode == KeyMode::kGroups && select.bias != nullptr);
  float logit_offset[kOwn];
  float biases[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const bool exists = expert(j) < experts;
    logit_offset[j] = op.logit_bias != nullptr && exists ? __ldg(op.logit_bias + expert(j)) : 0.0f;
    biases[j] = has_bias && exists ? __ldg(select.bias + expert(j)) : 0.0f;
  }
  const bool wanted = !is_masked(select, 0);
  scratch.clear(selection);
  const auto packet = [&](int j) { return product.packets + min(expert(j) / 2, gridDim.x - 1); };
  float2 logits_of_two[kOwn];
  bool complete;
  uint32_t looks = 0;
  do {
    if (++looks == kMostLooks) __trap();
    uint64_t tags[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) tags[j] = receive(packet(j), logits_of_two[j]);
    complete = true;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) complete &= tags[j] == product.tag;
  } while (!__all_sync(kFullWarp, complete));
  float logits[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    logits[j] = thread % 2 == 0 ? logits_of_two[j].x : logits_of_two[j].y;
    if (op.logit_bias != nullptr) logits[j] += logit_offset[j];
    if (expert(j) >= experts) logits[j] = -INFINITY;
  }
  const TokenOutput output{select.weights, select.expert_ids, select.chosen_logits, 0};
  select_token_of_block<kMode, kOneThreads>(selection, logits, has_bias, biases, wanted, output, scratch);
#pragma unroll
  for (int j = 0; j < kOwn; ++j) packet(j)->tag = kNoTag;
}

}  // namespace

cudaError_t run_one(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream) {
  return with_types(op, [&](auto x, auto weight, auto mode) {
    using X = decltype(x);
    using W = decltype(weight);
    return with_index<kOneSizes>(plan.one, [&](auto index) {
      const Product product{static_cast<const char*>(op.weight),          static_cast<const char*>(op.x),
                            op.hidden * static_cast<uint32_t>(sizeof(W)), op.select.selection.experts,
                            static_cast<Packet*>(op.workspace.data),      new_tag()};
      return launch_kernel(
          dense_router_one_token<X, W, decltype(mode)::value, kOneExperts[decltype(index)::value] / kOneThreads>,
          {plan.blocks, kOneThreads, plan.shared_bytes}, stream, product, op);
    });
  });
}

}  // namespace jax_router::cuda
