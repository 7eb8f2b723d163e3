// The k best of short rows: 32 rows at a time, one a vector lane, by k rounds over the row.
#pragma once

#include <cstdint>

#include "scratch.h"
#include "select.h"

namespace jax_router::cpu::JR_ISA {

class ShortRowsTopK {
 public:
  static constexpr int64_t kRows = 32;

  // Whether it is faster than a TopK. Few rows would leave most lanes idle.
  static bool pays(int64_t rows, int64_t n, int64_t k) { return rows >= kRows / 2 && n <= 128 && n * k <= 768; }

  explicit ShortRowsTopK(int64_t n) : n_(n), keys_(n * kRows) {}

  // The order keys of row `row` < kRows.
  void set(int64_t row, const uint32_t* keys) {
    for (int64_t i = 0; i < n_; ++i) keys_[i * kRows + row] = keys[i];
  }

  // Writes the k best indices of the first `rows` rows, best first.
  void finish(int64_t rows, int64_t k, int32_t* best) {
    for (int64_t j = 0; j < k; ++j) {
      uint32_t best_key[kRows] = {};
      int32_t best_index[kRows] = {};
      for (int32_t i = 0; i < n_; ++i) {
        const uint32_t* keys = keys_ + i * kRows;
        for (int64_t row = 0; row < kRows; ++row) {
          const bool better = keys[row] > best_key[row];
          best_key[row] = better ? keys[row] : best_key[row];
          best_index[row] = better ? i : best_index[row];
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        best[row * k + j] = best_index[row];
        keys_[best_index[row] * kRows + row] = kNoKey;
      }
    }
  }

 private:
  const int64_t n_;
  Scratch<uint32_t> keys_;
};

}  // namespace jax_router::cpu::JR_ISA
