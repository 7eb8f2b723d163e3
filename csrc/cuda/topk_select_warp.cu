// topk_select of few choices for rows that the registers of one warp hold, where there are enough rows: a warp needs no
// barriers, and a fraction of the instructions that a block's warps need together.
//
// A lane's elements fall into four lists, of which it knows the largest each. The j largest of a list's 32 maxima are
// elements no smaller than the j-th of them: the least of four such bounds is one that at least k elements reach, and
// the next above it one that k nearly always reach, and seldom many more. Their indices go to shared memory. 64 at a
// time they come back, two pairs a lane, are put in order and merged with the best so far.
//
// Where too many elements reach the bound (many equal elements), a bisection of their keys' range takes over, and of
// those that equal the k-th's the first are chosen.
//
// Floor: rows * (length * sizeof(T) + k * (sizeof(T) + 4)) bytes.
#include "parts/launch.cuh"
#include "parts/register_row.cuh"
#include "topk_select.cuh"

namespace jax_router::cuda {
namespace {

// The larger of two pairs, or the smaller.
__device__ __forceinline__ uint32_t larger_if(bool larger, uint32_t a, uint32_t b) {
  return larger ? max(a, b) : min(a, b);
}
__device__ __forceinline__ uint64_t larger_if(bool larger, uint64_t a, uint64_t b) {
  return (ranked_pair(a) > ranked_pair(b)) == larger ? a : b;
}

// 64 pairs, of which lane i has numbers 2 * i and 2 * i + 1.
template <class Pair>
struct TwoPairs {
  Pair pairs[2];

  // Of each of two numbers that lie `step` or, mirrored, up to 2 * step - 1 lanes apart, the first becomes the larger.
  __device__ __forceinline__ void exchange(int step, bool mirrored) {
    const int distance = mirrored ? 2 * step - 1 : step;
    const Pair others[2] = {__shfl_xor_sync(kFullWarp, pairs[mirrored ? 1 : 0], distance),
                            __shfl_xor_sync(kFullWarp, pairs[mirrored ? 0 : 1], distance)};
    const bool is_first = (threadIdx.x & step) == 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs[i] = larger_if(is_first, pairs[i], others[i]);
  }
  __device__ __forceinline__ void exchange_own() {
    const Pair larger = larger_if(true, pairs[0], pairs[1]);
    pairs[1] = larger_if(false, pairs[0], pairs[1]);
    pairs[0] = larger;
  }
  // Puts numbers that rise and then fall, or the reverse, in descending order, within each 2 * `lanes` lanes.
  __device__ __forceinline__ void merge(int lanes) {
#pragma unroll
    for (int step = lanes; step > 0; step /= 2) exchange(step, false);
    exchange_own();
  }
  __device__ __forceinline__ void sort() {
    exchange_own();
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      exchange(lanes, true);
      merge(lanes / 2);
    }
  }
  // The best 64 of two sorted ones, sorted.
  __device__ __forceinline__ void take_best(const TwoPairs& others) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      pairs[i] = larger_if(true, pairs[i], __shfl_xor_sync(kFullWarp, others.pairs[1 - i], 31));
    merge(16);
  }
};

// The order of an element's bits. Neither kNoKey nor the largest number is among them.
template <typename T>
__device__ __forceinline__ uint32_t key_of_bits(uint32_t bits) {
  constexpr uint32_t kAll = 0xFFFFFFFFu >> (32 - 8 * sizeof(T)), kSign = kAll / 2 + 1;
  constexpr uint32_t kInfinity = kMinusInfinities<T> & (kSign - 1);
  const uint32_t key = (bits & kSign) != 0 ? ~bits & kAll : bits | kSign;
  return (bits & (kSign - 1)) > kInfinity ? kAll - 1 : key;
}

// How many blocks of a multiprocessor the registers are shared out to, by the bytes of a lane.
constexpr int resident_blocks(int bytes) { return bytes <= 64 ? 32 : bytes <= 128 ? 28 : bytes <= 256 ? 16 : 12; }

// Which of a lane's elements are candidates: a bit each, of so many vectors a mask, and the edge.
template <typename T, int kVectors>
struct Marks {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kVectorsOfMask = kVectors * kElements < 32 ? kVectors : 32 / kElements;
  static constexpr int kMasks = kVectors / kVectorsOfMask;

  uint32_t masks[kMasks];
  bool edge;

  __device__ __forceinline__ uint32_t size() const {
    uint32_t size = edge ? 1 : 0;
#pragma unroll
    for (uint32_t mask : masks) size += __popc(mask);
    return size;
  }
};

