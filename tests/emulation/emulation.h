// CUDA C++ for a host compiler, as far as the kernels of this project use it; `translate.py` rewrites what no host
// compiler reads. emulation.cc has the threads.
//
// Every thread of a block or cluster is a fiber, and all of them share one thread of the host. A fiber runs until it
// must wait for others, at a barrier or where the lanes of a warp meet. Who goes on then is chosen at random, from a
// seed: a kernel that is right by luck alone, since warps happen to arrive in an order, is wrong in another run. Shared
// memory holds no zeros at first; asynchronous copies and stores to other blocks come as late as they may. What a
// launch must not do ends the process: lanes that meet at different places, a wait that nobody ends, a misaligned copy,
// shared memory of a block that has ended.
//
// Not emulated: weak memory order, tensor cores, the copy engine. The host is an x86-64.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

// Vectors

struct uint2 {
  uint32_t x, y;
};
struct int2 {
  int32_t x, y;
};
struct uint3 {
  uint32_t x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

// What a thread knows of itself.
struct Place {
  uint3 thread, block;
  dim3 threads, blocks;
  uint32_t number;  // of the thread in its block
};
extern Place place;
inline uint32_t lane() { return place.number % 32; }

[[noreturn]] void die(const char* what);

// Starts the random choices anew, for what is to be launched: die names it.
void begin(const char* launch, uint64_t seed);

void run_grid(dim3 blocks, dim3 threads, int64_t shared_bytes, int cluster, const std::function<void()>& kernel);

// Where the threads of a block, or the lanes of a warp, wait for each other. Lanes get what each of them brought.
// They must all have come for the same `reason`.
enum class Reason { kWarp, kShuffle, kVote, kReduce, kBlock, kBlockOr, kBlockCount };
const uint64_t* meet_lanes(uint32_t mask, uint64_t value, Reason reason);
int meet_threads(bool value, Reason reason);  // how many values are true
void wait_until(const std::function<bool()>& condition);
// Another thread may go on here.
void step_aside();
// Before a thread looks again, having looked so many times, for what another block writes. The first time it waits
// until no other thread of its own block goes on; then the block begins anew, when others have ended.
void look(uint32_t times);

// Shared memory. A variable has the same place in each block; an address has the block above its place.
constexpr size_t kDynamicBytes = 227 * 1024;
size_t place_variable(size_t bytes, size_t alignment);
char* own_memory();
void* dynamic_memory();
template <class T, int kWhich, size_t kAlignment>
T& shared() {
  static const size_t offset = place_variable(sizeof(T), kAlignment > alignof(T) ? kAlignment : alignof(T));
  return *reinterpret_cast<T*>(own_memory() + offset);
}
uint32_t address(const void* shared);
void* at(uint32_t address);
uint32_t in_block(uint32_t address, uint32_t block);

// Clusters
uint32_t block_of_cluster();
void cluster_arrive();
void cluster_wait();

// Asynchronous copies to shared memory: so many of 8 or 16 bytes, the rest is zeros.
void copy_later(uint32_t to, const void* from, int bytes, int width);
void commit_copies();
void wait_for_groups(int pending);
void wait_for_copies();

// Barriers in shared memory, and stores that they count
void init_barrier(uint32_t barrier, uint32_t arrivals);
void arrive(uint32_t barrier, uint32_t bytes);
void wait_for_barrier(uint32_t barrier, uint32_t phase);
void store_later(uint32_t to, uint64_t value, int bytes, uint32_t barrier);

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(From) <= 8 && sizeof(To) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &from, sizeof(From));
  To to;
  std::memcpy(&to, &bits, sizeof(To));
  return to;
}

template <class T, class Combine>
T reduce(uint32_t mask, T x, Combine combine) {
  const uint64_t* all = meet_lanes(mask, bits_as<uint64_t>(x), Reason::kReduce);
  bool is_first = true;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    x = is_first ? bits_as<T>(all[i]) : combine(x, bits_as<T>(all[i]));
    is_first = false;
  }
  return x;
}

template <class T, class Combine>
T atomic(T* p, Combine combine) {
  step_aside();
  const T old = *p;
  *p = combine(old);
  return old;
}

