// The k best of a row: a running selection over order keys that arrive in chunks, in index order.
//
// A buffer holds every key that may still be among the k best, in index order. A chunk's keys are compared 64 at a time
// with a threshold that all of the k best reach, and the few survivors are appended; when the buffer is full it is cut
// to its k best, which raises the threshold. Equal keys go to the lower index because the buffer never loses its order.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../common/order.h"
#include "convert.h"
#include "scratch.h"

namespace jax_router::cpu::JR_ISA {

constexpr int64_t kChunk = 4096;

// The key of an entry that must lose to every number, and still be there. No number has it.
constexpr uint32_t kWorstKey = 1;
static_assert(kWorstKey > kNoKey, "a chunk is padded with kNoKey");

// Keys of up to kChunk numbers, padded with kNoKey to a multiple of 64.
template <typename T>
inline void load_keys(const T* scores, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(to_f32(scores[i]));
  const int64_t padded = (n + 63) & ~int64_t{63};
  for (int64_t i = n; i < padded; ++i) keys[i] = kNoKey;
}

// As many keys as a register holds, for loops of which compilers vectorise the wrong one: they would sum across
// registers. The compiler knows the size for the instruction set at hand; it is the largest alignment that one has.
using Vector = uint32_t __attribute__((vector_size(__BIGGEST_ALIGNMENT__)));
constexpr int64_t kLanes = sizeof(Vector) / sizeof(uint32_t);

inline Vector load_vector(const uint32_t* from) {
  Vector result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline void store_vector(Vector vector, uint32_t* to) { std::memcpy(to, &vector, sizeof vector); }

class TopK {
 public:
  // Rows of up to `length` numbers, k <= length.
  TopK(int64_t length, int64_t k)
      : full_(2 * k > kRankLimit ? 2 * k : kRankLimit),
        capacity_((length < full_ ? length : full_) + (length < kChunk ? length : kChunk) + 64),
        keys_(capacity_),
        indices_(capacity_),
        sorted_(k > kRankLimit ? 2 * k : 0) {}

  // Forgets the last row.
  void reset(int64_t k) {
    k_ = k;
    count_ = 0;
    threshold_ = kWorstKey;
  }

  // The next n <= kChunk keys of the row, padded to a multiple of 64 with kNoKey; the first has index `first`.
  void push(const uint32_t* keys, int64_t n, int64_t first) {
    if (n <= kFewStrides) {  // fewer than a bound would take
      for (int64_t i = 0; i < n; ++i, ++count_) {
        keys_[count_] = keys[i];
        indices_[count_] = static_cast<uint32_t>(first + i);
      }
      return;
    }
    const int64_t reached = threshold_ == kWorstKey ? n : count_at_least(keys, n, threshold_);
    if (reached == 0) return;
    if (reached > 2 * k_) {
      const uint32_t better = bound(keys, n);
      threshold_ = better > threshold_ ? better : threshold_;
    }
    keep(keys, n, threshold_, [=](int64_t i) { return static_cast<uint32_t>(first + i); });
    if (count_ > full_) cut();
  }

  // Writes the min(k, numbers pushed) best indices, best first or in ascending order.
  void finish(bool sorted, int32_t* best) {
    if (count_ > k_ && count_ > kRankLimit) cut();
    if (count_ <= kRankLimit) {
      by_rank(sorted, best);
    } else if (sorted) {
      by_radix(best);
    } else {
      for (int64_t i = 0; i < count_; ++i) best[i] = static_cast<int32_t>(indices_[i]);
    }
  }

 private:
  static constexpr int64_t kRankLimit = 64;
  static constexpr int64_t kFewStrides = 32;

  // A lower bound of the k-th best key, from the best key of each of many strides: the k best of those are k different
  // entries, so the k-th best of all is at least as good as the worst of them. With twice as many strides as k, few
  // entries reach the bound that are not among the k best.
  uint32_t bound(const uint32_t* keys, int64_t n) const {
    int64_t strides = kFewStrides / 2;
    while (strides < 2 * k_) strides *= 2;
    uint32_t best[kChunk];
    best_of_strides(keys, n, strides, best);
    return strides <= kFewStrides ? kth_of_few(best, strides, k_) : kth_best(best, strides, k_).threshold;
  }

  static void best_of_strides(const uint32_t* keys, int64_t n, int64_t strides, uint32_t* best) {
    for (int64_t j = 0; j < strides; j += kLanes) {
      Vector found{};
      for (int64_t i = j; i < n; i += strides) {
        const Vector here = load_vector(keys + i);
        found = here > found ? here : found;
      }
      store_vector(found, best + j);
    }
  }

  // For each of a few keys, how many are better. Reads and writes whole vectors.
  static void count_better(const uint32_t* keys, int64_t count, uint32_t* better) {
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector mine = load_vector(keys + j);
      Vector found{};
      for (int64_t i = 0; i < count; ++i) found += keys[i] > mine ? Vector{} + 1 : Vector{};
      store_vector(found, better + j);
    }
  }

  // The k-th best of a few keys: the worst of those to which fewer than k are better.
  static uint32_t kth_of_few(const uint32_t* keys, int64_t count, int64_t k) {
    uint32_t better[kFewStrides];
    count_better(keys, count, better);
    Vector worst = ~Vector{};
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector here = load_vector(better + j) < static_cast<uint32_t>(k) ? load_vector(keys + j) : ~Vector{};
      worst = here < worst ? here : worst;
    }
    uint32_t result = worst[0];
    for (int64_t j = 1; j < kLanes; ++j) result = worst[j] < result ? worst[j] : result;
    return result;
  }

