// What the choice of a kernel may depend on besides the op: facts of a device, and the numbers that were measured for
// its architecture. Nothing in this folder needs CUDA or a GPU, so that every choice is tested without them.
#pragma once

#include <cstdint>

#include "../../common/macros.h"

namespace jax_router::cuda {

struct Device {
  int compute_capability;  // 90 for 9.0
  int multiprocessors;
  int shared_bytes;         // of a block, at most
  bool has_clusters;        // and kernels that begin before the last one has ended
  bool has_hopper_kernels;  // runs what is compiled for 9.0a alone, and this build has it

  // The most blocks of a cluster, which lies in one of the 8 groups of a whole H100 or B200; of these one has 17
  // multiprocessors at least. Elsewhere 8 are certain. Asking the driver starts a context, which lowering must not do.
  constexpr int cluster_blocks() const {
    return !has_clusters ? 1 : compute_capability < 110 && multiprocessors >= 132 ? 16 : 8;
  }
  // The most warps of a multiprocessor: the GPUs with little shared memory have fewer.
  constexpr int warps() const {
    return compute_capability == 80 || (compute_capability >= 90 && compute_capability < 110) ? 64 : 48;
  }
  // How many blocks of a kernel a multiprocessor's shared memory has room for, of which each takes 1 KiB more.
  constexpr int64_t blocks_with(int64_t bytes) const { return (shared_bytes + 1024) / (bytes + 1024); }
  // And what each of so many blocks may have of it.
  constexpr int64_t bytes_with(int64_t blocks) const { return (shared_bytes + 1024) / blocks - 1024; }
  // So many a multiprocessor as `count` are on an H100, which the numbers of this folder were measured on.
  constexpr int64_t scaled(int64_t count) const { return count * multiprocessors / 132; }
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

// The numbers of a choice, one set an architecture. What follows from the multiprocessors or the shared memory of a
// device is no number but asked of the Device: numbers stand for the latency of instructions and launches.
template <class Numbers>
struct PerArchitecture {
  Numbers sm80, sm90, sm100;

  constexpr const Numbers& of(const Device& device) const {
    return device.compute_capability < 90 ? sm80 : device.compute_capability < 100 ? sm90 : sm100;
  }
};

// Where an architecture was not measured: the numbers of an H100, since no data sheet tells these latencies.
template <class Numbers>
constexpr PerArchitecture<Numbers> everywhere(const Numbers& sm90) {
  return {sm90, sm90, sm90};
}

constexpr int64_t kMostBlocks = INT32_MAX;  // of a grid

// What a block may have of shared memory without asking.
constexpr int kUnaskedSharedBytes = 48 * 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }
// Of a power of two.
JR_HOST_DEVICE constexpr int log2_of(int x) { return x == 1 ? 0 : 1 + log2_of(x / 2); }

}  // namespace jax_router::cuda
