// Pieces of rows (plan/pieces.h): how they are loaded and stored, their elements as f32, and the choices of a token,
// which the lanes of its warps hold.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../plan/pieces.h"
#include "dtype.cuh"
#include "warp.cuh"

namespace jax_router::cuda {

// What becomes of a piece that was read.
enum class Reuse {
  kNone,      // no lane nearby reads it again: it stays out of the L1
  kNoBlock,   // nor does any other block: it leaves the L2 before what others read or what is still to be written
  kThroughL1  // several tokens may share it; and where almost all that moves is loads, memory gives 3 % more so
};

// Volatile, so that no load is executed before the check that guards it.
template <Reuse kReuse = Reuse::kNone, class Bits>
__device__ __forceinline__ Bits load_piece(const Bits* p) {
  if constexpr (!std::is_same_v<Bits, uint4>) {
    return __ldg(p);
  } else {
    uint4 piece;
    if constexpr (kReuse == Reuse::kNone) {
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                   : "l"(p));
    } else if constexpr (kReuse == Reuse::kNoBlock) {
      asm volatile(
          "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
          "ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], policy; }"
          : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
          : "l"(p));
    } else {
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                   : "l"(p));
    }
    return piece;
  }
}

// What is written leaves the L2 first.
template <class Bits>
__device__ __forceinline__ void store_piece(Bits* p, Bits piece) {
  __stcs(p, piece);
}

template <int kBytes>
using BitsOf = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 4, unsigned int, std::conditional_t<kBytes == 2, unsigned short, unsigned char>>>;

// A piece of elements T.
template <class T, bool kWide>
struct Piece {
  static constexpr int kElements = kWide ? kPieceBytes / static_cast<int>(sizeof(T)) : 1;
  using Bits = BitsOf<kWide ? kPieceBytes : static_cast<int>(sizeof(T))>;
  using Floats = float[kElements];

  static __device__ __forceinline__ void unpack(const Bits& bits, Floats& floats) {
    if constexpr (!kWide) {
      floats[0] = as_float(*reinterpret_cast<const T*>(&bits));
    } else if constexpr (sizeof(T) == 4) {
      floats[0] = bits_float(bits.x), floats[1] = bits_float(bits.y);
      floats[2] = bits_float(bits.z), floats[3] = bits_float(bits.w);
    } else {
      const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 two = unpack_two(words[i], T{});
        floats[2 * i] = two.x, floats[2 * i + 1] = two.y;
      }
    }
  }

  static __device__ __forceinline__ Bits pack_all(float number) {
    Floats floats;
#pragma unroll
    for (int i = 0; i < kElements; ++i) floats[i] = number;
    return pack(floats);
  }

  // Rounds.
  static __device__ __forceinline__ Bits pack(const Floats& floats) {
    if constexpr (!kWide) {
      T element;
      store_one(&element, floats[0]);
      return *reinterpret_cast<const Bits*>(&element);
    } else if constexpr (sizeof(T) == 4) {
      return make_uint4(float_bits(floats[0]), float_bits(floats[1]), float_bits(floats[2]), float_bits(floats[3]));
    } else {
      return make_uint4(pack_two(floats[0], floats[1], T{}), pack_two(floats[2], floats[3], T{}),
                        pack_two(floats[4], floats[5], T{}), pack_two(floats[6], floats[7], T{}));
    }
  }

  static __device__ __forceinline__ Bits scale(float weight, const Floats& floats) {
    Floats scaled;
#pragma unroll
    for (int i = 0; i < kElements; ++i) scaled[i] = __fmul_rn(weight, floats[i]);
    return pack(scaled);
  }
};

inline dim3 threads_of(const RowBlocks& blocks) { return dim3(32 * blocks.warps, blocks.block_rows); }

// Which row a thread has, if there is such a row, and which of the row's lanes it is.
struct LaneOfRow {
  __device__ __forceinline__ explicit LaneOfRow(const RowBlocks& blocks) {
    const uint32_t group = blocks.by_parts(blockIdx.x);
    row = group * blocks.block_rows + threadIdx.y;
    lane = (blockIdx.x - group * blocks.parts) * blockDim.x + threadIdx.x;
    is_there = row < blocks.all_rows;
  }
  uint32_t row, lane;
  bool is_there;
};

// Up to 32 choices of a token, one a lane: its slot, or -1 where it has none, and its weight.
struct Choices {
  int slot;
  float weight;

  __device__ __forceinline__ int slot_of(int lane) const { return __shfl_sync(kFullWarp, slot, lane); }
  __device__ __forceinline__ float weight_of(int lane) const { return __shfl_sync(kFullWarp, weight, lane); }
};

