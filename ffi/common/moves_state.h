// What the copy queues of all platforms are made of, one of each in a library.
#pragma once

#include <atomic>
#include <cstdint>

#include "moves.h"
#include "moves_results.h"

namespace aqua {

struct MoveState {
  HandleTable segments, pools;
  MoveResults results;
  std::atomic<uint64_t> bytes_out{0}, bytes_in{0}, busy_ns{0};
  std::atomic<uint64_t> delay_seed{0};
  std::atomic<uint32_t> delay_max_us{0};
  std::atomic<bool> stopped{false};

  // In the child of a fork, which has none of its parent's threads: what its parent had in hand is
  // nobody's here.
  void forget_parent() {
    segments.forget_users();
    pools.forget_users();
    results.cancel_pending();
  }
};
extern MoveState move_state;

// What the platform adds (moves.cc of each). `settle_queue` returns when all moves of steps whose
// head has run are known to `results`; `stop_queue` ends the workers, once.
void settle_queue();
void stop_queue();
uint64_t queue_cpu_ns();

}  // namespace aqua
