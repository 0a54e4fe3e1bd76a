// The part of moves.h that is the same everywhere.

#include "moves_state.h"

#include <chrono>
#include <mutex>
#include <thread>

namespace aqua {

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

bool drain_moves(int64_t timeout_us) {
  using Clock = std::chrono::steady_clock;
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
