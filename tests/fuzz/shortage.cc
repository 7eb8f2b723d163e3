// A file of its own, for the compiler does not expect to see how memory is had.
#include "shortage.h"

#include <cstdlib>
#include <new>

std::atomic<int64_t> fuzz::allocations_left{-1};

namespace {

thread_local bool plenty = false;

bool memory_is_short() {
  return !plenty && fuzz::allocations_left.load(std::memory_order_relaxed) >= 0 &&
         fuzz::allocations_left.fetch_sub(1) == 0;
}

}  // namespace

fuzz::Plenty::Plenty() { plenty = true; }
fuzz::Plenty::~Plenty() { plenty = false; }

extern "C" void* __real_calloc(size_t count, size_t size);

// What the linker puts in place of calloc (--wrap).
extern "C" void* __wrap_calloc(size_t count, size_t size) {
  return memory_is_short() ? nullptr : __real_calloc(count, size);
}

void* operator new(size_t size) {
  void* const memory = memory_is_short() ? nullptr : std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }

void operator delete(void* memory, size_t) noexcept { std::free(memory); }
