// What the copy queues of all platforms share: results by ticket, and the checks of a move.
#pragma once

#include <atomic>
#include <cstdint>

#include "moves.h"

namespace aqua {

// Results of the newest kResults tickets. One writer of a ticket at a time: who hands the move over
// until it is queued, then who carries it out. Polling takes no lock.
class MoveResults {
 public:
  std::atomic<uint64_t> handed_over{0}, finished{0}, failed{0};

  // Whether the ticket's place is still taken by a move that has not ended, a lap ago.
  bool taken(uint64_t ticket) const {
    return pending(at(ticket).tag.load(std::memory_order_acquire));
  }

  void begin(uint64_t ticket) {
    at(ticket).tag.store(tag_of(ticket, MoveStatus::kPending), std::memory_order_release);
    handed_over.fetch_add(1, std::memory_order_relaxed);
  }

  void finish(uint64_t ticket, MoveStatus status, uint64_t checksum) {
    Result& result = at(ticket);
    result.checksum.store(checksum, std::memory_order_release);
    result.tag.store(tag_of(ticket, status), std::memory_order_release);
    if (status != MoveStatus::kDone) failed.fetch_add(1, std::memory_order_relaxed);
    finished.fetch_add(1, std::memory_order_release);
  }

  void poll(const uint64_t* tickets, int64_t count, int32_t* statuses, uint64_t* checksums) const {
    for (int64_t i = 0; i < count; ++i) {
      const Result& result = at(tickets[i]);
      uint64_t tag = result.tag.load(std::memory_order_acquire), checksum, before;
      do {
        before = tag;
        checksum = result.checksum.load(std::memory_order_acquire);
        tag = result.tag.load(std::memory_order_acquire);
      } while (tag != before);
      const uint64_t ticket = tag >> 8;
      MoveStatus status = MoveStatus::kPending;
      if (ticket == tickets[i]) status = static_cast<MoveStatus>(tag & 255);
      if (ticket > tickets[i]) status = MoveStatus::kForgotten;
      statuses[i] = static_cast<int32_t>(status);
      const bool computed = status == MoveStatus::kDone || status == MoveStatus::kMismatch;
      if (checksums != nullptr) checksums[i] = computed ? checksum : 0;
    }
  }

  // Whether everything that was handed over has ended.
  bool all_ended() const {
    // `finished` first: read the other way round, a move that comes between would count as missing.
    const uint64_t ended = finished.load(std::memory_order_acquire);
    return ended == handed_over.load(std::memory_order_acquire);
  }

  // In the child of a fork: what its parent had in hand is nobody's here.
  void cancel_pending() {
    for (Result& result : results_) {
      const uint64_t tag = result.tag.load();
      if (pending(tag)) result.tag.store(tag | static_cast<uint64_t>(MoveStatus::kCancelled));
    }
    finished.store(handed_over.load());
  }

 private:
  struct Result {
    std::atomic<uint64_t> tag{0};  // ticket << 8 | status
    std::atomic<uint64_t> checksum{0};
  };

  static uint64_t tag_of(uint64_t ticket, MoveStatus status) {
    return ticket << 8 | static_cast<uint64_t>(status);
  }
  static bool pending(uint64_t tag) {
    return tag != 0 && (tag & 255) == static_cast<uint64_t>(MoveStatus::kPending);
  }
  Result& at(uint64_t ticket) { return results_[ticket % kResults]; }
  const Result& at(uint64_t ticket) const { return results_[ticket % kResults]; }

  Result results_[kResults];
};

// Where in its page a move ends; 0 if its range makes no sense.
inline uint64_t end_in_page(const Move& move) {
  if (move.begin < 0 || move.bytes <= 0 || move.runs <= 0) return 0;
  if (move.runs > 1 && move.stride < move.bytes) return 0;
  const uint64_t last = move.runs > 1 ? uint64_t(move.runs - 1) * move.stride : 0;
  return last + move.begin + move.bytes;
}

// Where a step's moves have their pages.
struct MovePages {
  Handle pool;
  char* base;
  int64_t pages, page_bytes;
  Spaces spaces;
};

// What a checked move uses until it has ended.
struct MoveUses {
  int32_t segment, pool;
  int32_t space;  // the segment that its page is in; -1: the pool

  // Whether one of the segments is about to go, and nobody wants the copy any more.
  bool abandoned(const HandleTable& segments) const {
    return segments.abandoned(segment) || (space >= 0 && segments.abandoned(space));
  }
  void release(HandleTable* segments, HandleTable* pools) const {
    segments->release(segment);
    if (space >= 0) segments->release(space);
    pools->release(pool);
  }
};

// Checks a move; kPending if it may be carried out, and then it is a user of its segment, of its
// pool and of the space that its page is in, which begins at `page`.
inline MoveStatus admit_move(const Move& move, const MovePages& where, HandleTable* segments,
                             HandleTable* pools, MoveUses* uses, char** page) {
  const uint64_t end = end_in_page(move);
  const Space* space = move.page < where.pages ? nullptr : where.spaces.find(move.page);
  if (move.page < 0 || (move.page >= where.pages && space == nullptr) || end == 0 ||
      end > uint64_t(where.page_bytes)) {
    return MoveStatus::kOutOfBounds;
  }
  const Handle segment{move.segment, move.generation};
  if (!segments->acquire(segment)) return MoveStatus::kSegmentStale;
  *uses = {move.segment, where.pool.id, -1};
  if (space == nullptr) {
    *page = where.base + move.page * where.page_bytes;
  } else {
    if (!segments->acquire({space->segment, space->generation})) {
      segments->release(segment.id);
      return MoveStatus::kSegmentStale;
    }
    uses->space = space->segment;
    *page = space->at(move.page, where.page_bytes);
  }
  const uint64_t size = segments->bytes(segment.id);
  MoveStatus status = MoveStatus::kPending;
  if (end > size || move.offset > size - end) {
    status = MoveStatus::kOutOfBounds;
  } else if (!pools->acquire(where.pool)) {
    status = MoveStatus::kPoolStale;
  } else if (!pools->bind(where.pool.id, where.base)) {
    pools->release(where.pool.id);
    status = MoveStatus::kPoolStale;
  }
  if (status != MoveStatus::kPending) {
    segments->release(segment.id);
    if (uses->space >= 0) segments->release(uses->space);
  }
  return status;
}

// A random number from another one, for injected delays.
inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ x >> 31) * 0x9E3779B97F4A7C15;
  return x ^ x >> 29;
}

}  // namespace aqua
