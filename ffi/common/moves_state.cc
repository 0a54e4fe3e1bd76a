// The part of moves.h that is the same everywhere.

#include "moves_state.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>

namespace aqua {

namespace {

using Clock = std::chrono::steady_clock;

// Between the first two looks at moves that a step runs beside, and wants the core: some pages'
// copying.
constexpr std::chrono::microseconds kNap{200};

}  // namespace

MoveState move_state;

bool hold_segment(Handle segment) { return move_state.segments.acquire(segment); }

void release_segment(Handle segment) { move_state.segments.release(segment.id); }

void* segment_address(Handle segment) {
  if (!hold_segment(segment)) return nullptr;
  void* const base = move_state.segments.base(segment.id);
  release_segment(segment);
  return base;
}

Handle open_pool() { return move_state.pools.open(nullptr, 0); }

bool close_pool(Handle pool) {
  settle_queue();
  return move_state.pools.close(pool, false);
}

void poll_moves(const uint64_t* tickets, int64_t count, int32_t* statuses, uint64_t* checksums) {
  move_state.results.poll(tickets, count, statuses, checksums);
}

uint64_t finished_moves() {
  return move_state.results.finished.load(std::memory_order_acquire);
}

bool wait_for_moves(const uint64_t* tickets, int64_t count, int64_t timeout_us) {
  const auto end = Clock::now() + std::chrono::microseconds(timeout_us);
  std::chrono::microseconds nap{kNap};
  int64_t ended = 0;
  for (;;) {
    int32_t status = 0;
    for (; ended < count; ++ended) {
      move_state.results.poll(tickets + ended, 1, &status, nullptr);
      if (status == static_cast<int32_t>(MoveStatus::kPending)) break;
    }
    const auto now = Clock::now();
    if (ended == count || now >= end) return ended == count;
    std::this_thread::sleep_for(std::min<Clock::duration>(nap, end - now));
    nap *= 2;  // so that looks stay few
  }
}

bool drain_moves(int64_t timeout_us) {
  const auto start = Clock::now();
  settle_queue();
  while (!move_state.results.all_ended()) {
    if (timeout_us >= 0 && Clock::now() - start > std::chrono::microseconds(timeout_us)) {
      return false;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

void stop_moves() {
  move_state.stopped.store(true, std::memory_order_seq_cst);
  static std::mutex once;
  std::lock_guard<std::mutex> lock(once);
  stop_queue();
}

void delay_moves(uint64_t seed, uint32_t max_us) {
  move_state.delay_seed.store(seed);
  move_state.delay_max_us.store(max_us);
}

MoveCounters move_counters() {
  const MoveState& s = move_state;
  return {s.results.handed_over.load(), s.results.finished.load(), s.results.failed.load(),
          s.bytes_out.load(),           s.bytes_in.load(),         s.busy_ns.load(),
          queue_cpu_ns()};
}

}  // namespace aqua
