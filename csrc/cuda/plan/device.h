// What the choice of a kernel may depend on besides the op: facts of a device, and the numbers that were measured for
// its architecture. Nothing in this folder needs CUDA or a GPU, so that every choice is tested without them.
#pragma once

#include <cstdint>

namespace jax_router::cuda {

struct Device {
  int compute_capability;  // 90 for 9.0
  int multiprocessors;
  int shared_bytes;         // of a block, at most
  bool has_clusters;        // and kernels that begin before the last one has ended
  bool has_hopper_kernels;  // runs what is compiled for 9.0a alone, and this build has it

  // The most blocks of a cluster. More than 8 need multiprocessors that lie together, as those of a whole H100 do.
  constexpr int cluster_blocks() const { return !has_clusters ? 1 : multiprocessors >= 132 ? 16 : 8; }
};

// What a launch asks of a device.
struct Needs {
  int64_t shared_bytes;  // of a block
  int cluster_blocks;
  bool hopper_kernels;
};
// Nothing special, unless a plan has more to say.
template <class Plan>
constexpr Needs needs(const Plan&) {
  return {0, 1, false};
}

// The numbers of a choice, one set an architecture.
template <class Numbers>
struct PerArchitecture {
  Numbers sm80, sm90, sm100;

  constexpr const Numbers& of(const Device& device) const {
    return device.compute_capability < 90 ? sm80 : device.compute_capability < 100 ? sm90 : sm100;
  }
};

// Where an architecture was not measured: the numbers of another one.
template <class Numbers>
constexpr PerArchitecture<Numbers> everywhere(const Numbers& sm90) {
  return {sm90, sm90, sm90};
}

constexpr int64_t kMostBlocks = INT32_MAX;  // of a grid

// What a block may have of shared memory without asking.
constexpr int kUnaskedSharedBytes = 48 * 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

}  // namespace jax_router::cuda
