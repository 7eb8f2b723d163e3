// The rows of a result. Those of a large one go past the caches: a store that does not would first fetch the line that
// it overwrites, and push out what is still to be read.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "scratch.h"

namespace jax_router::cpu::JR_ISA {

// From how many bytes on a result is large: sooner if a core has nothing to do for it but copy.
constexpr int64_t kLargeCopied = int64_t{1} << 22;
constexpr int64_t kLargeComputed = int64_t{1} << 24;

// Other threads see the rows once this is gone.
class ResultRows {
 public:
  ResultRows(void* data, int64_t rows, int64_t row_bytes, int64_t large)
      : data_(static_cast<char*>(data)),
        row_bytes_(row_bytes),
        past_caches_(rows * row_bytes >= large &&
                     (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(row_bytes)) % kLine == 0),
        buffer_(past_caches_ ? row_bytes : 0) {}
#ifdef __SSE2__
  ~ResultRows() {
    if (past_caches_) _mm_sfence();
  }
#endif
  ResultRows(const ResultRows&) = delete;
  ResultRows& operator=(const ResultRows&) = delete;

  // Where to make a row before it is copied: where it belongs, if caches may hold it, and copying it does nothing.
  template <typename T>
  T* place(int64_t row) const {
    return reinterpret_cast<T*>(past_caches_ ? static_cast<char*>(buffer_) : at(row));
  }

  void copy(const void* from, int64_t row) const {
    if (past_caches_) {
      copy_past_caches(static_cast<const char*>(from), row_bytes_, at(row));
    } else if (from != at(row)) {
      std::memcpy(at(row), from, row_bytes_);
    }
  }

 private:
  char* at(int64_t row) const { return data_ + row * row_bytes_; }

  static constexpr int64_t kLine = 64;

  // Whole lines.
  static void copy_past_caches(const char* from, int64_t bytes, char* to) {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < bytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    }
#elif defined(__AVX2__)
    for (int64_t i = 0; i < bytes; i += 32) {
      const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), part);
    }
#elif defined(__SSE2__)
    for (int64_t i = 0; i < bytes; i += 16) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), part);
    }
#else
    std::memcpy(to, from, bytes);
#endif
  }

  char* const data_;
  const int64_t row_bytes_;
  const bool past_caches_;
  const Scratch<char> buffer_;
};

}  // namespace jax_router::cpu::JR_ISA
