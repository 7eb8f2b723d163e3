// How blocks of one launch hand logits to each other: as packets of two and a tag, written and read as one 16-byte
// word, so that a reader who sees the tag has the logits: no fence, no counter, nothing to initialise. A tag is a
// random number of this launch (of a CUDA graph, of its recording) that nobody else knows, and the reader removes it:
// whatever the memory holds when the kernel begins, it holds the tag by a chance of 2^-64 a packet. The readers publish
// before they wait, so they never keep a writer from running as long as they do not take all places of the device.
// Should a packet never come, the launch ends with an error.
#pragma once

#include <atomic>
#include <cstdint>
#include <random>

#include "../../common/order.h"
#include "../plan/dense_router.h"

namespace jax_router::cuda {

// Two neighbouring experts' logits of one token, or parts of them.
struct alignas(16) Packet {
  float logits[2];
  uint64_t tag;
};
constexpr uint64_t kNoTag = 0;
// A reader looks at a packet so often, a minute or so, before it gives up.
constexpr uint32_t kMostLooks = 1u << 26;

__device__ __forceinline__ void publish(Packet* packet, float2 sum, uint64_t tag) {
  const uint64_t logits = static_cast<uint64_t>(float_bits(sum.y)) << 32 | float_bits(sum.x);
  asm volatile(
      "{\n.reg .b128 packet;\nmov.b128 packet, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], packet;\n}" ::"l"(packet),
      "l"(logits), "l"(tag)
      : "memory");
}

// The packet's tag.
__device__ __forceinline__ uint64_t receive(const Packet* packet, float2& sum) {
  uint64_t logits, tag;
  asm volatile("{\n.reg .b128 packet;\nld.relaxed.gpu.global.b128 packet, [%2];\nmov.b128 {%0, %1}, packet;\n}"
               : "=l"(logits), "=l"(tag)
               : "l"(packet)
               : "memory");
  sum.x = bits_float(static_cast<uint32_t>(logits));
  sum.y = bits_float(static_cast<uint32_t>(logits >> 32));
  return tag;
}

static_assert(sizeof(Packet) == kPacketBytes);

// One that no launch of this process had before (splitmix64, from a random start).
inline uint64_t new_tag() {
  static const uint64_t start = [] {
    std::random_device random;
    return static_cast<uint64_t>(random()) << 32 | random();
  }();
  static std::atomic<uint64_t> launches = 0;
  uint64_t tag = start + 0x9E3779B97F4A7C15 * ++launches;
  tag = (tag ^ tag >> 30) * 0xBF58476D1CE4E5B9;
  tag = (tag ^ tag >> 27) * 0x94D049BB133111EB;
  tag ^= tag >> 31;
  return tag == kNoTag ? new_tag() : tag;
}

}  // namespace jax_router::cuda