// Of elements of which more than `most` reach a bound, marks at least k and at most `most`, and returns kNoKey. Or,
// where too many equal the k-th largest for that, it marks those that are larger, and returns the key of that. The
// elements of `row` become their keys.
template <typename T, int kVectors>
__device__ __forceinline__ uint32_t bisect(RegisterRow<T, 32, kVectors>& row, const T* data, float bound, uint32_t k,
                                           uint32_t most, Marks<T, kVectors>& marks) {
  using Bits = typename RegisterRow<T, 32, kVectors>::Bits;
  constexpr uint32_t kLast = static_cast<Bits>(~uint32_t{0});
  const auto keys_of_word = [](uint32_t word) {
    if constexpr (sizeof(T) == 4) return key_of_bits<T>(word);
    return key_of_bits<T>(word & kLast) | key_of_bits<T>(word >> 16) << 16;
  };
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    uint4& vector = row.vectors[v];
    vector = row.exists(v) ? make_uint4(keys_of_word(vector.x), keys_of_word(vector.y), keys_of_word(vector.z),
                                        keys_of_word(vector.w))
                           : make_uint4(0, 0, 0, 0);
  }
  const uint32_t edge_key = row.has_edge ? key_of_bits<T>(reinterpret_cast<const Bits*>(data)[row.edge_index]) : kNoKey;
  uint32_t largest = edge_key;
#pragma unroll
  for (int i = 0; i < kVectors * 4; ++i) {
    const uint32_t word = word_of(row.vectors[i / 4], i % 4);
    largest = max(largest, sizeof(T) == 4 ? word : max(word & kLast, word >> 16));
  }
  T lowest;
  store_one(&lowest, bound == 0.0f ? -0.0f : bound);  // -0 reaches 0
  // The k-th largest key is no smaller than one of these, and smaller than the other.
  uint32_t low = key_of_bits<T>(*reinterpret_cast<const Bits*>(&lowest));
  uint32_t high = __reduce_max_sync(kFullWarp, largest) + 1;
#pragma unroll 1
  for (uint32_t least = low + max((high - low) / 2, 1);; least = low + max((high - low) / 2, 1)) {
#pragma unroll
    for (int m = 0; m < marks.kMasks; ++m) {
      uint32_t mask = 0;
#pragma unroll
      for (int i = 0; i < marks.kVectorsOfMask * 4; ++i) {
        const uint32_t word = word_of(row.vectors[m * marks.kVectorsOfMask + i / 4], i % 4);
        if constexpr (sizeof(T) == 4) {
          mask |= word >= least ? 1u << i : 0;
        } else {
          mask |= word << 16 >= least << 16 ? 1u << 2 * i : 0;
          mask |= word >= least << 16 ? 2u << 2 * i : 0;
        }
      }
      marks.masks[m] = mask;
    }
    marks.edge = edge_key >= least;
    const uint32_t size = __reduce_add_sync(kFullWarp, marks.size());
    if (size >= k && size <= most) return kNoKey;
    if (size < k && least == low + 1) return low;
    (size < k ? high : low) = least;
  }
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(32, resident_blocks(16 * kVectors)) topk_select_sorting(const TopkSelect op) {
  using Row = RegisterRow<T, 32, kVectors>;
  using Bits = typename Row::Bits;
  // Of 16-bit elements a word holds key and index. Other pairs have few enough bits that they are in order as doubles.
  using Pair = std::conditional_t<sizeof(T) == 4, uint64_t, uint32_t>;
  constexpr PairFormat<T> format = {sizeof(T) == 4 ? 30 : 13};
  static_assert(Row::kStep * kVectors <= 1 << 13);
  constexpr int kElements = Row::kElements;
  constexpr uint32_t kMost = 256;  // candidates
  __shared__ alignas(4) uint16_t candidates[kMost];
  const int lane = threadIdx.x;

  const int64_t row_index = blockIdx.x;
  const T* data = static_cast<const T*>(op.scores) + row_index * op.length;
  const uint32_t length = length_of_row(op, row_index);
  const uint32_t k = min(static_cast<uint32_t>(op.k), length);
  Row row(data, length);

  // The four lists: the elements of a column of f32, or of an odd or even column of half a vector.
  float maxima[4];
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      maxima[e] = row.element(0, e);
#pragma unroll
      for (int v = 1; v < kVectors; ++v) maxima[e] = max_nan(maxima[e], row.element(v, e));
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 largest = make_uint4(word_of(row.vectors[0], 2 * half), 0, 0, 0);
#pragma unroll
      for (int i = 1; i < 2 * kVectors; ++i) {
        largest.x = max_of_words(largest.x, word_of(row.vectors[i / 2], 2 * half + i % 2), T{});
      }
      maxima[2 * half] = element_of(largest, 0, T{});
      maxima[2 * half + 1] = element_of(largest, 1, T{});
    }
  }
  maxima[0] = max_nan(maxima[0], row.edge);

  // Each list owes its share of the bound. A NaN is above +inf, and so is a lane that has one.
  const uint32_t share = max((k + 3) / 4, 1u);
  float least = INFINITY, next = INFINITY;
