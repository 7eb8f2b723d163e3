// The instructions of compute capability 9.0a that a fused matrix product is made of: mbarriers, tensor copies with
// multicast, warpgroup matrix products, and registers that move between warpgroups. Each is a thin wrapper; what they
// promise is in the PTX manual. To be called only where __CUDA_ARCH_FEAT_SM90_ALL is defined.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_router::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase end only when so many more bytes have been copied.
__device__ __forceinline__ void mbarrier_expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier of another block of the cluster. Says nothing about ordinary writes to memory: a release
// at the scope of the cluster would cost a fence.
__device__ __forceinline__ void mbarrier_arrive_in_block(uint64_t* barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box of the matrix into shared memory; what lies outside the matrix becomes zero.
__device__ __forceinline__ void copy_box(void* destination, const CUtensorMap& map, int column, int row,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(destination)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// To the same place, and to the same barrier, in every block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void copy_box_to_blocks(void* destination, const CUtensorMap& map, int column, int row,
                                                   uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3}], [%4], %5;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// For all threads of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Describes a matrix whose rows are 128 bytes of shared memory, swizzled by the copy engine in groups of 8 rows (1024
// bytes). Adding n to a descriptor moves it by 16 n bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* matrix) {
  constexpr uint64_t kGroupStride = 1024 / 16;
  constexpr uint64_t kSwizzle128 = 1;
  return (static_cast<uint64_t>(shared_address(matrix)) & 0x3FFFF) >> 4 | 1ull << 16 | kGroupStride << 32 |
         kSwizzle128 << 62;
}

#define JR_TEN(tens)                                                                                                   \
  "%" tens "0, %" tens "1, %" tens "2, %" tens "3, %" tens "4, %" tens "5, %" tens "6, %" tens "7, %" tens "8, %" tens \
  "9, "
#define JR_SIXTY JR_TEN("") JR_TEN("1") JR_TEN("2") JR_TEN("3") JR_TEN("4") JR_TEN("5")
#define JR_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JR_F16(i) JR_F4(i), JR_F4(i + 4), JR_F4(i + 8), JR_F4(i + 12)
#define JR_F32(i) JR_F16(i), JR_F16(i + 16)
#define JR_WGMMA(columns, type, registers, a_operand, b_operand, ...)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers "}, " a_operand \
               ", " b_operand ", 1, 1, 1, 0, 0;"                                                                   \
               : __VA_ARGS__                                                                                       \
               : "l"(a), "l"(b))
#define JR_WGMMA_ALL(T, type)                                                                  \
  __device__ __forceinline__ void wgmma(T, float (&d)[64], uint64_t a, uint64_t b) {           \
    JR_WGMMA("128", type, JR_SIXTY "%60, %61, %62, %63", "%64", "%65", JR_F32(0), JR_F32(32)); \
  }                                                                                            \
  __device__ __forceinline__ void wgmma(T, float (&d)[128], uint64_t a, uint64_t b) {          \
    JR_WGMMA("256", type,                                                                      \
             JR_SIXTY JR_TEN("6") JR_TEN("7") JR_TEN("8") JR_TEN("9") JR_TEN("10")             \
                 JR_TEN("11") "%120, %121, %122, %123, %124, %125, %126, %127",                \
             "%128", "%129", JR_F32(0), JR_F32(32), JR_F32(64), JR_F32(96));                   \
  }

// wgmma(T{}, d, a, b): d += a @ b.T, 64 rows of a by 2 * size(d) rows of b, 16 deep. Element d[i] of a lane is of row
// 16 * (warp % 4) + lane / 4 + (i & 2) * 4 and column i / 4 * 8 + lane % 4 * 2 + i % 2.
JR_WGMMA_ALL(__nv_bfloat16, "bf16")
JR_WGMMA_ALL(__half, "f16")

#undef JR_WGMMA_ALL
#undef JR_WGMMA
#undef JR_F32
#undef JR_F16
#undef JR_F4
#undef JR_SIXTY
#undef JR_TEN

}  // namespace jax_router::cuda
