// routed_gradients: the gradients of hidden states and gate from that of the weights, on Hopper's tensor cores, of at
// most 128 experts and 8 choices a token.
//
// A block owns 128 columns of the hidden axis and a part of the tokens. It goes through these in tiles of 64, a stage
// of a ring each: one thread has the copy engine bring the tile's columns of x, and four warps find the cotangents of
// its choices and set them, in two parts, among zeros: [64, 128] of each part. When a stage is used again, they clear
// what they have set. Both products read these matrices, and are computed transposed, so that what they multiply lies
// in registers: grad_x^T = weight^T @ cotangents^T, for which a block needs but its columns of the weight all along;
// and grad_weight^T = x^T @ cotangents, whose sums stay in registers until the end. Two warpgroups have 64 columns
// each. They turn their tile of grad_x around in shared memory, from where the copy engine stores it.
//
// The sums of the parts of the tokens go to the workspace as they lie in registers; a second kernel adds them up in
// their order, and rounds.
//
// Floor: x is read once, and grad_x written once. The tensor cores need nine tenths of that time, most of it for zeros.
#include <cstdint>

#include "kernels.h"
#include "parts/cluster.cuh"
#include "parts/cotangent.cuh"
#include "parts/dtype.cuh"
#include "parts/hopper.cuh"
#include "parts/launch.cuh"
#include "parts/tensor_map.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kGroups = 2;   // that multiply; one more fills the ring
constexpr int kThreads = kGroup * (kGroups + 1);
constexpr int kBox = kGradientBoxBytes;
constexpr int kStages = kGradientStages;
constexpr int kTokensOfWarp = kGradientTokens / 4;
constexpr int kChoiceSlots = kGradientChoiceSlots;
// How many tiles before it is filled a stage's choices are asked for. The warps that fill are less than kStages tiles
// apart, and clear what lies kStages back.
constexpr int kAhead = kChoiceSlots - 2 * kStages;
static_assert(kAhead > 0);
static_assert(kGradientChoices == kFewChoiceLanes);
constexpr int kQuads = kGradientExperts / 2 / 4;  // of sums, in a thread

// Registers of a thread that multiplies, and of one that does not.
constexpr int kMoreRegisters = 208;
constexpr int kFewerRegisters = 88;

// A stage: x in two boxes of 64 columns, then the larger parts of the cotangents in two of 64 experts, then the others.
constexpr int kCotangents = 2 * kBox;
constexpr int kPart = 2 * kBox;

// A block's columns and tokens.
struct Work {
  int slice;
  int split;
  int first_tile;
  int tiles;

  __device__ Work(const RoutedGradients& op, const RoutedGradientsPlan& plan)
      : slice(static_cast<int>(blockIdx.x) % plan.slices), split(static_cast<int>(blockIdx.x) / plan.slices) {
    const int64_t all = (op.rows + kGradientTokens - 1) / kGradientTokens;
    first_tile = static_cast<int>(split * all / plan.splits);
    tiles = static_cast<int>((split + 1) * all / plan.splits) - first_tile;
  }
  __device__ int column(int box) const { return slice * kGradientColumns + box * kBoxColumns; }
  __device__ int token(int tile) const { return (first_tile + tile) * kGradientTokens; }
};

struct Ring {
  char* stages;
  TransferBarrier* full;   // by the copies of x, and by the warps that set cotangents
  TransferBarrier* empty;  // by the warps that multiply
  char* choices;
  TransferBarrier* choices_are_here;
};

// The stage that is next, and how often it has been.
struct Turn {
  int slot = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      ++phase;
    }
  }
};

__device__ __forceinline__ float4* sums_of(const RoutedGradients& op, const RoutedGradientsPlan& plan, int split,
                                           int slice, int group) {
  const int64_t number = (int64_t{split} * plan.slices + slice) * kGroups + group;
  return reinterpret_cast<float4*>(static_cast<char*>(op.workspace.data) + plan.sums) + number * kQuads * kGroup;
}

// In a box of rows of 128 bytes: what a lane has the address of, to move four matrices of 8 x 8 from 16 rows and those
// of 64 columns that are its warp's.
__device__ __forceinline__ uint32_t place_of_lane() {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint32_t row = lane / 16 * 8 + lane % 8;
  return row * 128 + ((2 * warp + lane / 8 % 2 ^ row % 8) << 4);
}

