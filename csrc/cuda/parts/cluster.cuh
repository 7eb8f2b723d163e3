// Thread block clusters: the barrier in its two halves, and shared memory of the cluster's other blocks. Devices before
// compute capability 9.0 have none: there a launch must not ask for them, and nothing here does anything.
#pragma once

#include <cstdint>

namespace jax_router::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define JR_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define JR_CLUSTER_ASM(...)
#endif

__device__ __forceinline__ uint32_t block_of_cluster() {
  uint32_t rank = 0;
  JR_CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The cluster's barrier, in two halves so that a thread can work between them. After its wait, a thread sees everything
// that the other threads of the cluster wrote before they arrived.
__device__ __forceinline__ void cluster_arrive() {
  JR_CLUSTER_ASM("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
__device__ __forceinline__ void cluster_wait() {
  JR_CLUSTER_ASM("barrier.cluster.wait.acquire.aligned;" :: : "memory");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __syncthreads();
#endif
}

// What this thread wrote before it, whoever learns of what this thread or its block does after it sees.
__device__ __forceinline__ void cluster_fence() { JR_CLUSTER_ASM("fence.acq_rel.cluster;" :: : "memory"); }

// An arrival that says nothing about memory, and so does not wait for writes that are still under way.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  JR_CLUSTER_ASM("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
}

__device__ __forceinline__ uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The address of another block's variable, given this block's.
__device__ __forceinline__ uint32_t address_in_block(const void* p, uint32_t block) {
  uint32_t address = address_of(p);
  JR_CLUSTER_ASM("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
  return address;
}

__device__ __forceinline__ uint32_t remote_load(uint32_t address) {
  uint32_t value = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
#else
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
#endif
  return value;
}

// To a variable in shared memory: what atomicAdd does, without its address as a generic one.
__device__ __forceinline__ void add_one(uint32_t shared) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(shared) : "memory");
}

// A barrier in shared memory (PTX calls it mbarrier). It opens when as many threads have arrived as it was made for,
// and when all bytes that they announced have been stored. Whoever has waited for it sees those bytes without a fence.
using TransferBarrier = uint64_t;

// By one thread, before any other uses it.
__device__ __forceinline__ void init_transfers(TransferBarrier* barrier, uint32_t arrivals) {
  JR_CLUSTER_ASM(
      "mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;" ::"r"(address_of(barrier)),
      "r"(arrivals) : "memory");
}

// Arrives at a block's barrier and announces bytes, which `send` or the copy engine then store in that block.
__device__ __forceinline__ void announce(uint32_t barrier, uint32_t bytes) {
  JR_CLUSTER_ASM("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes) : "memory");
}
// Arrives at a block's barrier. Says nothing about ordinary writes to memory: a release at the scope of the cluster
// would cost a fence.
__device__ __forceinline__ void arrive_in_block(uint32_t barrier) {
  JR_CLUSTER_ASM("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void send(uint32_t address, uint64_t value, uint32_t barrier) {
  JR_CLUSTER_ASM("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(address),
                 "l"(value), "r"(barrier) : "memory");
}

__device__ __forceinline__ void send(uint32_t address, uint32_t value, uint32_t barrier) {
  JR_CLUSTER_ASM("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
                 "r"(value), "r"(barrier) : "memory");
}

// Until all have arrived and all bytes are there, for time number `phase`.
__device__ __forceinline__ void wait_for_transfers(TransferBarrier* barrier, uint32_t phase) {
  JR_CLUSTER_ASM(
      "{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra wait; }" ::"r"(
          address_of(barrier)),
      "r"(phase % 2) : "memory");
}

__device__ __forceinline__ uint32_t remote_add(uint32_t address, uint32_t value) {
  uint32_t before = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(address), "r"(value) : "memory");
#else
  asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(address), "r"(value) : "memory");
#endif
  return before;
}

#undef JR_CLUSTER_ASM

}  // namespace jax_router::cuda
