#include "moves.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../common/moves_state.h"
#include "move_streams.h"

namespace aqua {
namespace {

using Clock = std::chrono::steady_clock;
using cuda::Batch;
using cuda::Flight;
using cuda::Item;
using cuda::MoveStreams;

// Between two looks at events, while something is under way.
constexpr std::chrono::microseconds kLook{20};

HandleTable& segments = move_state.segments;
HandleTable& pools = move_state.pools;
MoveResults& results = move_state.results;
std::atomic<int> default_device{-1};

// By a segment's id: host memory that it had pinned, which is unpinned when it is retired, and the
// device that has it.
void* pinned_by_us[kHandles];
int homes[kHandles];

cuda::Place place_of(const MoveUses& uses, int device) {
  const int page = uses.space < 0 ? device : homes[uses.space], other = homes[uses.segment];
  if (page == cuda::kHostMemory || other == cuda::kHostMemory) return cuda::Place::kHost;
  return page == device && other == device ? cuda::Place::kHere : cuda::Place::kPeer;
}

Clock::time_point hold_until(uint64_t ticket, uint64_t salt) {
  const uint32_t most = move_state.delay_max_us.load(std::memory_order_relaxed);
  if (most == 0) return Clock::time_point::min();
  const uint64_t seed = move_state.delay_seed.load(std::memory_order_relaxed);
  const uint64_t random = mix_bits(ticket ^ seed ^ salt);
  return Clock::now() + std::chrono::microseconds(random % (uint64_t{most} + 1));
}

// The worker: it alone looks at events and issues copies.
class Queue {
 public:
  Queue() : worker_([this] { work(); }) {
    pthread_setname_np(worker_.native_handle(), "aqua-copies");
    if (pthread_getcpuclockid(worker_.native_handle(), &clock_) != 0) clock_ = CLOCK_MONOTONIC;
  }

  void push(std::unique_ptr<Batch> batch) {
    std::lock_guard<std::mutex> lock(inbox_lock_);
    inbox_.push_back(std::move(batch));
    wake_.notify_one();
  }

  std::unique_ptr<Batch> spare(int device, int64_t capacity) {
    std::lock_guard<std::mutex> lock(inbox_lock_);
    for (auto at = spares_.begin(); at != spares_.end(); ++at) {
      if ((*at)->device != device || (*at)->capacity < capacity) continue;
      std::unique_ptr<Batch> found = std::move(*at);
      spares_.erase(at);
      return found;
    }
    return nullptr;
  }

  // Returns when every step whose head had run by now has had its moves admitted.
  void settle() {
    std::unique_lock<std::mutex> lock(inbox_lock_);
    const uint64_t wanted = ++looks_wanted_;
    wake_.notify_one();
    looked_.wait(lock, [&] { return looks_done_ >= wanted || stopped_; });
  }

  uint64_t cpu_ns() const {
    timespec now;
    if (clock_ == CLOCK_MONOTONIC || clock_gettime(clock_, &now) != 0) return 0;
    return static_cast<uint64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(inbox_lock_);
      stopped_ = true;
      wake_.notify_one();
      looked_.notify_all();
    }
    if (worker_.joinable()) worker_.join();
  }

 private:
  void work() {
    bool relaxed = false;
    std::unique_lock<std::mutex> lock(inbox_lock_);
    while (!stopped_) {
      const uint64_t wanted = looks_wanted_;
      for (auto& batch : inbox_) arriving_.push_back(std::move(batch));
      inbox_.clear();
      lock.unlock();
      if (!relaxed && !arriving_.empty()) {
        cuda::relax_capture(arriving_.front()->device);
        relaxed = true;
      }
      std::vector<std::unique_ptr<Batch>> done;
      const bool all = admit(&done);
      bool under_way = !arriving_.empty();
      for (auto& entry : streams_) under_way |= advance(entry.second.get());
      lock.lock();
      for (auto& batch : done) spares_.push_back(std::move(batch));
      if (all && looks_done_ < wanted) {
        looks_done_ = wanted;
        looked_.notify_all();
      }
      if (stopped_ || !inbox_.empty() || looks_wanted_ > wanted) continue;
      if (under_way) {
        wake_.wait_for(lock, kLook);
      } else {
        wake_.wait(lock);
      }
    }
    lock.unlock();
    for (auto& entry : streams_) {
      MoveStreams& streams = *entry.second;
      streams.wait();
      for (int side = 0; side < 2; ++side) {
        finish_flights(&streams, side, true);
        for (const Item& item : streams.waiting[side]) end(item, MoveStatus::kCancelled, 0);
        streams.waiting[side].clear();
      }
    }
    // Steps whose head has run, but whose moves nobody will take up any more.
    lock.lock();
    for (auto& batch : inbox_) arriving_.push_back(std::move(batch));
    inbox_.clear();
    lock.unlock();
    for (auto& batch : arriving_) cancel(batch.get());
  }