// What one warpgroup multiplies.
__device__ __forceinline__ void multiply(const CUtensorMap& grad_map, const RoutedGradients& op,
                                         const RoutedGradientsPlan& plan, const Work& work, const Ring& ring,
                                         char* results, TransferBarrier* weight_is_here) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kGroup, 0);
  const bool leads = threadIdx.x % kGroup == 0;
  const auto meet = [&] { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroup) : "memory"); };
  const uint32_t place = place_of_lane();
  char* own = results + group * 2 * kBox;

  uint32_t weight[kGradientExperts / 16][4];
  wait_for_transfers(weight_is_here, 0);
#pragma unroll
  for (int k = 0; k < kGradientExperts / 16; ++k) load_transposed(weight[k], address_of(own) + place + k * 16 * 128);
  float sums[kGradientExperts / 2];
#pragma unroll
  for (int i = 0; i < kGradientExperts / 2; ++i) sums[i] = 0.0f;
  meet();  // now results may lie where the weight was

  Turn turn;
#pragma unroll 1
  for (int tile = 0; tile < work.tiles; ++tile) {
    wait_for_transfers(&ring.full[turn.slot], turn.phase);
    char* stage = ring.stages + __shfl_sync(kFullWarp, turn.slot, 0) * kGradientStageBytes;
    const uint32_t along = wgmma_place(stage + kCotangents);
    const uint32_t across = wgmma_place(stage + kCotangents, kBox);
    float grad_x[kGradientTokens / 2];
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int k = 0; k < kGradientExperts / 16; ++k) {
        const int offset = part * kPart + k / 4 * kBox + k % 4 * 32;
        wgmma(grad_x, weight[k], wgmma_descriptor(along + offset / 16), part > 0 || k > 0);
      }
    }
    wgmma_commit();
    uint32_t x[kGradientTokens / 16][4];
#pragma unroll
    for (int k = 0; k < kGradientTokens / 16; ++k) {
      load_transposed(x[k], address_of(stage) + group * kBox + place + k * 16 * 128);
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kGradientTokens / 16; ++k) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        wgmma_across(sums, x[k], wgmma_descriptor(across + (part * kPart + k * 16 * 128) / 16), true);
      }
    }
    wgmma_commit();

    wgmma_wait<1>();
    char* result = own + tile % 2 * kBox;
    if (leads) wait_for_stores<1>();
    meet();
    const uint32_t to = address_of(result) + place;
#pragma unroll
    for (int i = 0; i < kGradientTokens / 2; i += 8) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = pack_two(grad_x[i + 2 * j], grad_x[i + 2 * j + 1], __nv_bfloat16{});
      store_transposed(to + i / 4 * 8 * 128, pairs);
    }
    fence_copies();
    meet();
    if (leads) {
      store_box(grad_map, work.column(group), work.token(tile), result);
      commit_stores();
    }
    wgmma_wait<0>();
    if (lane == 0) arrive_in_block(address_of(&ring.empty[turn.slot]));
    turn.advance();
  }
  float4* to = sums_of(op, plan, work.split, work.slice, group) + threadIdx.x % kGroup;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    to[i * kGroup] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  }
  if (leads) wait_for_stores<0>();
}

// Fills the ring. A warp has 16 tokens of a tile, and all their choices.
struct Filler {
  const CUtensorMap& x_map;
  const RoutedGradients& op;
  const Work& work;
  const Ring& ring;

  __device__ __forceinline__ void begin() const {
    for (int tile = 0; tile < min(work.tiles, kAhead); ++tile) copy_choices(tile);
    for (int tile = 0; tile < min(work.tiles, kStages); ++tile) copy_x(tile, tile);
  }

