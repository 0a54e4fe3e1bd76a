// Side streams of one device, what flies on them, and memory they can reach.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "../common/moves_results.h"
#include "moves.h"

namespace aqua {
namespace cuda {

// The moves of one step on their way to the host.
struct Batch {
  Batch(int device, int64_t capacity) : device(device), capacity(capacity) {}
  ~Batch();
  Batch(const Batch&) = delete;
  cudaError_t allocate();
  // Whether the step's head has run.
  bool written() const;
  Spaces spaces() const { return {reinterpret_cast<const Space*>(words + 4), num_spaces}; }

  const int device;
  const int64_t capacity;           // moves
  int32_t* words = nullptr;         // pinned, as hand_over_words fills it
  int32_t* device_words = nullptr;  // the same memory as the device sees it
  cudaEvent_t event = nullptr;
  char* base = nullptr;  // the pool
  int64_t pages = 0, page_bytes = 0;
  int32_t num_spaces = 0;
  int64_t next = 0;  // moves before this one have been taken up
};

// Where the other end of a copy lies, seen from the device that has the pool.
enum class Place { kHere, kPeer, kHost };
constexpr int kHostMemory = -1;  // instead of a device

// A checked move.
struct Item {
  Move move;
  MoveUses uses;
  Place place;
  const char* from;  // of the page's first byte
  char* to;
  std::chrono::steady_clock::time_point not_before;
};

// Copies that were issued together.
struct Flight {
  std::vector<Item> items;
  cudaEvent_t event = nullptr;
  uint64_t* sums = nullptr;  // pinned, kPieces
  bool failed = false;
  std::chrono::steady_clock::time_point started, landed = std::chrono::steady_clock::time_point::min(),
                                                 report;
};

// Copies of one device. Belongs to the worker. Side 0 is out of the pool, side 1 into it: apart, so
// that both directions of a link are used at once.
class MoveStreams {
 public:
  explicit MoveStreams(int device);

  std::deque<Item> waiting[2];
  std::deque<Flight> flying[2];
  // When the last flight of each side had landed.
  std::chrono::steady_clock::time_point busy_until[2] = {};

  // Whether another group may be issued now: few at a time, so that abandoning doesn't wait long.
  bool room(int side) const { return flying[side].size() < 4; }
  // Whether `item` can go with `group`: how it is copied, how many, how much.
  bool fits(const std::vector<Item>& group, const Item& item) const;
  // Puts the copies onto a stream of the side and remembers the flight; false if that failed, with
  // nothing of it under way any more.
  bool issue(int side, const std::vector<Item>& group);
  // Whether its copies have ended; sets `failed` if the device says so.
  bool landed(Flight& flight);
  // Waits for everything on the streams.
  void wait();
  void reuse(Flight&& flight);

 private:
  enum class Way { kEngine, kKernel, kChecked };
  Way way_of(const Item& item) const;
  cudaError_t copy_by_engine(const Item& item, cudaStream_t stream) const;
  cudaError_t take_spare(Flight* flight);

  static constexpr int kLanes = 2;

  const int device_;
  const int64_t engine_bytes_;  // for any place; negative: by place
  // A copy engine begins its next copy a moment after it has ended one: with two streams a side, in
  // turns, another one runs meanwhile. Kernels all go to the first.
  cudaStream_t streams_[2][kLanes] = {};
  int lane_[2] = {0, 0};  // of a side's last group for engines
  std::vector<Flight> spares_;
};

// Makes memory reachable for copies of `device`: pinned host, device or peer memory is taken as it
// is, other host memory is pinned (`pinned` then says what to unpin). `address` is the device's,
// `home` the device that has the memory, or kHostMemory.
cudaError_t reach(int device, void* base, uint64_t bytes, void** address, void** pinned, int* home);
void unpin(int device, void* pinned);

// Lets this thread use the runtime while others capture graphs; `device` is one that has a context.
void relax_capture(int device);

}  // namespace cuda
}  // namespace aqua
