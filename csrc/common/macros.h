#pragma once

// Functions that CUDA kernels and CPU kernels share. Internal linkage on the host: the CPU kernels are compiled once
// for each instruction set, and the linker must not share one copy of a function among them.
#ifdef __CUDACC__
#define JR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JR_HOST_DEVICE static inline
#endif