  __device__ __forceinline__ void go_on() const {
    const bool leads = threadIdx.x % kGroup == 0;
    Turn turn;
#pragma unroll 1
    for (int tile = 0; tile < work.tiles; ++tile) {
      char* cotangents = ring.stages + turn.slot * kGradientStageBytes + kCotangents;
      if (tile >= kStages) wait_for_transfers(&ring.empty[turn.slot], turn.phase - 1);
      if (leads) {
        if (tile >= kStages) copy_x(tile, turn.slot);
        if (tile + kAhead < work.tiles) copy_choices(tile + kAhead);
      }
      __syncwarp();
      if (tile < kStages) {
        zero(cotangents);
      } else {
        set(tile - kStages, address_of(cotangents), true);
      }
      __syncwarp();
      wait_for_transfers(&ring.choices_are_here[tile % kChoiceSlots], tile / kChoiceSlots);
      set(tile, address_of(cotangents), false);
      fence_copies();
      __syncwarp();
      if (lane() == 0) arrive_in_block(address_of(&ring.full[turn.slot]));
      turn.advance();
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32 % 4; }

  __device__ __forceinline__ void copy_x(int tile, int slot) const {
    announce(address_of(&ring.full[slot]), 2 * kBox);
    for (int box = 0; box < 2; ++box) {
      copy_box(ring.stages + slot * kGradientStageBytes + box * kBox, x_map, work.column(box), work.token(tile),
               &ring.full[slot]);
    }
  }

  __device__ __forceinline__ char* choices_of(int tile) const {
    return ring.choices + tile % kChoiceSlots * kGradientChoiceBytes;
  }
  __device__ __forceinline__ void copy_choices(int tile) const {
    TransferBarrier* barrier = &ring.choices_are_here[tile % kChoiceSlots];
    const uint32_t bytes = kGradientTokens * op.k * sizeof(uint2);
    announce(address_of(barrier), bytes);
    copy_bytes(choices_of(tile), static_cast<const uint2*>(op.workspace.data) + int64_t{work.token(tile)} * op.k, bytes,
               barrier);
  }

  // The warp's rows of all four boxes.
  __device__ __forceinline__ void zero(char* cotangents) const {
    for (int box = 0; box < 4; ++box) {
      uint4* rows = reinterpret_cast<uint4*>(cotangents + box * kBox + warp() * kTokensOfWarp * 128);
#pragma unroll
      for (int i = 0; i < kTokensOfWarp * 8 / 32; ++i) rows[i * 32 + lane()] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void set(int tile, uint32_t cotangents, bool clears) const {
    const uint32_t k_reciprocal = (65536 + op.k - 1) / op.k;  // exact for so few numbers
    const uint2* choices = reinterpret_cast<const uint2*>(choices_of(tile)) + warp() * kTokensOfWarp * op.k;
    for (int i = lane(); i < kTokensOfWarp * op.k; i += 32) {
      const auto [expert, parts] = choices[i];
      if (expert >= kGradientExperts) continue;
      const uint32_t token = warp() * kTokensOfWarp + (i * k_reciprocal >> 16);
      const uint32_t place =
          cotangents + expert / 64 * kBox + token * 128 + ((expert / 8 % 8 ^ token % 8) << 4) + expert % 8 * 2;
      store_half(place, clears ? 0 : parts);
      store_half(place + kPart, clears ? 0 : parts >> 16);
    }
  }
  static __device__ __forceinline__ void store_half(uint32_t address, uint32_t bits) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(bits)) : "memory");
  }
};

