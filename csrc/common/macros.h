#pragma once

// What CUDA kernels and host code both call: JR_HOST_DEVICE for functions, JR_DEVICE_TOO for members. Functions have
// internal linkage on the host: the CPU kernels are compiled once for each instruction set, and the linker must not
// share one copy of a function among them.
#ifdef __CUDACC__
#define JR_HOST_DEVICE __host__ __device__ __forceinline__
#define JR_DEVICE_TOO __host__ __device__
#else
#define JR_HOST_DEVICE static inline
#define JR_DEVICE_TOO
#endif
