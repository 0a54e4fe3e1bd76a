// Moves of KV pages between the pool and segments of other memory, beside the running step.
//
// A step's program hands a list of moves to `enqueue_moves` at its head; worker threads carry them
// out while the step runs, and the host asks `poll_moves` by ticket. What can go wrong at run time
// is a status of one move, never an error of the program: an error would cost the donated pool.
//
// Nothing here takes a lock that a worker may hold: workers run at low priority, and one that is
// preempted inside a lock would hold up the step.
#pragma once

#include <cstdint>

#include "moves_handles.h"
#include "spaces.h"

namespace aqua {

// What has become of a move. The numbers are part of the interface (aqua_jax/ops/moves.py).
enum class MoveStatus : int32_t {
  kPending = 0,        // not handed over yet, waiting, or being copied
  kDone = 1,
  kSegmentStale = 2,   // the segment, or the space that the page is in, was retired
  kOutOfBounds = 3,    // pool page, range in the page, or range in the segment
  kMismatch = 4,       // copied in, but the checksum is not the expected one
  kPoolStale = 5,      // the pool was closed, or has another address than before
  kCancelled = 6,      // the process is ending, or has forked
  kForgotten = 7,      // kResults newer tickets have been handed over since
};

// Flags of a move.
constexpr int32_t kMoveIn = 1;        // segment -> pool; otherwise pool -> segment
constexpr int32_t kMoveChecksum = 2;  // out: compute the checksum; in: compare with `checksum`

// How many of the newest tickets keep their result.
constexpr uint64_t kResults = 1 << 16;

// One move: `runs` pieces of `bytes` bytes, `stride` apart, the first at `begin` in the page. The
// segment holds them where they would lie if the page's first byte were at `offset`. One piece of
// the whole page is a plain copy; several are the same tokens of each layer of a partial page.
struct Move {
  int32_t flags;
  int32_t page;         // of the pool, or of a space behind it
  int32_t segment;      // Handle::id
  uint32_t generation;  // Handle::generation
  uint64_t offset;
  int32_t begin;
  int32_t bytes;   // > 0
  int32_t runs;    // > 0
  int32_t stride;  // >= bytes, where there is more than one run
  uint64_t ticket;    // > 0 and below 2^56, unique
  uint64_t checksum;  // expected, for kMoveIn | kMoveChecksum
};
static_assert(sizeof(Move) == 56, "the layout is aqua_jax/ops/moves.py's MOVE");

// Registers memory that pages move to and from, which must stay mapped until `retire_segment` has
// returned. The id is -1 if there are kHandles segments already, -2 if the device can't reach it.
Handle open_segment(void* base, uint64_t bytes);

// Refuses new moves, waits until those that were handed over have ended, and lets the generation
// pass. `abandon`: those not begun come back as kSegmentStale instead of being carried out. False,
// at once, if the handle is stale already.
bool retire_segment(Handle segment, bool abandon);

// For steps that compute with pages in a segment: become, and cease to be, a user of it, whom
// `retire_segment` waits for. `hold_segment` says whether the handle is live.
bool hold_segment(Handle segment);
void release_segment(Handle segment);

// The address of a segment as copies and kernels see it; null if the handle is stale.
void* segment_address(Handle segment);

// Registers a pool; its address is that of its first `enqueue_moves`.
Handle open_pool();

// Waits until the pool's moves have ended and forgets it. False if the handle is stale.
bool close_pool(Handle pool);

// Hands `count` moves (Move, not necessarily aligned) to the workers and returns. `base` is the
// pool, of `pages` times `page_bytes`, with `spaces` behind it. No order is promised among moves.
// Blocks only when kResults moves are unfinished.
void enqueue_moves(Handle pool, void* base, int64_t pages, int64_t page_bytes, const void* moves,
                   int64_t count, const Spaces& spaces = {});

// Writes the status of each ticket, and for finished moves with kMoveChecksum the checksum computed
// (0 otherwise); `checksums` may be null. Never blocks.
void poll_moves(const uint64_t* tickets, int64_t count, int32_t* statuses, uint64_t* checksums);

// How many moves have ended since the process began. As long as this is the same, `poll_moves` has
// nothing new to say.
uint64_t finished_moves();

// Waits until none of these is pending, at most `timeout_us`; says whether that is so.
bool wait_for_moves(const uint64_t* tickets, int64_t count, int64_t timeout_us);

// Waits until no move that was handed over is unfinished, at most `timeout_us` (< 0: for ever).
// Says whether that is so.
bool drain_moves(int64_t timeout_us);

// Ends the workers; a copy that has begun ends first, all other moves are kCancelled, now and
// later. Runs by itself at exit, but buffers may be gone by then: call it before. Idempotent.
void stop_moves();

// For race checkers: before every move, and once in the middle of it, sleeps for a time between 0
// and max_us that depends on seed and ticket. 0 turns it off.
void delay_moves(uint64_t seed, uint32_t max_us);

// Sums over the life of the process.
struct MoveCounters {
  uint64_t handed_over, finished, failed, bytes_out, bytes_in;
  uint64_t busy_ns;  // time the workers spent in copies, delays and preemption included
  uint64_t cpu_ns;   // CPU time of the workers there are
};
MoveCounters move_counters();

}  // namespace aqua