__device__ __forceinline__ void multiply_tiles(const CUtensorMap& x_map, const CUtensorMap& weight_map,
                                               const CUtensorMap& grad_map, const RoutedGradients& op,
                                               const RoutedGradientsPlan& plan) {
  extern __shared__ char raw[];
  __shared__ TransferBarrier full[kStages];
  __shared__ TransferBarrier empty[kStages];
  __shared__ TransferBarrier choices_are_here[kChoiceSlots];
  __shared__ TransferBarrier weight_is_here;
  // Aligned by an offset, so that the compiler still knows it for shared memory.
  char* shared = raw + (0u - address_of(raw)) % kGradientAlignment;
  char* results = shared + kStages * kGradientStageBytes;
  const Work work(op, plan);
  const Ring ring{shared, full, empty, results + kGradientResultBytes, choices_are_here};
  const Filler filler{x_map, op, work, ring};
  if (threadIdx.x == kGroups * kGroup) {
    for (int i = 0; i < kStages; ++i) {
      init_transfers(&full[i], 1 + kGroup / 32);
      init_transfers(&empty[i], kGroups * kGroup / 32);
    }
    for (int i = 0; i < kChoiceSlots; ++i) init_transfers(&choices_are_here[i], 1);
    init_transfers(&weight_is_here, 1);
    announce(address_of(&weight_is_here), kGradientResultBytes);
    for (int box = 0; box < 2; ++box) {
      copy_box(results + box * 2 * kBox, weight_map, work.column(box), 0, &weight_is_here);
    }
    filler.begin();
  }
  __syncthreads();
  if (threadIdx.x < kGroups * kGroup) {
    raise_registers<kMoreRegisters>();
    multiply(grad_map, op, plan, work, ring, results, &weight_is_here);
  } else {
    lower_registers<kFewerRegisters>();
    filler.go_on();
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    routed_gradients_tiles(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                           const __grid_constant__ CUtensorMap grad_map, const __grid_constant__ RoutedGradients op,
                           const __grid_constant__ RoutedGradientsPlan plan) {
  if (kOnHopper) multiply_tiles(x_map, weight_map, grad_map, op, plan);
}

// The cotangents of the choices, of whole tiles.
__global__ void __launch_bounds__(kGroup) routed_gradients_choices(const __grid_constant__ RoutedGradients op) {
  const int64_t token = (int64_t{blockIdx.x} * kGroup + threadIdx.x) / kFewChoiceLanes;
  const int j = static_cast<int>(threadIdx.x) % kFewChoiceLanes;
  const int64_t place = token * op.k + j;
  int id[1] = {-1};
  float grad[1] = {}, logit[1] = {}, cotangent[1];
  if (token < op.rows && j < op.k) {
    id[0] = __ldg(op.expert_ids + place);
    grad[0] = __ldg(op.grad_weights + place);
    logit[0] = __ldg(op.residual + place);
    if (static_cast<uint32_t>(id[0]) >= static_cast<uint32_t>(op.experts)) id[0] = -1;
  }
  differentiate<kFewChoiceLanes>(op.scoring, op.k, id, logit, grad, cotangent);
  merge_equal_ids<kFewChoiceLanes>(op.k, id, cotangent);
  if (j < op.k) {
    static_cast<uint2*>(op.workspace.data)[place] = make_uint2(static_cast<uint32_t>(id[0]), bf16_parts(cotangent[0]));
  }
}

// A thread adds up what as many threads as there are splits have left of two columns and two experts.
__global__ void __launch_bounds__(kGroup) routed_gradients_sums(const __grid_constant__ RoutedGradients op,
                                                                const __grid_constant__ RoutedGradientsPlan plan) {
  const int quad = static_cast<int>(blockIdx.x) % kQuads;
  const int group = static_cast<int>(blockIdx.x) / kQuads % kGroups;
  const int slice = static_cast<int>(blockIdx.x) / kQuads / kGroups;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int split = 0; split < plan.splits; ++split) {
    const float4 part = __ldcg(sums_of(op, plan, split, slice, group) + quad * kGroup + threadIdx.x);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_expert = 8 * quad + lane % 4 * 2;
  const int first_column = slice * kGradientColumns + group * kBoxColumns + warp * 16 + lane / 4;
  const auto store = [&](int expert, int column, float value) {
    if (expert >= op.experts || column >= op.hidden) return;
    store_one(static_cast<__nv_bfloat16*>(op.grad_weight) + int64_t{expert} * op.hidden + column, value);
  };
  store(first_expert, first_column, sum.x);
  store(first_expert + 1, first_column, sum.y);
  store(first_expert, first_column + 8, sum.z);
  store(first_expert + 1, first_column + 8, sum.w);
}

}  // namespace

cudaError_t run(const RoutedGradients& op, const RoutedGradientsPlan& plan, cudaStream_t stream) {
  CUtensorMap x_map, weight_map, grad_map;
  cudaError_t error = make_tensor_map(x_map, DType::kBF16, op.x, op.rows, op.hidden, kGradientTokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(weight_map, DType::kBF16, op.weight, op.experts, op.hidden, kGradientExperts);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(grad_map, DType::kBF16, op.grad_x, op.rows, op.hidden, kGradientTokens);
  if (error != cudaSuccess) return error;
  const int64_t tokens = round_up(op.rows, kGradientTokens);
  const LaunchShape choices{tokens * kFewChoiceLanes / kGroup, kGroup};
  error = launch_kernel(routed_gradients_choices, choices, stream, op);
  if (error != cudaSuccess) return error;
  const LaunchShape tiles{plan.blocks, kThreads, plan.shared_bytes};
  error = launch_kernel(routed_gradients_tiles, tiles, stream, x_map, weight_map, grad_map, op, plan);
  if (error != cudaSuccess) return error;
  const LaunchShape sums{int64_t{plan.slices} * kGroups * kQuads, kGroup};
  return launch_kernel(routed_gradients_sums, sums, stream, op, plan);
}

}  // namespace jax_router::cuda
