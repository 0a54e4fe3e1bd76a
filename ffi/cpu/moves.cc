#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../common/moves_state.h"
#include "moves_copy.h"

namespace aqua {
namespace {

using Clock = std::chrono::steady_clock;

// Neighbours are copied as one up to this size: a status is at most this much late.
constexpr uint64_t kGroupBytes = 4 << 20;

HandleTable& segments = move_state.segments;
HandleTable& pools = move_state.pools;
MoveResults& results = move_state.results;

// ---- One move.

// A checked move.
struct Item {
  Move move;
  MoveUses uses;
  char* page;   // the page's first byte
  char* slot;   // where that byte would lie in the segment
  bool whole;   // a whole page without a checksum, which may be copied together with others

  char* from() const { return move.flags & kMoveIn ? slot : page; }
  char* to() const { return move.flags & kMoveIn ? page : slot; }
};

// Sleeps if delays are on; a number to go on drawing from, 0 if they are off.
uint64_t delay(uint64_t random) {
  const uint32_t most = move_state.delay_max_us.load(std::memory_order_relaxed);
  if (most == 0) return 0;
  random = mix_bits(random ^ move_state.delay_seed.load(std::memory_order_relaxed)) | 1;
  std::this_thread::sleep_for(std::chrono::microseconds(random % (uint64_t{most} + 1)));
  return random;
}

MoveStatus copy_item(const Item& item, uint64_t* checksum) {
  const Move& move = item.move;
  Checksum sum;
  for (int64_t run = 0; run < move.runs; ++run) {
    const int64_t at = move.begin + run * move.stride;
    if (move.flags & kMoveChecksum) {
      sum.copy(item.to() + at, item.from() + at, move.bytes);
    } else {
      stream_copy(item.to() + at, item.from() + at, move.bytes);
    }
  }
  *checksum = move.flags & kMoveChecksum ? sum.value() : 0;
  const bool verify = (move.flags & kMoveIn) && (move.flags & kMoveChecksum);
  return verify && *checksum != move.checksum ? MoveStatus::kMismatch : MoveStatus::kDone;
}

// Copies items that are neighbours at both ends (often just one), and releases them.
void carry_out(const std::vector<Item>& group) {
  const Item& first = group.front();
  const uint64_t random = delay(first.move.ticket);
  uint64_t checksum = 0, bytes = 0;
  MoveStatus status = MoveStatus::kDone;
  if (first.uses.abandoned(segments)) {
    status = MoveStatus::kSegmentStale;
  } else if (first.whole) {
    for (const Item& item : group) bytes += item.move.bytes;
    const uint64_t split = random == 0 ? 0 : random % bytes;
    stream_copy(first.to(), first.from(), split);
    if (split) delay(random);
    stream_copy(first.to() + split, first.from() + split, bytes - split);
  } else {
    bytes = static_cast<uint64_t>(first.move.bytes) * first.move.runs;
    status = copy_item(first, &checksum);
    delay(random);
  }
  auto& moved = first.move.flags & kMoveIn ? move_state.bytes_in : move_state.bytes_out;
  moved.fetch_add(bytes, std::memory_order_relaxed);
  for (const Item& item : group) {
    // First: whoever has retired the segment may ask.
    results.finish(item.move.ticket, status, checksum);
    item.uses.release(&segments, &pools);
  }
}

void cancel(const Item& item) {
  results.finish(item.move.ticket, MoveStatus::kCancelled, 0);
  item.uses.release(&segments, &pools);
}

// ---- The queue.

struct Job {
  std::vector<Item> items;
  size_t next = 0;
  Job* below = nullptr;
};

int setting(const char* name, int standard, int least, int most) {
  const char* text = std::getenv(name);
  return text == nullptr ? standard : std::clamp(std::atoi(text), least, most);
}

class Queue {
 public:
  explicit Queue(int threads) {
    sem_init(&work_, 0, 0);
    // Signals belong to the interpreter's threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 0; i < threads; ++i) {
      workers_.emplace_back([this] { work(); });
      pthread_setname_np(workers_.back().native_handle(), "aqua-copies");
      clockid_t clock;
      if (pthread_getcpuclockid(workers_.back().native_handle(), &clock) == 0) {
        clocks_.push_back(clock);
      }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Takes a job. Steps push onto a stack without a lock; a worker takes the whole stack.
  void push(Job* job) {
    const size_t wanted = std::min(job->items.size(), workers_.size());
    job->below = inbox_.load(std::memory_order_relaxed);
    while (!inbox_.compare_exchange_weak(job->below, job, std::memory_order_acq_rel)) {
    }
    for (size_t i = 0; i < wanted; ++i) sem_post(&work_);
    // A push that overlaps `stop` may come after the workers' last look.
    if (stopped_.load(std::memory_order_seq_cst)) cancel_rest();
  }

  // CPU time of the workers; 0 when they have ended.
  uint64_t cpu_ns() const {
    uint64_t sum = 0;
    for (const clockid_t clock : clocks_) {
      timespec now;
      if (clock_gettime(clock, &now) != 0) continue;
      sum += static_cast<uint64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
    }
    return sum;
  }

  void stop() {
    stopped_.store(true, std::memory_order_seq_cst);
    for (size_t i = 0; i < workers_.size(); ++i) sem_post(&work_);
    for (std::thread& worker : workers_) {
      if (worker.joinable()) worker.join();
    }
    cancel_rest();
  }

 private:
  void cancel_rest() {
    std::vector<Item> group;
    while (claim(&group)) {
      for (const Item& item : group) cancel(item);
    }
  }

  // The next items to be copied as one; false if there are none. Workers only share this lock
  // with each other.
  bool claim(std::vector<Item>* group) {
    std::lock_guard<std::mutex> lock(claim_);
    group->clear();
    if (jobs_.empty()) {
      // The stack is newest first, as `jobs_` is.
      for (Job* job = inbox_.exchange(nullptr, std::memory_order_acq_rel); job; job = job->below) {
        jobs_.emplace_back(job);
      }
      if (jobs_.empty()) return false;
    }
    Job& job = *jobs_.back();
    uint64_t bytes = 0;
    do {
      bytes += job.items[job.next].move.bytes;
      group->push_back(job.items[job.next++]);
    } while (job.next < job.items.size() && bytes < kGroupBytes &&
             follows(group->back(), job.items[job.next]));
    if (job.next == job.items.size()) jobs_.pop_back();
    return true;
  }

  static bool follows(const Item& a, const Item& b) {
    return a.whole && b.whole && a.move.flags == b.move.flags &&
           a.move.segment == b.move.segment && a.uses.space == b.uses.space &&
           a.page + a.move.bytes == b.page && a.slot + a.move.bytes == b.slot;
  }

  void work() {
    // One thread's niceness, as Linux has it; failing is no harm. At 5 a copy still gets a quarter
    // of a core that a step wants: 12 MiB done within the step they ride on. At 19 (a sixtieth)
    // some took two.
    const auto thread = static_cast<id_t>(syscall(SYS_gettid));
    const int inherited = getpriority(PRIO_PROCESS, thread);
    setpriority(PRIO_PROCESS, thread, inherited + setting("AQUA_COPY_NICE", 5, 0, 19));
    std::vector<Item> group;
    for (;;) {
      if (stopped_.load(std::memory_order_seq_cst)) return;
      if (!claim(&group)) {
        while (sem_wait(&work_) != 0) {
        }
        continue;
      }
      const auto start = Clock::now();
      carry_out(group);
      move_state.busy_ns.fetch_add(
          std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count(),
          std::memory_order_relaxed);
    }
  }

  std::atomic<Job*> inbox_{nullptr};
  std::atomic<bool> stopped_{false};
  std::mutex claim_;
  std::vector<std::unique_ptr<Job>> jobs_;  // newest first
  sem_t work_;
  std::vector<std::thread> workers_;
  std::vector<clockid_t> clocks_;
};

// Never destroyed: steps may still hand over moves while static destructors run.
std::atomic<Queue*> current_queue{nullptr};
std::atomic<Queue*> parents_queue{nullptr};  // stays reachable, so that it counts as no leak
std::atomic_flag creating = ATOMIC_FLAG_INIT;

void forget_queue_in_child() {
  // It starts threads of its own on first use.
  parents_queue.store(current_queue.exchange(nullptr));
  creating.clear();
  move_state.forget_parent();
}

Queue* queue() {
  Queue* found = current_queue.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  while (creating.test_and_set(std::memory_order_acquire)) sched_yield();
  found = current_queue.load(std::memory_order_acquire);
  if (found == nullptr) {
    static std::once_flag hooks;
    std::call_once(hooks, [] {
      pthread_atfork(nullptr, nullptr, forget_queue_in_child);
      std::atexit(stop_moves);
    });
    found = new Queue(setting("AQUA_COPY_THREADS", 1, 1, 16));
    current_queue.store(found, std::memory_order_release);
  }
  creating.clear(std::memory_order_release);
  return found;
}

// ---- Handing over.

// Checks a move and becomes a user of what it needs.
MoveStatus admit(const Move& move, const MovePages& where, Item* item) {
  const MoveStatus status =
      admit_move(move, where, &segments, &pools, &item->uses, &item->page);
  if (status != MoveStatus::kPending) return status;
  item->move = move;
  item->slot = segments.base(move.segment) + move.offset;
  item->whole =
      move.runs == 1 && move.bytes == where.page_bytes && !(move.flags & kMoveChecksum);
  return status;
}

}  // namespace

Handle open_segment(void* base, uint64_t bytes) {
  return segments.open(static_cast<char*>(base), bytes);
}

bool retire_segment(Handle segment, bool abandon) { return segments.close(segment, abandon); }

void enqueue_moves(Handle pool, void* base, int64_t pages, int64_t page_bytes, const void* moves,
                   int64_t count, const Spaces& spaces) {
  if (count <= 0) return;
  const MovePages where{pool, static_cast<char*>(base), pages, page_bytes, spaces};
  auto job = std::make_unique<Job>();
  job->items.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    Move move;
    std::memcpy(&move, static_cast<const char*>(moves) + i * sizeof(Move), sizeof(Move));
    while (results.taken(move.ticket)) {
      // A lap of all tickets ahead of the workers, who may need what this job already holds.
      if (!job->items.empty()) {
        queue()->push(job.release());
        job = std::make_unique<Job>();
      }
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    results.begin(move.ticket);
    Item item;
    const MoveStatus status =
        move_state.stopped.load(std::memory_order_seq_cst)
            ? MoveStatus::kCancelled
            : admit(move, where, &item);
    if (status == MoveStatus::kPending) {
      job->items.push_back(item);
    } else {
      results.finish(move.ticket, status, 0);
    }
  }
  if (!job->items.empty()) queue()->push(job.release());
}

void settle_queue() {}  // a head that has run has had its moves admitted

void stop_queue() {
  // The queue stays reachable through current_queue: steps that come later find it stopped.
  if (Queue* found = current_queue.load()) found->stop();
}

uint64_t queue_cpu_ns() {
  const Queue* found = current_queue.load(std::memory_order_acquire);
  return found == nullptr ? 0 : found->cpu_ns();
}

}  // namespace aqua
