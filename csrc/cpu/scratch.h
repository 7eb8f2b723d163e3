// Memory for the duration of a scope.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace jax_router::cpu {

// Throws std::bad_alloc.
[[noreturn]] void out_of_memory();

}  // namespace jax_router::cpu

namespace jax_router::cpu::JR_ISA {

template <typename T>
class Scratch {
 public:
  // Zeros. A page is not touched before it is used.
  explicit Scratch(size_t count) : data_(static_cast<T*>(std::calloc(count, sizeof(T)))) {
    if (data_ == nullptr && count > 0) out_of_memory();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace jax_router::cpu::JR_ISA