// Larger and smaller, of which a GPU says that 0 is above -0.
inline float fmaxf(float a, float b) { return a != a || a < b || (a == b && std::signbit(a)) ? b : a; }
inline float fminf(float a, float b) { return a != a || b < a || (a == b && std::signbit(b)) ? b : a; }

// What inline assembly does

// A denormal number becomes 0.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? x * 0.0f : x; }

constexpr uint32_t kNaNBits = 0x7FFFFFFF;
inline float max_nan(float a, float b) { return a != a || b != b ? bits_as<float>(kNaNBits) : fmaxf(a, b); }
template <class Half>
uint32_t max_nan_of_two(uint32_t a, uint32_t b) {
  const auto one = [](uint32_t x, uint32_t y) {
    const Half larger(max_nan(float(bits_as<Half>(x)), float(bits_as<Half>(y))));
    return static_cast<uint32_t>(bits_as<uint64_t>(larger));
  };
  return one(a >> 16, b >> 16) << 16 | one(a & 0xFFFF, b & 0xFFFF);
}
// The value of the lane `by` below, in groups of so many lanes as the hardware's way of saying so has it.
template <class T>
bool lane_below(T x, int by, uint32_t lanes_code, T& below) {
  const uint32_t width = 32 - (lanes_code >> 8);
  const uint64_t* all = meet_lanes(0xFFFFFFFFu, bits_as<uint64_t>(x), Reason::kShuffle);
  if (lane() % width < static_cast<uint32_t>(by)) return false;
  below = bits_as<T>(all[lane() - by]);
  return true;
}
inline void load_16_bytes(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) die("a load of 16 bytes that is not aligned");
  const uint4 v = *static_cast<const uint4*>(p);
  x = v.x, y = v.y, z = v.z, w = v.w;
}
// Two words at once.
inline void store_packet(void* p, uint64_t x, uint64_t y) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) die("a packet that is not aligned");
  step_aside();
  *static_cast<ulonglong2*>(p) = {x, y};
}
inline void load_packet(uint64_t& x, uint64_t& y, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) die("a packet that is not aligned");
  const ulonglong2 v = *static_cast<const ulonglong2*>(p);
  x = v.x, y = v.y;
}

}  // namespace emulation

// Warps and blocks

