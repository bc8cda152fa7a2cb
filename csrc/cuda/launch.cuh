// The one header a kernel file includes: CUDA under nvcc, the emulator under g++.
//
// Almost everything is plain CUDA in both. What differs has one name here, a function where possible:
//
//   launch(Launch{name, grid, block, …}, kernel, arguments…)   instead of <<<…>>>; errors raise gunn::Error
//   ask(launch, kernel)                                        how many blocks of it the device holds at once
//   GUNN_SHARED(float, tile, [32][33])                         a static __shared__ array
//   GUNN_DYNAMIC_SHARED(float, pool)                           the dynamic shared memory
//   grid_barrier()                                             in a cooperative launch
//   cluster_barrier(), cluster_rank(), cluster_size(),
//   remote_shared(pointer, rank)                               in a launch with a cluster, sm_90 and later
//   poll("what for", ready)                                    the only loop that may wait for another thread
//   load_acquire, store_release, load_relaxed, store_relaxed,
//   add_acquire_release                                        how threads of different blocks speak to each other
//   copy_async<bytes>(shared, global, valid), copy_async_commit(), copy_async_wait<pending>()
//   load_matrices<transposed>(registers, row)                  four 8 x 8 matrices of 16-bit values as fragments
//   mma<BFloat16>, mma<Float16>, mma_tf32                      tensor cores, all lanes of a warp together
//   BFloat16, Float16, to_float, from_float<Scalar>            16-bit storage
//   fresh(value)                                               the value, but the compiler may not keep what it made of
//   it
//                                                              before: for kernels short of registers
//   check_initialised(pointer, count)                          in the emulator: fails if an element was never written
//
// A predicate of `poll` only looks: it changes nothing, and reads with one of the loads above. Other PTX stays out of
// the kernels: a new primitive gets its function here and its model in emulator/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "core/layer.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#define GUNN_UNROLL _Pragma("unroll")
#define GUNN_ROLLED _Pragma("unroll 1")
#define GUNN_PARAMETER const __grid_constant__  // of a kernel: an array in it is indexed where it lies
#else
#include "emulator/emulator.h"
#define GUNN_UNROLL  // what it has in registers the emulator has in memory: it would only be longer to compile
#define GUNN_ROLLED
#define GUNN_PARAMETER const
#endif

#define GUNN_DEVICE __device__ __forceinline__

namespace gunn {

// ---- Launching

// Where a launch goes: a device of this process (-1: the current one) and a cudaStream_t on it.
struct Stream {
  int device = -1;
  void* handle = nullptr;
};

struct Launch {
  const char* name;  // of the kernel, for errors
  dim3 grid, block;
  size_t shared = 0;  // dynamic shared memory, bytes
  Stream stream = {};
  const LayerShape* shape = nullptr;  // for errors
  bool cooperative = false;           // all blocks at once, grid_barrier allowed
  dim3 cluster = dim3(1, 1, 1);
};

inline std::string describe(const Launch& launch) {
  const auto triple = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  std::ostringstream text;
  text << "grid " << triple(launch.grid) << ", block " << triple(launch.block) << ", cluster " << triple(launch.cluster)
       << ", " << launch.shared << " bytes of dynamic shared memory" << (launch.cooperative ? ", cooperative" : "");
  if (const LayerShape* shape = launch.shape) {
    text << "; layer (" << shape->batch << ", " << shape->channels << ", " << shape->height << ", " << shape->width
         << "), segments " << shape->segments << ", expansion " << shape->expansion << ", units " << shape->units
         << (shape->shortcut ? ", shortcut" : "");
  }
  return text.str();
}

#ifdef __CUDACC__

// What to do about the errors a user can cause.
inline const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "gunn_ext was not built for this GPU: rebuild with its architecture in GUNN_CUDA_ARCHS.";
    case cudaErrorInsufficientDriver:
      return "The driver is older than the CUDA runtime gunn_ext was built with: update it.";
    case cudaErrorCooperativeLaunchTooLarge:
      return "The blocks of a cooperative launch must all be resident at once: use fewer, or the staged driver.";
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidValue:
    case cudaErrorLaunchOutOfResources:
      return "The launch does not fit this GPU: use a smaller tile.";
    default:
      return "If an earlier kernel is to blame, CUDA_LAUNCH_BLOCKING=1 names it.";
  }
}

inline void check_cuda(cudaError_t error, const char* what, const Launch& launch) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next check, perhaps torch's, would report it again
  fail(launch.name, ": ", what, " failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), "). ",
       advice(error), "\n  ", describe(launch));
}

