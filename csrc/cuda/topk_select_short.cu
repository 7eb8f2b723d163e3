// topk_select for short rows and small k: one warp a row, the row in registers.
//
// Each lane takes the largest of its keys. At least k keys are no smaller than the k-th largest of these maxima, and
// only slightly more are: those few go to shared memory, one a lane, and every lane counts how many of them beat its
// own. A row with more of them than lanes (many equal keys) takes k rounds of an exact maximum instead.
//
// Floor: rows * (length * sizeof(T) + k * (sizeof(T) + 4)) bytes.
#include "topk_select.cuh"

namespace jax_router::cuda {
namespace {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr int kWarps = 4;  // of a block

// The largest of the lanes' pairs.
__device__ __forceinline__ uint64_t warp_max(uint64_t pair) {
  const uint32_t key = __reduce_max_sync(kFullWarp, pair_key(pair));
  const uint32_t low = __reduce_max_sync(kFullWarp, pair_key(pair) == key ? static_cast<uint32_t>(pair) : 0);
  return static_cast<uint64_t>(key) << 32 | low;
}

template <typename T, int kKeys>
__global__ void __launch_bounds__(32 * kWarps) select_short_rows(TopkSelect op, bool vectors) {
  constexpr int kElements = 16 / sizeof(T);  // of a vector
  __shared__ uint64_t shared_pairs[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row_index = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row_index >= op.rows) return;
  const T* row = static_cast<const T*>(op.scores) + row_index * op.length;
  const int length = length_of_row(op, row_index);
  const int k = min(static_cast<int>(op.k), length);
  uint64_t* pairs = shared_pairs[warp];

  const auto index = [&](int i) { return (i / kElements * 32 + lane) * kElements + i % kElements; };
  uint32_t keys[kKeys];
  if (vectors) {
    uint4 loaded[kKeys / kElements];
#pragma unroll
    for (int v = 0; v < kKeys / kElements; ++v) {
      loaded[v] = make_uint4(0, 0, 0, 0);
      if (index(v * kElements) < length) loaded[v] = __ldg(reinterpret_cast<const uint4*>(row + index(v * kElements)));
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys[i] = order_key(element_of(loaded[i / kElements], i % kElements, T{}));
  } else {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys[i] = index(i) < length ? order_key(load_one(row + index(i))) : kNoKey;
  }
  if (length < 32 * kKeys) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys[i] = index(i) < length ? keys[i] : kNoKey;
  }

  // The bound: the k-th largest maximum, or less where maxima are equal.
  uint32_t largest = keys[0];
#pragma unroll
  for (int i = 1; i < kKeys; ++i) largest = max(largest, keys[i]);
  uint32_t bound = 1;
  for (int round = 0; round < k; ++round) {
    bound = __reduce_max_sync(kFullWarp, largest);
    if (largest == bound) largest = kNoKey;
  }
  bound = max(bound, 1u);

  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) mask |= keys[i] >= bound ? 1u << i : 0;
  if (k == 0) mask = 0;
  int count = __reduce_add_sync(kFullWarp, __popc(mask));
  if (count <= 32) {
    int place = 0;
    uint32_t ballot;
    while ((ballot = __ballot_sync(kFullWarp, mask != 0)) != 0) {
      if (mask != 0) {
        const int i = __ffs(mask) - 1;
        uint32_t key = 0;
#pragma unroll
        for (int j = 0; j < kKeys; ++j) key = j == i ? keys[j] : key;
        pairs[place + __popc(ballot & ((1u << lane) - 1))] = order_pair(key, index(i));
        mask &= mask - 1;
      }
      place += __popc(ballot);
    }
  } else {
    uint64_t last = 0;
    for (count = 0; count < k; ++count) {
      uint64_t best = 0;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const uint64_t pair = order_pair(keys[i], index(i));
        if ((count == 0 || pair < last) && pair > best) best = pair;
      }
      last = warp_max(best);
      if (lane == 0) pairs[count] = last;
    }
  }
  __syncwarp();

  const uint64_t pair = lane < count ? pairs[lane] : 0;
  int place = 0;
  for (int other = 0; other < count; ++other) place += pairs[other] > pair;
  const bool chosen = lane < count && place < k;
  if (!op.sorted) {
    __syncwarp();
    if (chosen) pairs[place] = pair;  // the k best, best first
    __syncwarp();
    place = 0;
    for (int other = 0; other < k; ++other) place += pair_index(pairs[other]) < pair_index(pair);
  }
  if (chosen) write_result<T>(op, row_index, row, place, pair);
  if (lane >= k && lane < op.k) write_nothing<T>(op, row_index, lane);
}

template <typename T, int kKeys>
cudaError_t launch_rows(const TopkSelect& op, cudaStream_t stream) {
  const int64_t blocks = (op.rows + kWarps - 1) / kWarps;
  const bool vectors = op.length * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(op.scores) % 16 == 0;
  select_short_rows<T, kKeys><<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(op, vectors);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_short_rows(const TopkSelect& op, cudaStream_t stream) {
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (op.length <= 256) return launch_rows<T, 8>(op, stream);
    if (op.length <= 512) return launch_rows<T, 16>(op, stream);
    return launch_rows<T, 32>(op, stream);
  });
}

}  // namespace jax_router::cuda
