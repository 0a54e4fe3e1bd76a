#include "move_streams.h"

#include <algorithm>
#include <cstdlib>

namespace aqua {
namespace cuda {
namespace {

// From how many bytes on a piece goes to the copy engines. Issuing a copy takes the host 2 to 7 us
// (others' figures): as long as 100 to 400 KB take over PCIe, 0.8 to 2.8 MB over NVLink, and more
// than 2 MB within a GPU. Guesses until it is measured; scripts/gpu_check.py prints both ways' rates
// by size.
constexpr int64_t kHostEngineBytes = 256 << 10, kPeerEngineBytes = 2 << 20;
// Blocks of a copying kernel, of 16 KiB in flight each: what a link takes with a latency of 1.5 us
// (100 KB over PCIe, 0.7 MB over NVLink), few enough to leave the step its multiprocessors. Within
// a GPU the copy takes the memory's time from the step in any case: better a short while of all.
constexpr int kHostBlocks = 32, kPeerBlocks = 48, kHereBlocks = 256;
// Most bytes that are issued together. Those of engines are fewer, that both lanes have some.
constexpr int64_t kFlightBytes = 32 << 20, kEngineFlightBytes = 8 << 20;

int64_t engine_bytes() {
  const char* text = std::getenv("AQUA_COPY_ENGINE_BYTES");
  return text == nullptr ? -1 : std::max<int64_t>(0, std::atoll(text));
}

int blocks_for(Place place) {
  return place == Place::kHost ? kHostBlocks : place == Place::kPeer ? kPeerBlocks : kHereBlocks;
}

}  // namespace

Batch::~Batch() {
  if (event != nullptr) cudaEventDestroy(event);
  if (words != nullptr) cudaFreeHost(words);
}

cudaError_t Batch::allocate() {
  void *host = nullptr, *mapped = nullptr;
  const size_t bytes = kMovesAt * sizeof(int32_t) + capacity * sizeof(Move);
  cudaError_t error = cudaHostAlloc(&host, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  if (error != cudaSuccess) return error;
  words = static_cast<int32_t*>(host);
  error = cudaHostGetDevicePointer(&mapped, host, 0);
  if (error != cudaSuccess) return error;
  device_words = static_cast<int32_t*>(mapped);
  return cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
}

bool Batch::written() const {
  cudaSetDevice(device);
  // After an error of the device nothing is in `words` for sure; the step has failed as well.
  return cudaEventQuery(event) == cudaSuccess;
}

MoveStreams::MoveStreams(int device) : device_(device), engine_bytes_(engine_bytes()) {
  cudaSetDevice(device);
  int least = 0, greatest = 0;
  cudaDeviceGetStreamPriorityRange(&least, &greatest);
  for (auto& side : streams_) {
    for (cudaStream_t& stream : side) {
      // If this fails the stream is null, and so does every issue.
      if (cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, least) != cudaSuccess) {
        stream = nullptr;
      }
    }
  }
}

MoveStreams::Way MoveStreams::way_of(const Item& item) const {
  if (item.move.flags & kMoveChecksum) return Way::kChecked;
  int64_t least = engine_bytes_;
  if (least < 0) {
    if (item.place == Place::kHere) return Way::kKernel;
    least = item.place == Place::kHost ? kHostEngineBytes : kPeerEngineBytes;
  }
  return item.move.bytes >= least ? Way::kEngine : Way::kKernel;
}

bool MoveStreams::fits(const std::vector<Item>& group, const Item& item) const {
  if (group.empty()) return true;
  const Way way = way_of(item);
  if (group.size() >= kPieces || way_of(group.front()) != way ||
      group.front().place != item.place) {
    return false;
  }
  int64_t bytes = int64_t{item.move.bytes} * item.move.runs;
  for (const Item& other : group) bytes += int64_t{other.move.bytes} * other.move.runs;
  return bytes <= (way == Way::kEngine ? kEngineFlightBytes : kFlightBytes);
}

cudaError_t MoveStreams::copy_by_engine(const Item& item, cudaStream_t stream) const {
  const Move& move = item.move;
  const char* from = item.from + move.begin;
  char* to = item.to + move.begin;
  if (move.runs == 1) return cudaMemcpyAsync(to, from, move.bytes, cudaMemcpyDefault, stream);
  const auto stride = static_cast<size_t>(move.stride);
  return cudaMemcpy2DAsync(to, stride, from, stride, move.bytes, move.runs, cudaMemcpyDefault,
                           stream);
}

cudaError_t MoveStreams::take_spare(Flight* flight) {
  if (!spares_.empty()) {
    *flight = std::move(spares_.back());
    spares_.pop_back();
    return cudaSuccess;
  }
  void* sums = nullptr;
  cudaError_t error = cudaHostAlloc(&sums, kPieces * sizeof(uint64_t),
                                    cudaHostAllocMapped | cudaHostAllocPortable);
  if (error != cudaSuccess) return error;
  flight->sums = static_cast<uint64_t*>(sums);
  error = cudaEventCreateWithFlags(&flight->event, cudaEventDisableTiming);
  if (error != cudaSuccess) cudaFreeHost(sums);
  return error;
}

bool MoveStreams::issue(int side, const std::vector<Item>& group) {
  cudaSetDevice(device_);
  const Way way = way_of(group.front());
  if (way == Way::kEngine) lane_[side] = (lane_[side] + 1) % kLanes;
  cudaStream_t stream = streams_[side][way == Way::kEngine ? lane_[side] : 0];
  Flight flight;
  if (stream == nullptr || take_spare(&flight) != cudaSuccess) return false;
  flight.items = group;
  flight.started = std::chrono::steady_clock::now();
  flight.landed = std::chrono::steady_clock::time_point::min();
  flight.failed = false;
  cudaError_t error = cudaSuccess;
  if (way == Way::kEngine) {
    for (const Item& item : group) {
      if (error == cudaSuccess) error = copy_by_engine(item, stream);
    }
  } else {
    Pieces pieces;
    pieces.count = static_cast<int32_t>(group.size());
    for (size_t i = 0; i < group.size(); ++i) {
      const Move& move = group[i].move;
      pieces.pieces[i] = {group[i].from + move.begin, group[i].to + move.begin, move.bytes,
                          move.runs, move.runs > 1 ? move.stride : 0, 0};
    }
    if (way == Way::kKernel) {
      error = copy_pieces(pieces, blocks_for(group.front().place), stream);
    } else {
      void* sums = nullptr;
      error = cudaHostGetDevicePointer(&sums, flight.sums, 0);
      if (error == cudaSuccess) {
        error = copy_checked(pieces, static_cast<uint64_t*>(sums), stream);
      }
    }
  }
  const cudaError_t recorded = cudaEventRecord(flight.event, stream);
  if (error == cudaSuccess && recorded == cudaSuccess) {
    flying[side].push_back(std::move(flight));
    return true;
  }
  cudaStreamSynchronize(stream);  // what had been issued must not write any more
  reuse(std::move(flight));
  return false;
}

bool MoveStreams::landed(Flight& flight) {
  cudaSetDevice(device_);
  const cudaError_t status = cudaEventQuery(flight.event);
  if (status == cudaErrorNotReady) return false;
  flight.failed = status != cudaSuccess;
  return true;
}

void MoveStreams::wait() {
  cudaSetDevice(device_);
  for (int side = 0; side < 2; ++side) {
    for (cudaStream_t stream : streams_[side]) {
      if (stream == nullptr || cudaStreamSynchronize(stream) == cudaSuccess) continue;
      for (Flight& flight : flying[side]) flight.failed = true;
    }
  }
}

void MoveStreams::reuse(Flight&& flight) {
  flight.items.clear();
  spares_.push_back(std::move(flight));
}

cudaError_t reach(int device, void* base, uint64_t bytes, void** address, void** pinned,
                  int* home) {
  const OnDevice on(device >= 0 ? device : 0);
  if (on.status() != cudaSuccess) return on.status();
  *pinned = nullptr;
  *home = kHostMemory;
  cudaPointerAttributes attributes{};
  cudaError_t error = cudaPointerGetAttributes(&attributes, base);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return error;
  }
  if (attributes.type != cudaMemoryTypeUnregistered) {
    if (attributes.type == cudaMemoryTypeDevice) *home = attributes.device;
    if (attributes.type == cudaMemoryTypeDevice && device >= 0 && attributes.device != device) {
      // Memory mapped by our own arenas is reachable already; this is for cudaMalloc's.
      const cudaError_t peer = cudaDeviceEnablePeerAccess(attributes.device, 0);
      if (peer != cudaSuccess) cudaGetLastError();
    }
    *address = attributes.devicePointer != nullptr ? attributes.devicePointer : base;
    return cudaSuccess;
  }
  error = cudaHostRegister(base, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return error;
  }
  error = cudaHostGetDevicePointer(address, base, 0);
  if (error != cudaSuccess) {
    cudaHostUnregister(base);
    return error;
  }
  *pinned = base;
  return cudaSuccess;
}

void unpin(int device, void* pinned) {
  if (pinned == nullptr) return;
  // Without this a thread that has no context yet would make one on the first GPU.
  const OnDevice on(device >= 0 ? device : 0);
  if (cudaHostUnregister(pinned) != cudaSuccess) cudaGetLastError();
}

void relax_capture(int device) {
  cudaSetDevice(device);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
}

}  // namespace cuda
}  // namespace aqua