// Makes a device current for a while.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Launch& launch) {
    if (launch.stream.device < 0) return;
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice", launch);
    if (before_ == launch.stream.device) return;
    check_cuda(cudaSetDevice(launch.stream.device), "cudaSetDevice", launch);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const DeviceGuard guard(how);
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (how.shared > kWithoutAsking) {
    check_cuda(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared)),
        "asking for shared memory", how);
  }
  const unsigned cluster = how.cluster.x * how.cluster.y * how.cluster.z;
  constexpr unsigned kPortableCluster = 8;
  if (cluster > kPortableCluster) {
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "asking for the cluster", how);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream.handle);
  config.attrs = attributes;
  if (how.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = how.cluster.x;
    attribute.val.clusterDim.y = how.cluster.y;
    attribute.val.clusterDim.z = how.cluster.z;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch", how);
}

// What a device has room for.
struct Room {
  int processors;
  size_t shared;   // bytes that one block may ask for
  int64_t blocks;  // of the launch, at once; 0 where one does not fit
};

// Answers are kept: a layer asks at every pass, the device answers slowly and always the same.
template <class... Parameters>
Room ask(const Launch& how, void (*kernel)(Parameters...)) {
  const DeviceGuard guard(how);
  int device = 0, most_shared = 0, blocks = 0;
  Room room{};
  check_cuda(cudaGetDevice(&device), "cudaGetDevice", how);
  static std::mutex mutex;
  static std::map<std::tuple<int, void (*)(Parameters...), size_t>, Room> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, kernel, how.shared);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  check_cuda(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking", how);
  check_cuda(cudaDeviceGetAttribute(&room.processors, cudaDevAttrMultiProcessorCount, device), "asking", how);
  room.shared = most_shared;
  if (how.shared > room.shared) return known[key] = room;
  const void* function = reinterpret_cast<const void*>(kernel);
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared)),
             "asking for shared memory", how);
  const int threads = static_cast<int>(how.block.x * how.block.y * how.block.z);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, how.shared), "asking", how);
  room.blocks = static_cast<int64_t>(blocks) * room.processors;
  return known[key] = room;
}

#else

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  const auto body = [](void* p) {
    Call& c = *static_cast<Call*>(p);
    std::apply(c.kernel, c.arguments);
  };
  try {
    emulator::run({how.grid, how.block, how.cluster, how.shared, how.cooperative}, body, &call);
  } catch (const Error& error) {
    fail(how.name, ": ", error.what(), "\n  ", describe(how));
  }
}

// Each processor holds one block.
struct Room {
  int processors;
  size_t shared;
  int64_t blocks;
};
template <class... Parameters>
Room ask(const Launch& how, void (*)(Parameters...)) {
  const int processors = emulator::processors();
  const size_t most = emulator::most_shared();
  return {processors, most, how.shared <= most ? processors : 0};
}

#endif

// ---- Shared memory

#ifdef __CUDACC__
#define GUNN_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define GUNN_DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(128) unsigned char gunn_shared_pool[]; \
  T* name = reinterpret_cast<T*>(gunn_shared_pool)
#else
// The array is known by the address of a variable that each declaration (and template instance) has for itself.
#define GUNN_SHARED(T, name, ...)                                             \
  auto& name = *static_cast<T(*) __VA_ARGS__>(::gunn::emulator::shared_array( \
      [] {                                                                    \
        static char key;                                                      \
        return static_cast<void*>(&key);                                      \
      }(),                                                                    \
      sizeof(T __VA_ARGS__)))
#define GUNN_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::gunn::emulator::dynamic_shared())
#endif

// ---- Barriers beyond the block

#ifdef __CUDACC__

GUNN_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
GUNN_DEVICE void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
GUNN_DEVICE unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
GUNN_DEVICE unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
template <class T>
GUNN_DEVICE T* remote_shared(T* mine, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else  // no clusters: kernels compile for these architectures, the host does not launch them there
GUNN_DEVICE void cluster_barrier() { __trap(); }
GUNN_DEVICE unsigned cluster_rank() { return 0; }
GUNN_DEVICE unsigned cluster_size() { return 1; }
template <class T>
GUNN_DEVICE T* remote_shared(T* mine, unsigned) {
  return mine;
}
#endif

#else

using emulator::cluster_rank;
using emulator::cluster_size;

inline void grid_barrier(emulator::Site site = emulator::Site::here()) { emulator::grid_barrier(site); }
inline void cluster_barrier(emulator::Site site = emulator::Site::here()) { emulator::cluster_barrier(site); }
template <class T>
T* remote_shared(T* mine, unsigned rank, emulator::Site site = emulator::Site::here()) {
  return static_cast<T*>(emulator::remote_shared(mine, rank, site));
}

#endif

// ---- Words that blocks exchange: 4 or 8 bytes, on a GPU within the whole device

#ifdef __CUDACC__

#define GUNN_WORD_ACCESS(name, instruction)                                                  \
  template <class T>                                                                         \
  GUNN_DEVICE T load_##name(const T* p) {                                                    \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a word has 4 or 8 bytes");              \
    T value;                                                                                 \
    if constexpr (sizeof(T) == 4) {                                                          \
      unsigned bits;                                                                         \
      asm volatile("ld." instruction ".gpu.b32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory"); \
      memcpy(&value, &bits, sizeof value);                                                   \
    } else {                                                                                 \
      unsigned long long bits;                                                               \
      asm volatile("ld." instruction ".gpu.b64 %0, [%1];" : "=l"(bits) : "l"(p) : "memory"); \
      memcpy(&value, &bits, sizeof value);                                                   \
    }                                                                                        \
    return value;                                                                            \
  }