  static void cancel(Batch* batch) {
    if (!batch->written()) return;
    const int64_t count = std::min<int64_t>(batch->words[0], batch->capacity);
    for (; batch->next < count; ++batch->next) {
      Move move;
      std::memcpy(&move, batch->words + cuda::kMovesAt + batch->next * (sizeof(Move) / 4),
                  sizeof(Move));
      if (results.taken(move.ticket)) continue;
      results.begin(move.ticket);
      results.finish(move.ticket, MoveStatus::kCancelled, 0);
    }
  }

  // Takes up the moves of steps whose head has run. False if some of these must wait.
  bool admit(std::vector<std::unique_ptr<Batch>>* done) {
    bool all = true;
    for (auto at = arriving_.begin(); at != arriving_.end();) {
      const bool written = (*at)->written();
      if (!written || !take_up(at->get())) {
        all &= !written;
        ++at;
        continue;
      }
      done->push_back(std::move(*at));
      at = arriving_.erase(at);
    }
    return all;
  }

  // False if the ticket of a move still belongs to an older move: again later.
  bool take_up(Batch* batch) {
    const int32_t* head = batch->words;
    const MovePages where{{head[1], static_cast<uint32_t>(head[2])}, batch->base, batch->pages,
                          batch->page_bytes, batch->spaces()};
    const int64_t count = std::min<int64_t>(head[0], batch->capacity);
    for (; batch->next < count; ++batch->next) {
      Move move;
      const int32_t* words = batch->words + cuda::kMovesAt + batch->next * (sizeof(Move) / 4);
      std::memcpy(&move, words, sizeof(Move));
      if (results.taken(move.ticket)) return false;
      results.begin(move.ticket);
      MoveUses uses;
      char* page = nullptr;
      const MoveStatus status = admit_move(move, where, &segments, &pools, &uses, &page);
      if (status != MoveStatus::kPending) {
        results.finish(move.ticket, status, 0);
        continue;
      }
      char* slot = segments.base(move.segment) + move.offset;
      const bool in = move.flags & kMoveIn;
      Item item{move,           uses, place_of(uses, batch->device), in ? slot : page,
                in ? page : slot, hold_until(move.ticket, 0)};
      streams(batch->device)->waiting[in].push_back(item);
    }
    return true;
  }

  MoveStreams* streams(int device) {
    std::unique_ptr<MoveStreams>& found = streams_[device];
    if (found == nullptr) found = std::make_unique<MoveStreams>(device);
    return found.get();
  }

  // Reports what has ended, issues what may begin; whether there is anything left.
  bool advance(MoveStreams* streams) {
    bool left = false;
    for (int side = 0; side < 2; ++side) {
      finish_flights(streams, side, false);
      std::deque<Item>& waiting = streams->waiting[side];
      while (!waiting.empty() && streams->room(side)) {
        std::vector<Item> group;
        const auto now = Clock::now();
        while (!waiting.empty() && waiting.front().not_before <= now &&
               streams->fits(group, waiting.front())) {
          const Item item = waiting.front();
          waiting.pop_front();
          if (item.uses.abandoned(segments)) {
            end(item, MoveStatus::kSegmentStale, 0);
          } else {
            group.push_back(item);
          }
        }
        if (group.empty()) break;
        if (!streams->issue(side, group)) {
          for (const Item& item : group) end(item, MoveStatus::kCancelled, 0);
        }
      }
      left |= !waiting.empty() || !streams->flying[side].empty();
    }
    return left;
  }

  void finish_flights(MoveStreams* streams, int side, bool all) {
    std::deque<Flight>& flying = streams->flying[side];
    while (!flying.empty()) {
      Flight& flight = flying.front();
      if (flight.landed == Clock::time_point::min()) {
        if (!all && !streams->landed(flight)) return;
        flight.landed = Clock::now();
        flight.report = hold_until(flight.items.front().move.ticket, 1);
      }
      if (!all && flight.report > Clock::now()) return;
      // Flights of one side overlap: what counts is how long the side was busy.
      const auto time = std::chrono::duration_cast<std::chrono::nanoseconds>(
          flight.landed - std::max(flight.started, streams->busy_until[side]));
      if (time.count() > 0) {
        move_state.busy_ns.fetch_add(time.count(), std::memory_order_relaxed);
      }
      streams->busy_until[side] = std::max(streams->busy_until[side], flight.landed);
      for (size_t i = 0; i < flight.items.size(); ++i) {
        const Item& item = flight.items[i];
        const uint64_t sum = item.move.flags & kMoveChecksum ? flight.sums[i] : 0;
        const bool compare = item.move.flags & kMoveChecksum && item.move.flags & kMoveIn;
        const bool wrong = compare && sum != item.move.checksum;
        const uint64_t bytes = uint64_t(item.move.bytes) * item.move.runs;
        auto& moved = side ? move_state.bytes_in : move_state.bytes_out;
        moved.fetch_add(bytes, std::memory_order_relaxed);
        end(item, flight.failed ? MoveStatus::kCancelled
                  : wrong       ? MoveStatus::kMismatch
                                : MoveStatus::kDone, sum);
      }
      streams->reuse(std::move(flight));
      flying.pop_front();
    }
  }