  // A threshold that the k best keys reach, and how many do: k, or, if it is the k-th best key itself, those equal too.
  struct KthBest {
    uint32_t threshold;
    int64_t reached;
  };

  // Found bit by bit from the top, until exactly k keys reach the prefix found so far.
  static KthBest kth_best(const uint32_t* keys, int64_t n, int64_t k) {
    uint32_t all = 0xFFFFFFFFu, any = 0;
    for (int64_t i = 0; i < n; ++i) {
      all &= keys[i];
      any |= keys[i];
    }
    uint32_t bit = 0x80000000u;
    while (bit != 0 && !((all ^ any) & bit)) bit >>= 1;
    KthBest found = {bit == 0 ? all : all & ~(2 * bit - 1), n};
    for (; bit != 0 && found.reached != k; bit >>= 1) {
      const int64_t reached = count_at_least(keys, n, found.threshold | bit);
      if (reached >= k) found = {found.threshold | bit, reached};
    }
    return found;
  }

  static int64_t count_at_least(const uint32_t* keys, int64_t n, uint32_t threshold) {
    int64_t count = 0;
    for (int64_t i = 0; i < n;) {
      const int64_t end = n - i < kChunk ? n : i + kChunk;
      uint32_t part = 0;
      for (; i < end; ++i) part += keys[i] >= threshold;
      count += part;
    }
    return count;
  }

  // Bit j tells whether keys[j] >= threshold. No compiler makes one instruction of the general code.
  static uint64_t survivors(const uint32_t* keys, uint32_t threshold) {
#if defined(__AVX512F__)
    const __m512i least = _mm512_set1_epi32(static_cast<int32_t>(threshold));
    uint64_t mask = 0;
    for (int j = 0; j < 64; j += 16) {
      mask |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + j), least)) << j;
    }
    return mask;
#elif defined(__AVX2__)
    const __m256i least = _mm256_set1_epi32(static_cast<int32_t>(threshold));
    uint64_t mask = 0;
    for (int j = 0; j < 64; j += 8) {
      const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + j));
      const __m256i reaches = _mm256_cmpeq_epi32(_mm256_max_epu32(key, least), key);
      mask |= static_cast<uint64_t>(static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(reaches)))) << j;
    }
    return mask;
#else
    uint8_t flags[64];
    for (int j = 0; j < 64; ++j) flags[j] = keys[j] >= threshold;
    uint64_t mask = 0;
    for (int j = 0; j < 8; ++j) {
      uint64_t bytes;
      std::memcpy(&bytes, flags + 8 * j, 8);
      mask |= (bytes * 0x0102040810204080u >> 56) << (8 * j);
    }
    return mask;
