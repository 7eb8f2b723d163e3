// The instructions of compute capability 9.0a that a fused matrix product is made of: copies of boxes of a matrix,
// warpgroup matrix products, and registers that move between warpgroups. Each is a thin wrapper; what they promise is
// in the PTX manual. To be called only where __CUDA_ARCH_FEAT_SM90_ALL is defined.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cluster.cuh"

namespace jax_router::cuda {

// Whether this is compiled for such a device. Elsewhere the compiler drops what stands behind it, though it checks it.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kOnHopper = true;
#else
constexpr bool kOnHopper = false;
#endif

// A box of the matrix into shared memory, announced to `barrier`; what lies outside the matrix becomes zero.
__device__ __forceinline__ void copy_box(void* destination, const CUtensorMap& map, int column, int row,
                                         TransferBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(address_of(destination)),
      "l"(&map), "r"(column), "r"(row), "r"(address_of(barrier))
      : "memory");
}

// So many bytes, a multiple of 16 as their addresses are.
__device__ __forceinline__ void copy_bytes(void* destination, const void* from, uint32_t bytes,
                                           TransferBarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   address_of(destination)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address_of(barrier))
               : "memory");
}

// To the same place, and to the same barrier, in every block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void copy_box_to_blocks(void* destination, const CUtensorMap& map, int column, int row,
                                                   TransferBarrier* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3}], [%4], %5;" ::"r"(address_of(destination)),
      "l"(&map), "r"(column), "r"(row), "r"(address_of(barrier)), "h"(blocks)
      : "memory");
}

// A box in shared memory into the matrix, but for what lies outside of it. By the thread that commits and waits.
__device__ __forceinline__ void store_box(const CUtensorMap& map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(column), "r"(row), "r"(address_of(from))
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last kPending groups of them have been read from shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 x 8 numbers of 16 bits, transposed: a lane has the address of a row, and a number's two neighbours
// in a column. The rows of matrix i are those of lanes 8 i and on.
__device__ __forceinline__ void load_transposed(uint32_t (&values)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(values[0]),
               "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}

// Makes this thread's ordinary writes to shared memory visible to the copy engine.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// From here into the shared memory of any block of the cluster; `barrier` is one of that block.
__device__ __forceinline__ void copy_in_cluster(uint32_t destination, const void* from, uint32_t bytes,
                                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "r"(address_of(from)), "r"(bytes), "r"(barrier)
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

// wgmma reads its operands from shared memory by a 64-bit descriptor (PTX manual, "matrix descriptor format"). The
// matrices here begin at a multiple of 1024 bytes and have rows of 128 bytes, swizzled as the copy engine stores them:
//   bits 0 to 13   the address, in units of 16 bytes
//   bit 16         the distance between columns of boxes, which this layout does not use: 1
//   bit 32 on      the distance between groups of 8 rows, in units of 16 bytes: 64
//   bit 62         the swizzle of 128 bytes
// wgmma_place is the low half; adding n to it moves the matrix by 16 n bytes. Where a matrix is read across its rows,
// and they are longer than 128 bytes, its boxes do have a distance, of 16 to 2^17 bytes.
__device__ __forceinline__ uint32_t wgmma_place(const void* matrix, uint32_t box_distance = 16) {
  return address_of(matrix) >> 4 | box_distance / 16 << 16;
}
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t place) { return 64ull << 32 | 1ull << 62 | place; }

#define JR_2(tens) "%" tens "0, %" tens "1"
#define JR_4(tens) JR_2(tens) ", %" tens "2, %" tens "3"
#define JR_6(tens) JR_4(tens) ", %" tens "4, %" tens "5"
#define JR_8(tens) JR_6(tens) ", %" tens "6, %" tens "7"
#define JR_10(tens) JR_8(tens) ", %" tens "8, %" tens "9"
#define JR_20 JR_10("") ", " JR_10("1")
#define JR_30 JR_20 ", " JR_10("2")
#define JR_50 JR_30 ", " JR_10("3") ", " JR_10("4")
#define JR_60 JR_50 ", " JR_10("5")
#define JR_70 JR_60 ", " JR_10("6")
#define JR_100 JR_70 ", " JR_10("7") ", " JR_10("8") ", " JR_10("9")
#define JR_120 JR_100 ", " JR_10("10") ", " JR_10("11")
#define JR_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JR_D8(i) JR_D4(i), JR_D4(i + 4)
#define JR_D16(i) JR_D8(i), JR_D8(i + 8)
#define JR_D20(i) JR_D16(i), JR_D4(i + 16)
#define JR_D48(i) JR_D16(i), JR_D16(i + 16), JR_D16(i + 32)
#define JR_D64(i) JR_D48(i), JR_D16(i + 48)
#define JR_WGMMA(T, type, columns, registers, a_operand, b_operand, accumulate_operand, ...)                          \
  __device__ __forceinline__ void wgmma(T, float (&d)[columns / 2], uint64_t a, uint64_t b, bool accumulate) {        \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, " accumulate_operand                             \
                 ", 0;\n"                                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, " a_operand \
                 ", " b_operand ", accumulate, 1, 1, 0, 0;\n}"                                                        \
                 : __VA_ARGS__                                                                                        \
                 : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)));                                           \
  }
