// Rows of tokens and of slots, choice by choice, in stretches that stay in the first cache.
#pragma once

#include <cstdint>

#include "convert.h"

namespace jax_router::cpu::JR_ISA {

constexpr int64_t kStretch = 1024;  // elements of a row

// body(first element, count) for the stretches of a row.
template <typename Body>
inline void for_stretches(int64_t hidden, const Body& body) {
  for (int64_t first = 0; first < hidden; first += kStretch) {
    body(first, hidden - first < kStretch ? hidden - first : kStretch);
  }
}

// A token: its number within its problem, and its choices.
struct Token {
  Token(const DispatchedRows& rows, const float* weights, int64_t row)
      : problem(rows.batch == 1 ? 0 : row / rows.tokens),
        number(row - problem * rows.tokens),
        slots(rows.slot + row * rows.k),
        weights(weights == nullptr ? nullptr : weights + row * rows.k) {}

  // body(j, the row of its slot, its weight) for each choice that has a slot, in order.
  template <typename Body>
  void for_choices(const DispatchedRows& rows, const Body& body) const {
    for (int32_t j = 0; j < rows.k; ++j) {
      if (slots[j] < 0 || slots[j] >= rows.slots) continue;
      body(j, problem * rows.slots + slots[j], weights == nullptr ? 1.0f : weights[j]);
    }
  }

  int64_t problem, number;
  const int32_t* slots;
  const float* weights;
};

// sums += weight * row
template <typename T>
inline void add_row(float weight, const T* row, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += weight * to_f32(row[i]);
}

template <typename T>
inline void round_row(const float* sums, int64_t count, T* row) {
  for (int64_t i = 0; i < count; ++i) row[i] = from_f32<T>(sums[i]);
}

// A sum of products in as many parts as make the order of summation one of vectors.
class Product {
 public:
  template <typename T>
  void add(const T* a, const T* b, int64_t count) {
    int64_t i = 0;
    for (; i + kParts <= count; i += kParts) {
      for (int64_t part = 0; part < kParts; ++part) parts_[part] += to_f32(a[i + part]) * to_f32(b[i + part]);
    }
    for (; i < count; ++i) parts_[0] += to_f32(a[i]) * to_f32(b[i]);
  }
  float sum() {
    for (int64_t half = kParts / 2; half > 0; half /= 2) {
      for (int64_t part = 0; part < half; ++part) parts_[part] += parts_[part + half];
    }
    return parts_[0];
  }

 private:
  static constexpr int64_t kParts = 32;
  alignas(64) float parts_[kParts] = {};
};

}  // namespace jax_router::cpu::JR_ISA