#endif
  }

  // Appends the entries of a chunk, or of the buffer itself, whose key reaches the threshold.
  template <typename Index>
  void keep(const uint32_t* keys, int64_t n, uint32_t threshold, const Index& index) {
    uint32_t* const kept_keys = keys_;
    uint32_t* const kept_indices = indices_;
    int64_t count = count_;
    for (int64_t i = 0; i < n; i += 64) {
      uint64_t mask = survivors(keys + i, threshold);
      if (n - i < 64) mask &= (uint64_t{1} << (n - i)) - 1;
      if (mask == ~uint64_t{0}) {
        for (int64_t j = i; j < i + 64; ++j, ++count) {
          kept_keys[count] = keys[j];
          kept_indices[count] = index(j);
        }
        continue;
      }
      for (; mask != 0; mask &= mask - 1, ++count) {
        const int64_t j = i + __builtin_ctzll(mask);
        kept_keys[count] = keys[j];
        kept_indices[count] = index(j);
      }
    }
    count_ = count;
  }

  // Cuts the buffer to its k best and raises the threshold.
  void cut() {
    const uint32_t* keys = keys_;
    const uint32_t* indices = indices_;
    const int64_t n = count_;
    const KthBest found = kth_best(keys, n, k_);
    // Of the keys equal to the k-th best, those with the highest indices go.
    int64_t end_of_equals = n;
    for (int64_t excess = found.reached - k_; excess > 0;) excess -= keys[--end_of_equals] == found.threshold;
    count_ = 0;
    keep(keys, end_of_equals, found.threshold, [=](int64_t i) { return indices[i]; });
    threshold_ = found.threshold;
    if (end_of_equals == n || found.threshold == 0xFFFFFFFFu) return;
    ++threshold_;
    keep(keys + end_of_equals, n - end_of_equals, threshold_, [=](int64_t i) { return indices[end_of_equals + i]; });
  }

  // For a short buffer: an entry's place is the number of better keys, plus that of equal keys before it.
  void by_rank(bool sorted, int32_t* best) const {
    uint32_t better[kRankLimit];
    count_better(keys_, count_, better);
    uint8_t equals[kRankLimit] = {};
    int32_t ranked[kRankLimit];
    for (int64_t j = 0; j < count_; ++j) {
      const int64_t place = better[j] + equals[better[j]]++;
      if (sorted) {
        ranked[place] = static_cast<int32_t>(indices_[j]);
      } else if (place < k_) {
        *best++ = static_cast<int32_t>(indices_[j]);
      }
    }
    if (!sorted) return;
    const int64_t found = count_ < k_ ? count_ : k_;
    for (int64_t j = 0; j < found; ++j) best[j] = ranked[j];
  }

  // Least significant digit first, stable, on the inverted key: equal keys stay in index order.
  void by_radix(int32_t* best) {
    uint32_t counts[4][256] = {};
    uint64_t* from = sorted_;
    uint64_t* to = from + count_;
    for (int64_t i = 0; i < count_; ++i) {
      const uint32_t inverted = ~keys_[i];
      from[i] = static_cast<uint64_t>(inverted) << 32 | indices_[i];
      for (int digit = 0; digit < 4; ++digit) ++counts[digit][inverted >> (8 * digit) & 255];
    }
    for (int digit = 0; digit < 4; ++digit) {
      uint32_t position = 0;
      for (uint32_t& count : counts[digit]) {
        const uint32_t size = count;
        count = position;
        position += size;
      }
      for (int64_t i = 0; i < count_; ++i) to[counts[digit][from[i] >> (32 + 8 * digit) & 255]++] = from[i];
      uint64_t* const swap = from;
      from = to;
      to = swap;
    }
    for (int64_t i = 0; i < count_; ++i) best[i] = static_cast<int32_t>(from[i]);
  }

  const int64_t full_;      // the buffer is cut when it holds more
  const int64_t capacity_;  // one chunk more, and room to read 64 keys at a time
  int64_t k_ = 0;
  int64_t count_ = 0;
  uint32_t threshold_ = kWorstKey;
  Scratch<uint32_t> keys_;
  Scratch<uint32_t> indices_;
  Scratch<uint64_t> sorted_;
};

}  // namespace jax_router::cpu::JR_ISA
