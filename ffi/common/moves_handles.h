// Tables of memory that may go away: ids with generations, and counts of who is using them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace aqua {

// Names an entry of a HandleTable during one life of it.
struct Handle {
  int32_t id;  // negative: none
  uint32_t generation;
};

constexpr int32_t kHandles = 4096;

// Entries are opened and closed by the host and used by steps and workers, without locks.
// One word per entry holds the generation, three flags, and how many users there are.
class HandleTable {
 public:
  // Takes a free entry; id -1 if there is none.
  Handle open(char* base, uint64_t bytes) {
    for (int32_t id = 0; id < kHandles; ++id) {
      Entry& entry = entries_[id];
      uint64_t state = entry.state.load(std::memory_order_acquire);
      if (!(state & kFree)) continue;
      const uint64_t next = (state >> 32) + 1;
      if (!entry.state.compare_exchange_strong(state, next << 32 | kClosing)) continue;
      entry.base.store(base, std::memory_order_relaxed);
      entry.bytes.store(bytes, std::memory_order_relaxed);
      entry.state.store(next << 32, std::memory_order_release);
      return {id, static_cast<uint32_t>(next)};
    }
    return {-1, 0};
  }

  // Becomes a user of an entry that is open in this generation; every `acquire` that succeeded
  // needs a `release`.
  bool acquire(Handle handle) {
    if (handle.id < 0 || handle.id >= kHandles) return false;
    std::atomic<uint64_t>& word = entries_[handle.id].state;
    uint64_t state = word.load(std::memory_order_acquire);
    do {
      if (state >> 32 != handle.generation || state & (kFree | kClosing)) return false;
    } while (!word.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel));
    return true;
  }

  void release(int32_t id) { entries_[id].state.fetch_sub(1, std::memory_order_acq_rel); }

  // For users: whether the one who closes the entry wants work that hasn't begun dropped.
  bool abandoned(int32_t id) const {
    return entries_[id].state.load(std::memory_order_relaxed) & kAbandoned;
  }

  char* base(int32_t id) const { return entries_[id].base.load(std::memory_order_acquire); }
  uint64_t bytes(int32_t id) const { return entries_[id].bytes.load(std::memory_order_acquire); }

  // For users: makes `base` the entry's address if it has none; says whether it is its address.
  bool bind(int32_t id, char* base) {
    char* expected = nullptr;
    return entries_[id].base.compare_exchange_strong(expected, base) || expected == base;
  }

  // Refuses new users, waits for those there are, ends the generation. False if it has ended.
  bool close(Handle handle, bool abandon) {
    if (handle.id < 0 || handle.id >= kHandles) return false;
    std::atomic<uint64_t>& word = entries_[handle.id].state;
    uint64_t state = word.load(std::memory_order_acquire);
    do {
      if (state >> 32 != handle.generation || state & (kFree | kClosing)) return false;
    } while (!word.compare_exchange_weak(state, state | kClosing | (abandon ? kAbandoned : 0)));
    while (word.load(std::memory_order_acquire) & kUsers) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    word.store(uint64_t{handle.generation} << 32 | kFree, std::memory_order_release);
    return true;
  }

  // In the child of a fork, where the users' threads don't exist.
  void forget_users() {
    for (Entry& entry : entries_) {
      const uint64_t state = entry.state.load();
      if (state & (kUsers | kClosing)) {
        entry.state.store((state & kClosing) ? (state >> 32 << 32 | kFree) : state & ~kUsers);
      }
    }
  }

 private:
  static constexpr uint64_t kFree = 1u << 31, kClosing = 1 << 30, kAbandoned = 1 << 29,
                            kUsers = kAbandoned - 1;
  struct Entry {
    std::atomic<uint64_t> state{kFree};
    std::atomic<char*> base{nullptr};
    std::atomic<uint64_t> bytes{0};
  };
  Entry entries_[kHandles];
};

}  // namespace aqua
