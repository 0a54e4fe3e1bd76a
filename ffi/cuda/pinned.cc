#include "pinned.h"

#include <atomic>
#include <map>

#include "device.h"

namespace {

std::atomic<uint64_t> pinned_bytes{0};

const char* text_of(cudaError_t error) {
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace

const char* aqua_host_pin(int32_t device, void* base, uint64_t bytes) {
  const aqua::cuda::OnDevice on(device);
  if (on.status() != cudaSuccess) return text_of(on.status());
  cudaError_t error = cudaHostRegister(base, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable);
  if (error != cudaSuccess) return text_of(error);
  void* seen = nullptr;
  error = cudaHostGetDevicePointer(&seen, base, 0);
  if (error == cudaSuccess && seen == base) {
    pinned_bytes.fetch_add(bytes, std::memory_order_relaxed);
    return nullptr;
  }
  cudaHostUnregister(base);
  // A segment has one address for all of its pieces.
  return error == cudaSuccess ? "this GPU sees host memory at addresses of its own" : text_of(error);
}

const char* aqua_host_unpin(int32_t device, void* base, uint64_t bytes) {
  const aqua::cuda::OnDevice on(device);
  cudaError_t error = on.status();
  if (error == cudaSuccess) error = cudaHostUnregister(base);
  if (error != cudaSuccess) return text_of(error);
  pinned_bytes.fetch_sub(bytes, std::memory_order_relaxed);
  return nullptr;
}

const char* aqua_host_copy(int32_t device, void* to, const void* from, uint64_t bytes) {
  const aqua::cuda::OnDevice on(device);
  if (on.status() != cudaSuccess) return text_of(on.status());
  // Those of each thread that copies between stores, which is one an engine.
  thread_local std::map<int32_t, cudaStream_t> streams;
  cudaStream_t& stream = streams[device];
  cudaError_t error = cudaSuccess;
  if (stream == nullptr) {
    error = cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0);
    if (error != cudaSuccess) return stream = nullptr, text_of(error);
  }
  error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
  const cudaError_t ended = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) error = ended;
  return error == cudaSuccess ? nullptr : text_of(error);
}

uint64_t aqua_host_pinned() { return pinned_bytes.load(std::memory_order_relaxed); }
