// A row of topk_select in the registers of a block or a warp.
#pragma once

#include "../topk_select.cuh"
#include "tile.cuh"

namespace jax_router::cuda {

constexpr int kRowIndexBits = 32;  // the halves of a word need no shifts

// -inf in every element of a word.
template <typename T>
constexpr uint32_t kMinusInfinities = 0xFF800000u;
template <>
constexpr uint32_t kMinusInfinities<__nv_bfloat16> = 0xFF80FF80u;
template <>
constexpr uint32_t kMinusInfinities<__half> = 0xFC00FC00u;

// A row in the registers of so many threads: its whole vectors of 16 bytes, and the elements before and after these,
// the edges, one a thread. Vectors that do not exist hold -inf. `place` is the thread's among those that have vectors
// side by side.
template <typename T, int kThreads, int kVectors>
struct RegisterRow {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr uint32_t kStep = kThreads * kElements;  // from a thread's vector to its next

  uint4 vectors[kVectors];
  float edge = -INFINITY;
  uint32_t head;        // elements before the first whole vector
  uint32_t end;         // where the whole vectors end
  uint32_t first;       // index of this thread's first vector
  uint32_t edge_index;  // of this thread's edge
  bool has_edge;        // whether this thread has one
  bool has_edges;       // whether the row has

  __device__ __forceinline__ RegisterRow(const T* row, uint32_t length, uint32_t place = threadIdx.x) {
    const uint32_t misaligned = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
    head = min(misaligned == 0 ? 0 : kElements - misaligned, length);
    end = length - (length - head) % kElements;
    first = head + place * kElements;
    row += first;
    asm("" : "+l"(row));  // one address with constant offsets
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      constexpr uint32_t kFill = kMinusInfinities<T>;
      vectors[v] = make_uint4(kFill, kFill, kFill, kFill);
      if (exists(v)) vectors[v] = __ldg(reinterpret_cast<const uint4*>(row + v * kStep));
    }
    has_edges = head + length - end != 0;
    edge_index = threadIdx.x < head ? threadIdx.x : end + threadIdx.x - head;
    has_edge = edge_index < length;
    has_edge = has_edge && has_edges;
    if (has_edge) edge = load_one(row - first + edge_index);
  }

  __device__ __forceinline__ uint32_t index(int v) const { return first + v * kStep; }
  __device__ __forceinline__ bool exists(int v) const { return index(v) < end; }
  __device__ __forceinline__ float element(int v, int e) const { return element_of(vectors[v], e, T{}); }
  __device__ __forceinline__ uint64_t pair(int v, int e) const {
    return PairFormat<T>{kRowIndexBits}.pair(element(v, e), index(v) + e);
  }
  __device__ __forceinline__ uint64_t edge_pair() const { return PairFormat<T>{kRowIndexBits}.pair(edge, edge_index); }

  // Of number i of the thread's elements, of which the edge is the last. To load it again is faster than to find it in
  // the registers.
  __device__ __forceinline__ uint32_t index_at(uint32_t i) const {
    return i == kVectors * kElements ? edge_index : first + i / kElements * kStep + i % kElements;
  }

  // An element's bits as they are in memory.
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  __device__ __forceinline__ Bits bits(int v, int e) const {
    constexpr int kOfWord = sizeof(uint32_t) / sizeof(T);
    return static_cast<Bits>(word_of(vectors[v], e / kOfWord) >> (e % kOfWord * 8 * sizeof(T)));
  }

  // The thread's largest element, NaN if one is.
  __device__ __forceinline__ float maximum() const { return max_nan(largest_element<T>(vectors), edge); }

  // Bit v * kElements + e for each element of whole vectors from + v that is not below `bound`, an element or infinite.
  // A NaN is not below anything.
  template <int kCount = kVectors>
  __device__ __forceinline__ uint32_t reaching(float bound, int from = 0) const {
    uint4 some[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) some[i] = vectors[from + i];
    uint32_t mask = elements_reaching<T>(some, bound);
    // Vectors that do not exist are not above -inf either.
    if (bound == -INFINITY) {
      const int present = first < end ? static_cast<int>((end - first - 1) / kStep) + 1 : 0;
      const int bits = min(max(present - from, 0), kCount) * kElements;
      if (bits < 32) mask &= (1u << bits) - 1;
    }
    return mask;
  }
};

}  // namespace jax_router::cuda