GUNN_WORD_ACCESS(acquire, "acquire")
GUNN_WORD_ACCESS(relaxed, "relaxed")
#undef GUNN_WORD_ACCESS

#define GUNN_WORD_ACCESS(name, instruction)                                                  \
  template <class T>                                                                         \
  GUNN_DEVICE void store_##name(T* p, T value) {                                             \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a word has 4 or 8 bytes");              \
    if constexpr (sizeof(T) == 4) {                                                          \
      unsigned bits;                                                                         \
      memcpy(&bits, &value, sizeof value);                                                   \
      asm volatile("st." instruction ".gpu.b32 [%0], %1;" : : "l"(p), "r"(bits) : "memory"); \
    } else {                                                                                 \
      unsigned long long bits;                                                               \
      memcpy(&bits, &value, sizeof value);                                                   \
      asm volatile("st." instruction ".gpu.b64 [%0], %1;" : : "l"(p), "l"(bits) : "memory"); \
    }                                                                                        \
  }
GUNN_WORD_ACCESS(release, "release")
GUNN_WORD_ACCESS(relaxed, "relaxed")
#undef GUNN_WORD_ACCESS

GUNN_DEVICE unsigned add_acquire_release(unsigned* p, unsigned value) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
  return before;
}

#else

template <class T>
T load_acquire(const T* p) {
  return emulator::atomic_load<__ATOMIC_ACQUIRE>(p);
}
template <class T>
T load_relaxed(const T* p) {
  return emulator::atomic_load<__ATOMIC_RELAXED>(p);
}
template <class T>
void store_release(T* p, T value) {
  emulator::atomic_store<__ATOMIC_RELEASE>(p, value);
}
template <class T>
void store_relaxed(T* p, T value) {
  emulator::atomic_store<__ATOMIC_RELAXED>(p, value);
}
inline unsigned add_acquire_release(unsigned* p, unsigned value) {
  return emulator::atomic_update<__ATOMIC_ACQ_REL>(p, [value](unsigned old) { return old + value; });
}

#endif

// Waits until ready() holds. In the emulator the others go on meanwhile, and a wait that cannot end fails the launch;
// on a GPU a debug build traps after some ten seconds.
#ifdef __CUDACC__

template <class Ready>
GUNN_DEVICE void poll(const char* what, Ready ready) {
#ifdef NDEBUG
  static_cast<void>(what);
  while (!ready()) {
  }
#else
  constexpr long long kMostClocks = 1ll << 34;
  const long long start = clock64();
  while (!ready()) {
    if (clock64() - start < kMostClocks) continue;
    printf("block (%u, %u, %u), thread (%u, %u, %u): waited too long for %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
           threadIdx.x, threadIdx.y, threadIdx.z, what);
    __trap();
  }
#endif
}

#else

template <class Ready>
void poll(const char* what, Ready ready, emulator::Site site = emulator::Site::here()) {
  while (!ready()) emulator::poll_again(what, site);
  emulator::poll_done();
}

#endif

// ---- Asynchronous copies: `bytes` is 4, 8 or 16; zeros instead where not valid (the source is not read then). They
// are visible to the thread that waited, to others after a barrier.
#ifdef __CUDACC__

template <int bytes>
GUNN_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared)), read = valid ? bytes : 0;
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(global), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(to), "l"(global), "n"(bytes), "r"(read)
                 : "memory");
  }
}
GUNN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int pending>
GUNN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}

#else

template <int bytes>
void copy_async(void* shared, const void* global, bool valid = true, emulator::Site site = emulator::Site::here()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::copy_async(shared, global, bytes, valid, site);
}
inline void copy_async_commit() { emulator::commit_copies(); }
template <int pending>
void copy_async_wait() {
  emulator::wait_copies(pending);
}

#endif

// ---- 16-bit storage

#ifdef __CUDACC__

GUNN_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
GUNN_DEVICE float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
GUNN_DEVICE uint16_t bfloat16_bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
GUNN_DEVICE uint16_t float16_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
GUNN_DEVICE float round_to_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

