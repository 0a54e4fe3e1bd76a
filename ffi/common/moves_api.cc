// The C face of moves.h, for ctypes. Calls that may wait must be made without the GIL.

#include "moves.h"

extern "C" {

// id and generation as id | generation << 32; -1 when there is no entry left, -2 when the device
// can't reach the memory.
int64_t aqua_segment_register(void* base, uint64_t bytes) {
  const aqua::Handle handle = aqua::open_segment(base, bytes);
  return handle.id < 0 ? handle.id : int64_t{handle.generation} << 32 | handle.id;
}

// 1, or 0 if the handle is stale.
int32_t aqua_segment_retire(int32_t id, uint32_t generation, int32_t abandon) {
  return aqua::retire_segment({id, generation}, abandon != 0);
}

// Where copies and kernels find it; 0 if the handle is stale.
uint64_t aqua_segment_address(int32_t id, uint32_t generation) {
  return reinterpret_cast<uintptr_t>(aqua::segment_address({id, generation}));
}

int64_t aqua_pool_register() {
  const aqua::Handle handle = aqua::open_pool();
  return handle.id < 0 ? -1 : int64_t{handle.generation} << 32 | handle.id;
}

int32_t aqua_pool_close(int32_t id, uint32_t generation) {
  return aqua::close_pool({id, generation});
}

void aqua_moves_poll(const uint64_t* tickets, int64_t count, int32_t* statuses,
                     uint64_t* checksums) {
  aqua::poll_moves(tickets, count, statuses, checksums);
}

uint64_t aqua_moves_finished() { return aqua::finished_moves(); }

// 1 when none of them is pending, 0 after timeout_us.
int32_t aqua_moves_wait(const uint64_t* tickets, int64_t count, int64_t timeout_us) {
  return aqua::wait_for_moves(tickets, count, timeout_us);
}

// 1 when nothing is unfinished, 0 after timeout_us (< 0: none).
int32_t aqua_moves_drain(int64_t timeout_us) { return aqua::drain_moves(timeout_us); }

void aqua_moves_stop() { aqua::stop_moves(); }

void aqua_moves_set_delay(uint64_t seed, uint32_t max_us) { aqua::delay_moves(seed, max_us); }

// In the order of MoveCounters; 7 numbers.
void aqua_moves_counters(uint64_t* out) {
  const aqua::MoveCounters now = aqua::move_counters();
  const uint64_t numbers[] = {now.handed_over, now.finished, now.failed, now.bytes_out,
                              now.bytes_in,    now.busy_ns,  now.cpu_ns};
  for (const uint64_t number : numbers) *out++ = number;
}

}  // extern "C"