// A token, numbered over all problems and within its own.
struct Token {
  __device__ __forceinline__ Token(const DispatchedRows& rows, int64_t row)
      : Token(rows, row, rows.batch == 1 ? 0 : row / rows.tokens) {}
  __device__ __forceinline__ Token(const DispatchedRows& rows, int64_t row, int64_t problem)
      : row(row), problem(problem), number(row - problem * rows.tokens) {}

  // The lanes' choices first .. first + 31.
  __device__ __forceinline__ Choices choices(const DispatchedRows& rows, const float* weights, int first) const {
    const int j = first + static_cast<int>(threadIdx.x % 32);
    Choices choices{-1, 1.0f};
    if (j >= rows.k) return choices;
    const int slot = __ldg(rows.slot + row * rows.k + j);
    if (slot >= 0 && slot < rows.slots) choices.slot = slot;
    if (weights != nullptr) choices.weight = __ldg(weights + row * rows.k + j);
    return choices;
  }

  // The token that a lane's slot names, -1 where it has none: a load, for which nobody waits who does not compare it.
  __device__ __forceinline__ int owner_of(const DispatchedRows& rows, int slot) const {
    return slot >= 0 ? __ldg(rows.token_index + slot_row(rows, slot)) : -1;
  }

  __device__ __forceinline__ int64_t slot_row(const DispatchedRows& rows, int slot) const {
    return problem * rows.slots + slot;
  }

  int64_t row, problem, number;
};

// What a warp does besides: zeros in the rows of those of its kSlotsOfWarp slots that are not in use.
template <class Bits>
__device__ __forceinline__ void clear_unused(const DispatchedRows& rows, int64_t warp, int64_t pieces, Bits* out) {
  const int lane = threadIdx.x % 32;
  const int64_t first = warp * kSlotsOfWarp;
  const bool mine = lane < kSlotsOfWarp && first + lane < rows.slot_rows();
  for (uint32_t unused = __ballot_sync(kFullWarp, mine && !is_in_use(rows, first + lane)); unused != 0;
       unused &= unused - 1) {
    Bits* row = out + (first + __ffs(static_cast<int>(unused)) - 1) * pieces;
    for (int64_t piece = lane; piece < pieces; piece += 32) store_piece(row + piece, Bits{});
  }
}

// Of how many slots a lane of the cotangents holds a piece at a time: more would cost blocks, and not have more in
// flight.
constexpr int kHeldRows = 4;

// The sums over a warp of eight numbers of each lane: that of number i in all lanes whose last three bits are i. The
// order of summation is the same for all.
__device__ __forceinline__ float sum_eight_over_warp(float (&numbers)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? numbers[i] : numbers[i + half];
      const float kept = upper ? numbers[i + half] : numbers[i];
      numbers[i] = __fadd_rn(kept, __shfl_xor_sync(kFullWarp, given, half));
    }
  }
  float sum = numbers[0];
  sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 8));
  return __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, 16));
}

// The same of one number: in every lane, with the same bits.
__device__ __forceinline__ float sum_over_warp(float number) {
#pragma unroll
  for (int step : {4, 2, 1, 8, 16}) number = __fadd_rn(number, __shfl_xor_sync(kFullWarp, number, step));
  return number;
}

// The products of a token's row with those of its slots. A lane has those of choices `lane` and `lane + 32`.
class ChoiceProducts {
 public:
  // Of choices 8 * eight .. + 7, over the lanes' pieces.
  __device__ __forceinline__ void add(int eight, float (&products)[8]) {
    const float sum = sum_eight_over_warp(products);
    const bool mine = static_cast<int>(threadIdx.x % 32) / 8 == eight % 4;
    if (mine && eight < 4) sums_[0] = __fadd_rn(sums_[0], sum);
    if (mine && eight >= 4) sums_[1] = __fadd_rn(sums_[1], sum);
  }

  // Adds up over the warps of a token, which are the block's from `first_warp` on, and stores the first `count`. All
  // threads of the block come here.
  __device__ __forceinline__ void store(int first_warp, int warps, int count, float* results) const {
    __shared__ float shared[kMoveWarps][kMaxTopK];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    shared[first_warp + warp][lane] = sums_[0];
    shared[first_warp + warp][lane + 32] = sums_[1];
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < count; j += 32 * warps) {
      float sum = shared[first_warp][j];
      for (int i = 1; i < warps; ++i) sum = __fadd_rn(sum, shared[first_warp + i][j]);
      results[j] = sum;
    }
  }

 private:
  float sums_[2] = {0.0f, 0.0f};
};

// body(Piece<T, wide>{}) as the pieces of a plan are.
template <class Body>
cudaError_t with_piece(DType dtype, bool wide, Body body) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return wide ? body(Piece<T, true>{}) : body(Piece<T, false>{});
  });
}

}  // namespace jax_router::cuda