#else

inline float to_float(BFloat16 value) { return emulator::bfloat16_to_float(value.bits); }
inline float to_float(Float16 value) { return emulator::float16_to_float(value.bits); }
inline uint16_t bfloat16_bits(float value) { return emulator::float_to_bfloat16(value); }
inline uint16_t float16_bits(float value) { return emulator::float_to_float16(value); }
using emulator::round_to_tf32;

#endif

GUNN_DEVICE float to_float(float value) { return value; }
GUNN_DEVICE double to_float(double value) { return value; }

template <class Scalar>
struct FromFloat {
  template <class Wide>
  static GUNN_DEVICE Scalar convert(Wide value) {
    return static_cast<Scalar>(value);
  }
};
template <>
struct FromFloat<BFloat16> {
  static GUNN_DEVICE BFloat16 convert(float value) { return {bfloat16_bits(value)}; }
};
template <>
struct FromFloat<Float16> {
  static GUNN_DEVICE Float16 convert(float value) { return {float16_bits(value)}; }
};

// Rounds to nearest, ties to even.
template <class Scalar, class Wide>
GUNN_DEVICE Scalar from_float(Wide value) {
  return FromFloat<Scalar>::convert(value);
}

// ---- Tensor cores: c += a · b on a warp's fragments, float32 sums
//
// With lane = 4·g + t. Registers hold two 16-bit values that are neighbours in k, the first in the low half, or one
// tf32.
//   a[r]  row g + 8·(r % 2), register column t + 4·(r / 2)      of A (16 x 16 or, tf32, 16 x 8)
//   b[r]  column g, register row t + 4·r                        of B (16 x 8 or 8 x 8)
//   c[i]  row g + 8·(i / 2), column 2·t + i % 2                 of C (16 x 8)

// load_matrices: lane 8·j + i has the address, in shared memory and a multiple of 16, of row i of matrix j, 8 values of
// 16 bits; r[j] becomes row g, columns 2·t and 2·t + 1 of matrix j, transposed rows 2·t and 2·t + 1, column g. Rows
// of 4 words of 32 bits so become row g, word t.

#ifdef __CUDACC__

template <bool transposed>
GUNN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
}

#define GUNN_MMA(shape, types)                                                        \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types                        \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class Scalar>
GUNN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
GUNN_DEVICE void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  GUNN_MMA("m16n8k16", "bf16.bf16");
}
template <>
GUNN_DEVICE void mma<Float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  GUNN_MMA("m16n8k16", "f16.f16");
}
GUNN_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  GUNN_MMA("m16n8k8", "tf32.tf32");
}
#undef GUNN_MMA

template <class T>
GUNN_DEVICE void check_initialised(const T*, size_t) {}

template <class T>
GUNN_DEVICE T fresh(T value) {
  static_assert(sizeof(T) == 4, "one register");
  asm volatile("" : "+r"(value));
  return value;
}

#else

// The rows are read here, where sanitizers see it.
template <bool transposed>
void load_matrices(uint32_t (&r)[4], const void* row, emulator::Site site = emulator::Site::here()) {
  const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
  const unsigned first = transposed ? 2 * t : g, every = 0x18100800u;
  const emulator::Pointers rows = emulator::gather("ldmatrix", row, every + first * 0x01010101u, site);
  const auto values = [](const void* from) { return static_cast<const uint16_t*>(from); };
  if (transposed) {
    const emulator::Pointers next = emulator::gather("ldmatrix", row, every + (first + 1) * 0x01010101u, site);
    for (int j = 0; j < 4; ++j) r[j] = values(rows.of[j])[g] | static_cast<uint32_t>(values(next.of[j])[g]) << 16;
  } else {
    for (int j = 0; j < 4; ++j) {
      r[j] = values(rows.of[j])[2 * t] | static_cast<uint32_t>(values(rows.of[j])[2 * t + 1]) << 16;
    }
  }
}

template <class Scalar>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Site site = emulator::Site::here()) {
  constexpr bool brain = std::is_same_v<Scalar, BFloat16>;
  static_assert(brain || std::is_same_v<Scalar, Float16>, "tensor cores multiply BFloat16 or Float16");
  emulator::multiply(brain ? emulator::Format::bfloat16 : emulator::Format::float16, c, a, b, site);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     emulator::Site site = emulator::Site::here()) {
  emulator::multiply(emulator::Format::tf32, c, a, b, site);
}

template <class T>
T fresh(T value) {
  return value;
}

template <class T>
void check_initialised(const T* begin, size_t count, emulator::Site site = emulator::Site::here()) {
  emulator::check_initialised(begin, count, sizeof(T), site);
}

#endif

}  // namespace gunn
