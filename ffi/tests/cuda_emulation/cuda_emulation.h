// Runs CUDA kernels on a CPU, for tests: every thread of a block is a fiber, barriers and warp-wide
// operations switch between them, asynchronous copies happen as late as the program allows. Blocks
// run one after another. The order of threads within a block is drawn at random (seed in
// AQUA_EMULATE_SEED), so that a missing barrier has a chance to show.
//
// Also a CUDA runtime of one device whose memory is the host's: what ffi/cuda calls of it. With
// AQUA_EMULATE_MEMORY=mixed some memory, by its address, passes for this device's or for a peer's.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bf16(float x);

void launch(int blocks, int threads, size_t shared, const std::function<void()>& body);
unsigned char* shared_memory();
void block_barrier();

// A warp-wide operation: each lane gives `in` (of `bytes`), the last one to arrive calls `combine`
// with all 32 (in lane order) and a place for 32 results, and each lane gets its own.
constexpr size_t kLaneBytes = 64;
using Combine = void (*)(const unsigned char* in, unsigned char* out, const void* extra);
void warp_wide(const void* in, size_t in_bytes, void* out, size_t out_bytes, Combine combine,
               const void* extra);

void copy_async(void* to, const void* from, size_t bytes);  // from null: zeros
void commit_copies();
void wait_copies(int pending);

void load_matrices(uint32_t out[4], const void* row, bool transposed);

using Widen = float (*)(uint16_t);
void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Widen widen);

template <typename T>
T shuffle(T value, int from) {  // lane `from` of the caller's choice
  struct In {
    T value;
    int from;
  } in{value, from};
  T out;
  warp_wide(&in, sizeof(in), &out, sizeof(out),
            [](const unsigned char* all, unsigned char* results, const void*) {
              for (int lane = 0; lane < 32; ++lane) {
                In mine, theirs;
                std::memcpy(&mine, all + lane * kLaneBytes, sizeof(In));
                std::memcpy(&theirs, all + mine.from * kLaneBytes, sizeof(In));
                std::memcpy(results + lane * kLaneBytes, &theirs.value, sizeof(T));
              }
            },
            nullptr);
  return out;
}
int lane();

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulation::shuffle(0, 0); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, emulation::lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int from = emulation::lane() - by;
  return emulation::shuffle(value, from < 0 ? emulation::lane() : from);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::shuffle(value, from & 31);
}
unsigned __ballot_sync(unsigned, bool value);  // in cuda_emulation.cc
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __threadfence_system() {}
inline void __threadfence() {}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T, typename U>
T atomicAdd(T* to, U what) {
  const T before = *to;
  *to = before + static_cast<T>(what);
  return before;
}

// ---- The runtime. Work on a stream is done later, when somebody asks whether it is done.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotReady = 600,
};
enum cudaMemcpyKind { cudaMemcpyDefault };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  void* devicePointer;
};
struct EmulatedStream;
struct EmulatedEvent;
using cudaStream_t = EmulatedStream*;
using cudaEvent_t = EmulatedEvent*;
constexpr unsigned cudaHostAllocMapped = 1, cudaHostAllocPortable = 2, cudaEventDisableTiming = 4,
                   cudaStreamNonBlocking = 8, cudaHostRegisterMapped = 16,
                   cudaHostRegisterPortable = 32;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaHostGetDevicePointer(void** out, void* host, unsigned flags);
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void* memory);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* memory);
cudaError_t cudaDeviceEnablePeerAccess(int device, unsigned flags);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_stride, const void* from, size_t from_stride,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);

namespace emulation {
// Does `what` at once on no stream, later on a stream.
void enqueue(cudaStream_t stream, std::function<void()> what);

// While there is one, this thread captures a graph: kernels may be launched, and any call of the
// runtime that may allocate, wait or ask ends the process. For handlers that say they may be captured.
class Capturing {
 public:
  Capturing();
  ~Capturing();
};
}  // namespace emulation