#pragma unroll
  for (float maximum : maxima) {
    const float sorted = sort_descending<32>(maximum != maximum ? INFINITY : maximum);
    const float of_list = __shfl_sync(kFullWarp, sorted, share - 1);
    next = fminf(next, fmaxf(least, of_list));
    least = fminf(least, of_list);
  }
  // Where a list owes little, fewer than k elements now and then reach the next bound.
  float bound = share > 8 ? next : least;
  Marks<T, kVectors> marks;
  uint32_t count;
#pragma unroll 1
  while (true) {
#pragma unroll
    for (int m = 0; m < marks.kMasks; ++m) {
      marks.masks[m] = row.template reaching<marks.kVectorsOfMask>(bound, m * marks.kVectorsOfMask);
    }
    marks.edge = row.has_edge && !(row.edge < bound);
    count = __reduce_add_sync(kFullWarp, marks.size());
    if (count >= k || bound == least) break;
    bound = least;
  }
  uint32_t equal_key = kNoKey;
  if (count > kMost) equal_key = bisect(row, data, bound, k, kMost, marks);

  const uint32_t own = marks.size(), sum = inclusive_sum_of_lanes(own);
  count = __shfl_sync(kFullWarp, sum, 31);
  uint32_t place = sum - own;
#pragma unroll
  for (int m = 0; m < marks.kMasks; ++m) {
#pragma unroll 1
    for (uint32_t rest = marks.masks[m]; rest != 0; rest &= rest - 1) {
      const uint32_t i = __ffs(rest) - 1;
      candidates[place++] = row.index(m * marks.kVectorsOfMask) + i / kElements * Row::kStep + i % kElements;
    }
  }
  if (marks.edge) candidates[place] = row.edge_index;
  if (equal_key != kNoKey) {
#pragma unroll 1
    for (uint32_t first = 0; count < k; first += 32) {
      const uint32_t index = first + lane;
      const bool equal = index < length && key_of_bits<T>(reinterpret_cast<const Bits*>(data)[index]) == equal_key;
      const uint32_t those = __ballot_sync(kFullWarp, equal);
      const uint32_t place = count + __popc(those & ((1u << lane) - 1));
      if (equal && place < k) candidates[place] = index;
      count = min(count + __popc(those), k);
    }
  }
  __syncwarp();

  const auto load = [&](uint32_t first) {
    TwoPairs<Pair> two = {};
    const uint32_t indices = *reinterpret_cast<const uint32_t*>(candidates + first + 2 * lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t index = indices >> 16 * i & 0xFFFF;
      const bool exists = first + 2 * lane + i < count;
      if (exists) two.pairs[i] = static_cast<Pair>(format.pair(load_one(data + index), index));
    }
    return two;
  };
  TwoPairs<Pair> best = load(0);
  best.sort();
#pragma unroll 1
  for (uint32_t first = 64; first < count; first += 64) {
    TwoPairs<Pair> others = load(first);
    others.sort();
    best.take_best(others);
  }
  if (op.sorted) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t place = 2 * lane + i;
      if (place < k) write_result(op, row_index, data, place, format, best.pairs[i]);
    }
  } else {
    TwoPairs<uint32_t> order;  // inverted indices, so that the first is the largest
#pragma unroll
    for (int i = 0; i < 2; ++i) order.pairs[i] = 2 * lane + i < k ? ~format.index(best.pairs[i]) : 0;
    order.sort();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t place = 2 * lane + i, index = ~order.pairs[i];
      if (place >= k) continue;
      static_cast<T*>(op.values)[row_index * op.k + place] = data[index];
      op.indices[row_index * op.k + place] = static_cast<int32_t>(index);
    }
  }
#pragma unroll 1
  for (uint32_t place = k + lane; place < op.k; place += 32) write_nothing<T>(op, row_index, place);
}

}  // namespace

cudaError_t run_warp(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream) {
  const LaunchShape shape{plan.blocks, plan.threads};
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_index<kTopkInstanceCount>(plan.instance, [&](auto index) {
      constexpr TopkInstance kInstance = kTopkInstances[decltype(index)::value];
      if constexpr (kInstance.kernel == TopkKernel::kSorting && has_instance(kInstance, dtype_of(T{}))) {
        return launch_kernel(topk_select_sorting<T, kInstance.size>, shape, stream, op);
      }
      return cudaErrorInvalidValue;
    });
  });
}

}  // namespace jax_router::cuda
