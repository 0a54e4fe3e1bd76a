// The runtime's part of cuda_emulation.h.

#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>

#include "cuda_emulation.h"

struct EmulatedStream {
  std::deque<std::function<void()>> work;
};
struct EmulatedEvent {
  int recorded = 0, reached = 0;
  EmulatedStream* stream = nullptr;
};

namespace {

// One lock for all of it: streams are only emptied by who asks for events.
std::recursive_mutex lock;
std::set<const void*> registered;

thread_local bool capturing = false;

void not_captured(const char* call) {
  if (!capturing) return;
  std::fprintf(stderr, "cuda emulation: %s while a graph is captured\n", call);
  std::abort();
}

// The device that is said to have memory that nobody pinned; -1: none, it is the host's.
int home_of(const void* memory) {
  const char* mixed = std::getenv("AQUA_EMULATE_MEMORY");
  if (mixed == nullptr || std::strcmp(mixed, "mixed") != 0) return -1;
  const auto page = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(memory) >> 12);
  return static_cast<int>((page * 0x9E3779B97F4A7C15 >> 40) % 3) - 1;
}

void run_one(EmulatedStream* stream) {
  if (stream == nullptr || stream->work.empty()) return;
  const std::function<void()> what = std::move(stream->work.front());
  stream->work.pop_front();
  what();
}

}  // namespace

namespace emulation {

void enqueue(cudaStream_t stream, std::function<void()> what) {
  if (stream == nullptr) {
    what();
    return;
  }
  std::lock_guard<std::recursive_mutex> guard(lock);
  stream->work.push_back(std::move(what));
}

Capturing::Capturing() { capturing = true; }
Capturing::~Capturing() { capturing = false; }

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulation";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  not_captured("cudaHostAlloc");
  *out = std::calloc(1, bytes);
  return *out == nullptr ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  not_captured("cudaFreeHost");
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** out, void* host, unsigned) {
  *out = host;
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* memory, size_t, unsigned) {
  not_captured("cudaHostRegister");
  std::lock_guard<std::recursive_mutex> guard(lock);
  return registered.insert(memory).second ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaHostUnregister(void* memory) {
  not_captured("cudaHostUnregister");
  std::lock_guard<std::recursive_mutex> guard(lock);
  return registered.erase(memory) == 1 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* memory) {
  not_captured("cudaPointerGetAttributes");
  std::lock_guard<std::recursive_mutex> guard(lock);
  const int home = home_of(memory);
  *out = {registered.count(memory) ? cudaMemoryTypeHost
          : home < 0               ? cudaMemoryTypeUnregistered
                                   : cudaMemoryTypeDevice,
          home < 0 ? 0 : home, const_cast<void*>(memory)};
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  not_captured("cudaDeviceEnablePeerAccess");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) {
  not_captured("cudaStreamCreateWithPriority");
  *out = new EmulatedStream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  not_captured("cudaStreamSynchronize");
  std::lock_guard<std::recursive_mutex> guard(lock);
  while (stream != nullptr && !stream->work.empty()) run_one(stream);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  not_captured("cudaEventCreateWithFlags");
  *out = new EmulatedEvent;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  not_captured("cudaEventDestroy");
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  not_captured("cudaEventRecord");
  std::lock_guard<std::recursive_mutex> guard(lock);
  const int number = ++event->recorded;
  event->stream = stream;
  emulation::enqueue(stream, [=] { event->reached = number; });
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  not_captured("cudaEventQuery");
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (event->reached < event->recorded) run_one(event->stream);
  return event->reached < event->recorded ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  not_captured("cudaMemcpyAsync");
  emulation::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_stride, const void* from, size_t from_stride,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  not_captured("cudaMemcpy2DAsync");
  emulation::enqueue(stream, [=] {
    for (size_t i = 0; i < height; ++i) {
      std::memcpy(static_cast<char*>(to) + i * to_stride,
                  static_cast<const char*>(from) + i * from_stride, width);
    }
  });
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
