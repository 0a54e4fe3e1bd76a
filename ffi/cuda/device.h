// What host code and kernels share: element types, launches. With AQUA_EMULATE this and device.cuh
// are a CPU's (ffi/tests/cuda_emulation/).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef AQUA_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#define AQUA_HD __host__ __device__ __forceinline__

namespace aqua {
namespace cuda {

// 16 bits of storage. Arithmetic is in f32.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Dtypes that are told apart at run time: queries, new keys and values, results.
enum class Type : int32_t { kF32 = 0, kBf16 = 1, kF16 = 2 };

AQUA_HD int size_of(Type type) { return type == Type::kF32 ? 4 : 2; }

struct alignas(16) Vec16 {
  uint32_t x, y, z, w;
};
struct alignas(8) Vec8 {
  uint32_t x, y;
};

// Makes a device current in this thread, for a scope; afterwards the thread has the context it had,
// or none: setting the device that it had would make a context there, half a gigabyte on a GPU that
// is somebody else's. Calls in the scope may allocate or wait though another thread captures a graph.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  cudaError_t status() const { return status_; }

 private:
#ifndef AQUA_EMULATE
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  void* before_ = nullptr;
#endif
  cudaError_t status_;
};

// ---- Launches, from host code of any kind. An empty grid is nothing to do.

// Lets a kernel have so much dynamic shared memory on the current device. Never takes back what it
// may have: another thread may be about to launch it with more.
cudaError_t allow_shared(const void* kernel, size_t bytes);

// Loads a kernel onto the current device now, with so much dynamic shared memory at most. The driver
// loads kernels when they are first launched, which may fail where that is inside a captured graph.
// A device without so much shared memory is no error here: the launch will say so.
template <typename... P>
cudaError_t preload(void (*kernel)(P...), size_t shared = 0) {
#ifdef AQUA_EMULATE
  (void)kernel, (void)shared;
  return cudaSuccess;
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes unused;
  const cudaError_t error = cudaFuncGetAttributes(&unused, function);
  if (error == cudaSuccess && allow_shared(function, shared) != cudaSuccess) cudaGetLastError();
  return error;
#endif
}

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
                   cudaStream_t stream, A... arguments) {
  if (blocks <= 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
#ifdef AQUA_EMULATE
  emulation::enqueue(stream, [=] {
    emulation::launch(static_cast<int>(blocks), threads, shared,
                      [=] { kernel(static_cast<P>(arguments)...); });
  });
  return cudaSuccess;
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = allow_shared(function, shared);
  if (error != cudaSuccess) return error;
  return [&](P... values) {
    void* pointers[] = {static_cast<void*>(&values)...};
    return cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers,
                            shared, stream);
  }(static_cast<P>(arguments)...);
#endif
}

}  // namespace cuda
}  // namespace aqua
