// Shortage of memory: one allocation of this process can be made to fail.
#pragma once

#include <atomic>
#include <cstdint>

namespace fuzz {

// How many allocations succeed before one fails; none fails below 0.
extern std::atomic<int64_t> allocations_left;

// While one of these lives, no allocation of its thread fails or counts.
class Plenty {
 public:
  Plenty();
  ~Plenty();
  Plenty(const Plenty&) = delete;
  Plenty& operator=(const Plenty&) = delete;
};

}  // namespace fuzz
