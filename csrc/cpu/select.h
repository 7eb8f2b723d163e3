// The k best of a row: a running selection over order keys that arrive in chunks, in index order.
//
// A buffer holds every key that may still be among the k best, in index order. A chunk's keys are compared 64 at a time
// with a threshold that all of the k best reach, and the few survivors are appended; when the buffer is full it is cut to
// its k best, which raises the threshold. Equal keys go to the lower index because the buffer never loses its order.
#pragma once

#include <cstdint>

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
  for (int64_t i = n; i % 64 != 0; ++i) keys[i] = kNoKey;
}

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
    if (first == 0 && k_ <= kLanes / 2) threshold_ = bound(keys, n);
    keep(keys, nullptr, n, first, threshold_);
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
  static constexpr int64_t kLanes = 32;
  static constexpr int64_t kRankLimit = 64;

  // A lower bound of the k-th best key, from the best key of each of kLanes strided lanes: the k best of those are k
  // different entries, so the k-th best of all is at least as good as the worst of them.
  uint32_t bound(const uint32_t* keys, int64_t n) const {
    uint32_t best[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) best[j] = keys[i + j] > best[j] ? keys[i + j] : best[j];
    }
    uint32_t at_least[kLanes] = {};
    for (int64_t i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < kLanes; ++j) at_least[j] += best[i] >= best[j];
    }
    uint32_t result = kWorstKey;
    for (int64_t j = 0; j < kLanes; ++j) {
      const uint32_t candidate = at_least[j] >= k_ ? best[j] : kWorstKey;
      result = candidate > result ? candidate : result;
    }
    return result;
  }

  // Bit j tells whether keys[j] >= threshold.
  static uint64_t survivors(const uint32_t* keys, uint32_t threshold) {
    uint8_t flags[64];
    for (int j = 0; j < 64; ++j) flags[j] = keys[j] >= threshold;
    uint64_t mask = 0;
    for (int j = 0; j < 8; ++j) {
      uint64_t bytes;
      std::memcpy(&bytes, flags + 8 * j, 8);
      mask |= (bytes * 0x0102040810204080u >> 56) << (8 * j);
    }
    return mask;
  }

  // Appends the entries of a chunk, or of the buffer itself, whose key reaches the threshold. `indices` is null for a
  // chunk, whose indices count up from `first`.
  void keep(const uint32_t* keys, const uint32_t* indices, int64_t n, int64_t first, uint32_t threshold) {
    uint32_t* const kept_keys = keys_;
    uint32_t* const kept_indices = indices_;
    int64_t count = count_;
    for (int64_t i = 0; i < n; i += 64) {
      uint64_t mask = survivors(keys + i, threshold);
      if (n - i < 64) mask &= (uint64_t{1} << (n - i)) - 1;
      for (; mask != 0; mask &= mask - 1) {
        const int64_t j = i + __builtin_ctzll(mask);
        kept_keys[count] = keys[j];
        kept_indices[count] = indices == nullptr ? static_cast<uint32_t>(first + j) : indices[j];
        ++count;
      }
    }
    count_ = count;
  }

  // Cuts the buffer to its k best and raises the threshold. The k-th best key is found bit by bit from the top, until
  // exactly k keys reach the prefix found so far.
  void cut() {
    const uint32_t* keys = keys_;
    const int64_t n = count_;
    uint32_t all = 0xFFFFFFFFu, any = 0;
    for (int64_t i = 0; i < n; ++i) {
      all &= keys[i];
      any |= keys[i];
    }
    uint32_t bit = 0x80000000u;
    while (bit != 0 && !((all ^ any) & bit)) bit >>= 1;
    uint32_t prefix = bit == 0 ? all : all & ~(2 * bit - 1);
    int64_t reached = n;
    for (; bit != 0 && reached != k_; bit >>= 1) {
      const int64_t count = count_at_least(keys, n, prefix | bit);
      if (count >= k_) {
        prefix |= bit;
        reached = count;
      }
    }
    // Of the keys equal to the k-th best, those with the highest indices go.
    int64_t end_of_equals = n;
    for (int64_t excess = reached - k_; excess > 0;) excess -= keys[--end_of_equals] == prefix;
    count_ = 0;
    keep(keys, indices_, end_of_equals, 0, prefix);
    threshold_ = prefix;
    if (end_of_equals < n) {
      if (prefix != 0xFFFFFFFFu) keep(keys + end_of_equals, indices_ + end_of_equals, n - end_of_equals, 0, ++threshold_);
    }
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

  // For a short buffer: an entry's place is the number of better keys, plus that of equal keys before it.
  void by_rank(bool sorted, int32_t* best) const {
    uint32_t better[kRankLimit] = {};
    const int64_t padded = (count_ + 15) & ~int64_t{15};
    for (int64_t i = 0; i < count_; ++i) {
      const uint32_t key = keys_[i];
      for (int64_t j = 0; j < padded; ++j) better[j] += key > keys_[j];
    }
    uint8_t equals[kRankLimit] = {};
    for (int64_t j = 0, taken = 0; j < count_; ++j) {
      const int64_t place = better[j] + equals[better[j]]++;
      if (place < k_) best[sorted ? place : taken++] = static_cast<int32_t>(indices_[j]);
    }
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
