// Accesses to shared memory for the active threads of a warp, with no jump around them, for which the compiler would
// wait: several can be under way at once.
#pragma once

#include <cstdint>

namespace jax_router::cuda {

// The count at that address, which becomes one more.
__device__ __forceinline__ void count_if(bool active, uint32_t address, uint32_t& place) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p atom.shared.add.u32 %0, [%1], 1; }"
               : "+r"(place)
               : "r"(address), "r"(static_cast<uint32_t>(active))
               : "memory");
}
__device__ __forceinline__ void store_if(bool active, uint32_t address, uint64_t pair) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.shared.b64 [%0], %1; }" ::"r"(address), "l"(pair),
               "r"(static_cast<uint32_t>(active))
               : "memory");
}
__device__ __forceinline__ void add_one_if(bool active, uint32_t address) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p red.shared.add.u32 [%0], 1; }" ::"r"(address),
               "r"(static_cast<uint32_t>(active))
               : "memory");
}
__device__ __forceinline__ void or_if(bool active, uint32_t address, uint32_t bits) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p red.shared.or.b32 [%0], %1; }" ::"r"(address), "r"(bits),
               "r"(static_cast<uint32_t>(active))
               : "memory");
}

}  // namespace jax_router::cuda