  static void end(const Item& item, MoveStatus status, uint64_t sum) {
    results.finish(item.move.ticket, status, sum);  // first: whoever retired the segment may ask
    item.uses.release(&segments, &pools);
  }

  std::mutex inbox_lock_;  // held only to move pointers around
  std::condition_variable wake_, looked_;
  std::deque<std::unique_ptr<Batch>> inbox_;
  std::vector<std::unique_ptr<Batch>> spares_;
  uint64_t looks_wanted_ = 0, looks_done_ = 0;
  bool stopped_ = false;
  // The worker's own.
  std::deque<std::unique_ptr<Batch>> arriving_;
  std::map<int, std::unique_ptr<MoveStreams>> streams_;
  clockid_t clock_;
  std::thread worker_;
};

// Never destroyed: steps may still hand over moves while static destructors run.
std::atomic<Queue*> current{nullptr};
std::mutex creating;

Queue* queue() {
  Queue* found = current.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  std::lock_guard<std::mutex> lock(creating);
  found = current.load(std::memory_order_acquire);
  if (found == nullptr) {
    std::atexit(stop_moves);
    // CUDA doesn't survive a fork: the child has moves no more.
    pthread_atfork(nullptr, nullptr, [] {
      move_state.stopped.store(true);
      current.store(nullptr);
      move_state.forget_parent();
    });
    found = new Queue;
    current.store(found, std::memory_order_release);
  }
  return found;
}

}  // namespace

Handle open_segment(void* base, uint64_t bytes) {
  void *address = nullptr, *pinned = nullptr;
  int home = cuda::kHostMemory;
  if (cuda::reach(default_device.load(), base, bytes, &address, &pinned, &home) != cudaSuccess) {
    return {-2, 0};
  }
  const Handle handle = segments.open(static_cast<char*>(address), bytes);
  if (handle.id < 0) {
    cuda::unpin(default_device.load(), pinned);
  } else {
    pinned_by_us[handle.id] = pinned;
    homes[handle.id] = home;
  }
  return handle;
}

bool retire_segment(Handle segment, bool abandon) {
  if (!segments.acquire(segment)) return false;
  void* pinned = pinned_by_us[segment.id];
  segments.release(segment.id);
  settle_queue();
  if (!segments.close(segment, abandon)) return false;
  cuda::unpin(default_device.load(), pinned);
  return true;
}

void settle_queue() {
  if (move_state.stopped.load()) return;
  if (Queue* found = current.load(std::memory_order_acquire)) found->settle();
}

void stop_queue() {
  if (Queue* found = current.load()) found->stop();
}

uint64_t queue_cpu_ns() {
  const Queue* found = current.load(std::memory_order_acquire);
  return found == nullptr ? 0 : found->cpu_ns();
}

namespace cuda {

cudaError_t hand_over(cudaStream_t stream, void* pool, int64_t pages, int64_t page_bytes,
                      const int32_t* head, const int32_t* moves, int64_t capacity,
                      const Spaces& spaces) {
  if (capacity <= 0 || move_state.stopped.load(std::memory_order_seq_cst)) return cudaSuccess;
  // XLA calls with the stream's context current.
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::unique_ptr<Batch> batch = queue()->spare(device, capacity);
  if (batch == nullptr) {
    batch = std::make_unique<Batch>(device, capacity);
    error = batch->allocate();
    if (error != cudaSuccess) return error;
  }
  batch->base = static_cast<char*>(pool);
  batch->pages = pages;
  batch->page_bytes = page_bytes;
  batch->next = 0;
  batch->num_spaces = spaces.count;
  error = hand_over_words(head, moves, static_cast<int32_t>(capacity * (sizeof(Move) / 4)), spaces,
                          batch->device_words, stream);
  if (error == cudaSuccess) error = cudaEventRecord(batch->event, stream);
  if (error == cudaSuccess) queue()->push(std::move(batch));
  return error;
}

}  // namespace cuda
}  // namespace aqua

// The device whose context segments are registered in, if no other is current: the engine's first.
extern "C" void aqua_moves_set_device(int32_t device) { aqua::default_device.store(device); }