#define JR_WGMMAS(T, type)                                                                            \
  JR_WGMMA(T, type, 24, JR_10("") ", " JR_2("1"), "%12", "%13", "%14", JR_D8(0), JR_D4(8))            \
  JR_WGMMA(T, type, 40, JR_20, "%20", "%21", "%22", JR_D20(0))                                        \
  JR_WGMMA(T, type, 56, JR_20 ", " JR_8("2"), "%28", "%29", "%30", JR_D20(0), JR_D8(20))              \
  JR_WGMMA(T, type, 72, JR_30 ", " JR_6("3"), "%36", "%37", "%38", JR_D16(0), JR_D20(16))             \
  JR_WGMMA(T, type, 112, JR_50 ", " JR_6("5"), "%56", "%57", "%58", JR_D48(0), JR_D8(48))             \
  JR_WGMMA(T, type, 128, JR_60 ", " JR_4("6"), "%64", "%65", "%66", JR_D48(0), JR_D16(48))            \
  JR_WGMMA(T, type, 144, JR_70 ", " JR_2("7"), "%72", "%73", "%74", JR_D48(0), JR_D16(48), JR_D8(64)) \
  JR_WGMMA(T, type, 256, JR_120 ", " JR_8("12"), "%128", "%129", "%130", JR_D64(0), JR_D64(64))

// wgmma(T{}, d, a, b, accumulate): d = a @ b.T, or d += a @ b.T; 64 rows of a by 2 * size(d) rows of b, 16 deep.
// Element d[i] of a lane is of row 16 * (warp % 4) + lane / 4 + (i & 2) * 4 and column i / 4 * 8 + lane % 4 * 2 + i
// % 2.
JR_WGMMAS(__nv_bfloat16, "bf16")
JR_WGMMAS(__half, "f16")

// The same with a in registers, of 16 x 16 for a warp: its row is that of d, or 8 below in a[1] and a[3], and its
// column lane % 4 * 2 and the next, or 8 further in a[2] and a[3]. wgmma_across reads b.T, 16 rows deep.
#define JR_WGMMA_HELD(function, columns, registers, a_operand, b_operand, accumulate_operand, across, ...)      \
  __device__ __forceinline__ void function(float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t b,         \
                                           bool accumulate) {                                                   \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, " accumulate_operand                       \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" registers "}, {" a_operand  \
                 "}, " b_operand ", accumulate, 1, 1, " across ";\n}"                                           \
                 : __VA_ARGS__                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate))); \
  }
JR_WGMMA_HELD(wgmma, 64, JR_30 ", " JR_2("3"), "%32, %33, %34, %35", "%36", "%37", "0", JR_D16(0), JR_D16(16))
JR_WGMMA_HELD(wgmma_across, 128, JR_60 ", " JR_4("6"), "%64, %65, %66, %67", "%68", "%69", "1", JR_D48(0), JR_D16(48))

#undef JR_WGMMA_HELD
#undef JR_WGMMAS
#undef JR_WGMMA
#undef JR_D64
#undef JR_D48
#undef JR_D20
#undef JR_D16
#undef JR_D8
#undef JR_D4
#undef JR_120
#undef JR_100
#undef JR_70
#undef JR_60
#undef JR_50
#undef JR_30
#undef JR_20
#undef JR_10
#undef JR_8
#undef JR_6
#undef JR_4
#undef JR_2

}  // namespace jax_router::cuda