inline void __syncthreads() { emulation::meet_threads(false, emulation::Reason::kBlock); }
inline int __syncthreads_or(int x) { return emulation::meet_threads(x != 0, emulation::Reason::kBlockOr) != 0; }
inline int __syncthreads_count(int x) { return emulation::meet_threads(x != 0, emulation::Reason::kBlockCount); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { emulation::meet_lanes(mask, 0, emulation::Reason::kWarp); }
template <class T>
T __shfl_sync(uint32_t mask, T x, int from, int width = 32) {
  using namespace emulation;
  const uint64_t* all = meet_lanes(mask, bits_as<uint64_t>(x), Reason::kShuffle);
  return bits_as<T>(all[(lane() & ~(width - 1)) | (from & (width - 1))]);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int distance) {
  using namespace emulation;
  return bits_as<T>(meet_lanes(mask, bits_as<uint64_t>(x), Reason::kShuffle)[lane() ^ distance]);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, uint32_t by) {
  using namespace emulation;
  const uint64_t* all = meet_lanes(mask, bits_as<uint64_t>(x), Reason::kShuffle);
  return lane() < by ? x : bits_as<T>(all[lane() - by]);
}
inline uint32_t __ballot_sync(uint32_t mask, bool x) {
  const uint64_t* all = emulation::meet_lanes(mask, x, emulation::Reason::kVote);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>((mask >> i & 1) != 0 && all[i] != 0) << i;
  return votes;
}
inline int __any_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) == mask; }
template <class T>
T __reduce_add_sync(uint32_t mask, T x) {
  return emulation::reduce(mask, x, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(uint32_t mask, T x) {
  return emulation::reduce(mask, x, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(uint32_t mask, T x) {
  return emulation::reduce(mask, x, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
T __reduce_or_sync(uint32_t mask, T x) {
  return emulation::reduce(mask, x, [](T a, T b) { return a | b; });
}

template <class T, class X>
T atomicAdd(T* p, X x) {
  return emulation::atomic(p, [=](T old) { return old + static_cast<T>(x); });
}
template <class T, class X>
T atomicMax(T* p, X x) {
  return emulation::atomic(p, [=](T old) { return old > static_cast<T>(x) ? old : static_cast<T>(x); });
}
template <class T, class X>
T atomicMin(T* p, X x) {
  return emulation::atomic(p, [=](T old) { return old < static_cast<T>(x) ? old : static_cast<T>(x); });
}
template <class T, class X>
T atomicOr(T* p, X x) {
  return emulation::atomic(p, [=](T old) { return old | static_cast<T>(x); });
}

// Memory and arithmetic

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
inline uint32_t __cvta_generic_to_shared(const void* p) { return emulation::address(p); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t all = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(all >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmaf_rd(float a, float b, float c) {
  const long double exact = static_cast<long double>(a) * b + c;
  const float nearest = static_cast<float>(exact);
  return nearest > exact ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f; }
inline float __uint_as_float(uint32_t x) { return emulation::bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulation::bits_as<uint32_t>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits_as<double>(static_cast<uint64_t>(x)); }
inline double __hiloint2double(int high, int low) {
  return emulation::bits_as<double>(uint64_t{static_cast<uint32_t>(high)} << 32 | static_cast<uint32_t>(low));
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x > y ? x : y;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? x : y;
}

// Floats of 16 bits

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) {
    const _Float16 rounded = static_cast<_Float16>(x);
    bits = x != x ? 0x7FFF : emulation::bits_as<uint16_t>(rounded);
  }
  explicit operator float() const { return static_cast<float>(emulation::bits_as<_Float16>(bits)); }
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const uint32_t word = emulation::bits_as<uint32_t>(x);
    bits = static_cast<uint16_t>(x != x ? 0x7FFF : (word + 0x7FFF + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return emulation::bits_as<float>(uint32_t{bits} << 16); }
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __half2float(__half x) { return static_cast<float>(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __half __ushort_as_half(uint16_t bits) { return emulation::bits_as<__half>(bits); }
inline __half __float2half_ru(float x) {
  __half rounded(x);
  if (static_cast<float>(rounded) < x) {
    rounded.bits = rounded.bits == 0x8000 ? 1 : rounded.bits + (rounded.bits >> 15 != 0 ? -1 : 1);
  }
  return rounded;
}
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline float2 __half22float2(__half2 two) { return {static_cast<float>(two.x), static_cast<float>(two.y)}; }
template <class Two>
uint32_t __hge2_mask(Two a, Two b) {
  return (static_cast<float>(a.x) >= static_cast<float>(b.x) ? 0xFFFFu : 0) |
         (static_cast<float>(a.y) >= static_cast<float>(b.y) ? 0xFFFF0000u : 0);
}
template <class Two>
uint32_t __hlt2_mask(Two a, Two b) {
  return (static_cast<float>(a.x) < static_cast<float>(b.x) ? 0xFFFFu : 0) |
         (static_cast<float>(a.y) < static_cast<float>(b.y) ? 0xFFFF0000u : 0);
}

// The runtime: one device, on which everything has happened when a call returns.

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidDevice,
  cudaErrorNotSupported,
  cudaErrorMisalignedAddress
};
inline const char* cudaGetErrorString(cudaError_t) { return "an error of an emulated call"; }
using cudaStream_t = void*;
constexpr cudaStream_t cudaStreamPerThread = nullptr;
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // An H100 or an A100.
  constexpr bool kHopper = __CUDA_ARCH__ >= 900;
  constexpr int kDevice[] = {__CUDA_ARCH__ / 100, __CUDA_ARCH__ / 10 % 10, kHopper ? 132 : 108,
                             static_cast<int>(kHopper ? emulation::kDynamicBytes : 163 * 1024), kHopper};
  *value = kDevice[attribute];
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* p, int byte, size_t bytes) {
  std::memset(p, byte, bytes);
  return cudaSuccess;
}

struct cudaFuncAttributes {
  size_t sharedSizeBytes = 0;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = static_cast<int>(attribute.val.clusterDim.x);
  }
  const std::tuple<Parameters...> all(arguments...);
  emulation::run_grid(config->gridDim, config->blockDim, static_cast<int64_t>(config->dynamicSmemBytes), cluster,
                      [&] { std::apply(kernel, all); });
  return cudaSuccess;
}
