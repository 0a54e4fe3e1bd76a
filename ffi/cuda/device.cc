#include "device.h"

#ifndef AQUA_EMULATE
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>
#endif

namespace aqua {
namespace cuda {

#ifdef AQUA_EMULATE
OnDevice::OnDevice(int device) : status_(cudaSetDevice(device)) {}
OnDevice::~OnDevice() = default;
#else
namespace {

// What tells and sets a thread's context; both null without a driver. The runtime can only name a
// device, and makes a context on it where there was none.
struct Contexts {
  int (*get)(void**) = nullptr;
  int (*set)(void*) = nullptr;
};

const Contexts& contexts() {
  static const Contexts found = [] {
    Contexts c;
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return c;
    c.get = reinterpret_cast<decltype(c.get)>(dlsym(library, "cuCtxGetCurrent"));
    c.set = reinterpret_cast<decltype(c.set)>(dlsym(library, "cuCtxSetCurrent"));
    return c;
  }();
  return found;
}

}  // namespace

OnDevice::OnDevice(int device) {
  if (contexts().get == nullptr || contexts().get(&before_) != 0) before_ = nullptr;
  status_ = cudaSetDevice(device);
  if (status_ != cudaSuccess) {
    cudaGetLastError();
  } else {
    // After that, for it may make a context.
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
}

OnDevice::~OnDevice() {
  if (status_ != cudaSuccess) return;
  cudaThreadExchangeStreamCaptureMode(&mode_);
  if (contexts().set != nullptr) contexts().set(before_);
}

cudaError_t allow_shared(const void* kernel, size_t bytes) {
  constexpr size_t kAlways = 48 * 1024;
  if (bytes <= kAlways) return cudaSuccess;
  static std::mutex lock;
  static auto* const allowed = new std::map<std::pair<int, const void*>, size_t>;  // never destroyed
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::lock_guard<std::mutex> guard(lock);
  size_t& most = (*allowed)[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  most = bytes;
  // As much of the first-level cache as can be becomes shared memory, or fewer blocks would fit a
  // multiprocessor than have room: what such kernels read goes past that cache. Only a hint.
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared) != cudaSuccess) {
    cudaGetLastError();
  }
  return cudaSuccess;
}
#endif

}  // namespace cuda
}  // namespace aqua
