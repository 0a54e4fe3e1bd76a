// The copy queue without JAX: threads that play steps, against a mirror of what must happen.
//
// It is also clean under the thread sanitizer, in this folder:
//   g++ -std=c++17 -O1 -g -fsanitize=thread -pthread moves_test.cc ../cpu/moves.cc
//     ../cpu/moves_copy.cc ../common/moves_state.cc -o /tmp/moves_test && AQUA_COPY_THREADS=3 /tmp/moves_test

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../common/moves.h"
#include "../cpu/moves_copy.h"

namespace {

using aqua::Handle;
using aqua::Move;
using aqua::MoveStatus;
using Bytes = std::vector<char>;

int failures = 0;
uint64_t next_ticket = 1;

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

Bytes noise(size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  Bytes result(bytes);
  for (char& x : result) x = static_cast<char>(random());
  return result;
}

MoveStatus status_of(uint64_t ticket, uint64_t* checksum = nullptr) {
  int32_t status;
  uint64_t sum;
  aqua::poll_moves(&ticket, 1, &status, &sum);
  if (checksum != nullptr) *checksum = sum;
  return static_cast<MoveStatus>(status);
}

Move whole(int32_t flags, int32_t page, Handle segment, uint64_t offset, int32_t bytes) {
  return {flags, page, segment.id, segment.generation, offset, 0, bytes, 1, 0, next_ticket++, 0};
}

// The definition in moves_copy.h, word by word.
uint64_t checksum_of(const Bytes& data) {
  const uint64_t prime = 0x9E3779B97F4A7C15;
  const auto rotl = [](uint64_t x, int r) { return r ? x << r | x >> (64 - r) : x; };
  uint64_t lanes[8];
  for (int i = 0; i < 8; ++i) lanes[i] = rotl(prime, 8 * i);
  for (size_t at = 0; at < data.size(); at += 64) {
    for (size_t i = 0; i < 8; ++i) {
      uint64_t word = 0;
      for (size_t j = 0; j < 8; ++j) {
        const size_t k = at + i * 8 + j;
        if (k < data.size()) word |= uint64_t(static_cast<unsigned char>(data[k])) << 8 * j;
      }
      lanes[i] = rotl(lanes[i] ^ word, 27) * prime;
    }
  }
  uint64_t h = data.size();
  for (const uint64_t lane : lanes) {
    h = (h ^ lane) * prime;
    h ^= h >> 32;
  }
  return h;
}

void copies() {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const size_t bytes = seed < 100 ? seed : random() % 70000;
    const size_t from = random() % 70, to = random() % 2 ? random() % 70 : 0;
    const Bytes source = noise(from + bytes, seed);
    Bytes plain(to + bytes + 1, 'x'), summed(to + bytes + 1, 'x');
    aqua::stream_copy(&plain[to], source.data() + from, bytes);
    aqua::Checksum sum;
    sum.copy(&summed[to], source.data() + from, bytes);
    const Bytes copied(source.begin() + from, source.end());
    check(Bytes(plain.begin() + to, plain.end() - 1) == copied, "plain copy");
    check(Bytes(summed.begin() + to, summed.end() - 1) == copied, "copy with checksum");
    check(plain.back() == 'x' && summed.back() == 'x', "nothing past the end");
    check(sum.value() == checksum_of(copied), "checksum as defined");
    if (bytes > 0) {
      Bytes broken = copied;
      broken[random() % bytes] ^= static_cast<char>(1 << random() % 8);
      aqua::Checksum other;
      other.copy(&summed[to], broken.data(), bytes);
      check(other.value() != sum.value(), "a flipped bit shows");
    }
  }
}

// Random pages out and back in while the "step" rewrites pages that no move names.
void exact() {
  const int64_t pages = 24, bytes = 20000;
  Bytes pool = noise(pages * bytes, 1), memory(pages * bytes);
  const Handle segment = aqua::open_segment(memory.data(), memory.size());
  const Handle owner = aqua::open_pool();
  std::mt19937 random(2);
  Bytes mirror = pool;
  for (int step = 0; step < 60; ++step) {
    aqua::delay_moves(step, step % 3 == 0 ? 300 : 0);
    std::vector<int32_t> order(pages);
    for (int32_t i = 0; i < pages; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    if (step % 2) std::sort(order.begin(), order.begin() + 8);  // neighbours become one copy
    std::vector<Move> out, in;
    for (int i = 0; i < 8; ++i) {
      const int32_t flags = random() % 2 ? aqua::kMoveChecksum : 0;
      out.push_back(whole(flags, order[i], segment, order[i] * bytes, bytes));
    }
    Move& part = out.back();
    part.begin = 100, part.bytes = 40, part.runs = 50, part.stride = 390;
    aqua::enqueue_moves(owner, pool.data(), pages, bytes, out.data(), out.size());
    for (int i = 8; i < 16; ++i) {  // what a step does meanwhile
      std::memset(&pool[order[i] * bytes], step, bytes);
      std::memset(&mirror[order[i] * bytes], step, bytes);
    }
    check(aqua::drain_moves(-1), "drained");
    for (int i = 0; i < 8; ++i) {
      const Move& move = out[i];
      uint64_t sum;
      check(status_of(move.ticket, &sum) == MoveStatus::kDone, "out is done");
      for (int32_t run = 0; run < move.runs; ++run) {
        const int64_t at = order[i] * bytes + move.begin + run * move.stride;
        check(!std::memcmp(&memory[at], &mirror[at], move.bytes), "out is exact");
      }
      Move back = move;
      back.flags |= aqua::kMoveIn, back.ticket = next_ticket++, back.checksum = sum;
      in.push_back(back);
      for (int32_t run = 0; run < move.runs; ++run) {
        std::memset(&pool[order[i] * bytes + move.begin + run * move.stride], 0, move.bytes);
      }
    }
    aqua::enqueue_moves(owner, pool.data(), pages, bytes, in.data(), in.size());
    check(aqua::drain_moves(-1), "drained");
    for (const Move& move : in) check(status_of(move.ticket) == MoveStatus::kDone, "in is done");
    check(pool == mirror, "in is exact");
  }
  aqua::delay_moves(0, 0);
  check(aqua::close_pool(owner) && !aqua::close_pool(owner), "a pool closes once");
  check(aqua::retire_segment(segment, false), "retired");
}

void statuses() {
  const int64_t pages = 4, bytes = 4096;
  Bytes pool = noise(pages * bytes, 3), memory(2 * bytes, 0), other(pages * bytes);
  const Bytes before = pool;
  const Handle segment = aqua::open_segment(memory.data(), memory.size());
  const Handle owner = aqua::open_pool();
  const auto run = [&](Move move, Handle pool_handle, void* base) {
    aqua::enqueue_moves(pool_handle, base, pages, bytes, &move, 1);
    check(aqua::drain_moves(-1), "drained");
    return status_of(move.ticket);
  };
  const Move good = whole(aqua::kMoveChecksum, 1, segment, bytes, bytes);
  check(run(good, owner, pool.data()) == MoveStatus::kDone, "good");

  std::vector<Move> bad(13, whole(aqua::kMoveIn, 1, segment, 0, bytes));
  bad[0].page = -1, bad[1].page = 4, bad[2].offset = bytes + 1, bad[3].offset = ~uint64_t{0};
  bad[4].begin = 1, bad[5].begin = -1, bad[6].bytes = 0, bad[7].bytes = -4096;
  bad[8].runs = 0, bad[9].runs = 2, bad[9].bytes = 1000, bad[9].stride = 999;
  bad[10].runs = 5, bad[10].bytes = 1000, bad[10].stride = 1000;
  bad[11].runs = 0x7FFFFFFF, bad[11].bytes = 0x7FFFFFFF, bad[11].stride = 0x7FFFFFFF;
  bad[12].offset = ~uint64_t{0} - bytes + 1;
  for (Move& move : bad) {
    move.ticket = next_ticket++;
    check(run(move, owner, pool.data()) == MoveStatus::kOutOfBounds, "out of bounds");
  }
  for (Handle stranger : {Handle{segment.id, segment.generation + 1}, Handle{-1, 0},
                          Handle{aqua::kHandles, 1}, Handle{segment.id + 1, 0}}) {
    Move move = whole(aqua::kMoveIn, 1, stranger, 0, bytes);
    check(run(move, owner, pool.data()) == MoveStatus::kSegmentStale, "stranger");
  }
  Move wrong = whole(aqua::kMoveIn | aqua::kMoveChecksum, 1, segment, bytes, bytes);
  uint64_t sum;
  status_of(good.ticket, &sum);
  wrong.checksum = sum;
  check(run(wrong, owner, pool.data()) == MoveStatus::kDone && pool == before, "checksum agrees");
  memory[bytes + 77] ^= 1;
  wrong.ticket = next_ticket++;
  check(run(wrong, owner, pool.data()) == MoveStatus::kMismatch, "checksum differs");

  check(run(whole(0, 0, segment, 0, bytes), owner, other.data()) == MoveStatus::kPoolStale,
        "the pool has moved");
  check(aqua::close_pool(owner), "closed");
  check(run(whole(0, 0, segment, 0, bytes), owner, pool.data()) == MoveStatus::kPoolStale,
        "the pool is closed");
  check(status_of(next_ticket + 5) == MoveStatus::kPending, "a ticket nobody has used");
  check(aqua::retire_segment(segment, false), "retired");
  check(!aqua::retire_segment(segment, false), "retired once");
  const Handle again = aqua::open_segment(memory.data(), memory.size());
  check(again.id == segment.id && again.generation == segment.generation + 1, "next generation");
  check(aqua::retire_segment(again, false), "retired");
}

// Retiring waits for what is queued, or drops it; either way nobody touches the memory afterwards.
void retire_in_flight() {
  const int64_t pages = 40, bytes = 4096;
  Bytes pool = noise(pages * bytes, 4);
  const Handle owner = aqua::open_pool();
  for (const bool abandon : {false, true}) {
    auto* memory = new Bytes(pages * bytes);
    const Handle segment = aqua::open_segment(memory->data(), memory->size());
    aqua::delay_moves(5, 2000);
    std::vector<Move> moves;
    for (int32_t i = 0; i < pages; ++i) {
      moves.push_back(whole(0, i, segment, (pages - 1 - i) * bytes, bytes));
    }
    aqua::enqueue_moves(owner, pool.data(), pages, bytes, moves.data(), moves.size());
    check(status_of(moves.back().ticket) == MoveStatus::kPending, "still on its way");
    check(aqua::retire_segment(segment, abandon), "retired");
    delete memory;  // the sanitizer sees a copy that comes late
    int done = 0;
    check(aqua::drain_moves(-1), "drained");
    for (const Move& move : moves) done += status_of(move.ticket) == MoveStatus::kDone;
    check(abandon ? done < pages : done == pages, "carried out, unless abandoned");
  }
  aqua::delay_moves(0, 0);
  check(aqua::close_pool(owner), "closed");
}

// Pages in a space: copied like the pool's, and their memory is in use until they are.
void spaces() {
  const int64_t pages = 3, bytes = 4096;
  Bytes pool = noise(pages * bytes, 6), memory(4 * bytes);
  auto* behind = new Bytes(noise(2 * bytes, 7));
  const Bytes before = *behind;
  const Handle owner = aqua::open_pool();
  const Handle segment = aqua::open_segment(memory.data(), memory.size());
  const Handle own = aqua::open_segment(behind->data(), behind->size());
  check(aqua::segment_address(own) == behind->data(), "address");
  const auto address = reinterpret_cast<uintptr_t>(behind->data());
  const aqua::Space row{pages, 2, static_cast<uint32_t>(address),
                        static_cast<uint32_t>(address >> 32), own.id, own.generation, {}};
  const auto hand_over = [&](const std::vector<Move>& moves) {
    aqua::enqueue_moves(owner, pool.data(), pages, bytes, moves.data(), moves.size(), {&row, 1});
  };
  aqua::delay_moves(5, 2000);
  std::vector<Move> moves = {whole(0, 3, segment, 0, bytes), whole(0, 4, segment, bytes, bytes),
                             whole(0, 1, segment, 2 * bytes, bytes),
                             whole(0, 5, segment, 3 * bytes, bytes)};
  hand_over(moves);
  check(aqua::retire_segment(own, false), "retired");
  delete behind;  // the sanitizer sees a copy that comes late
  aqua::delay_moves(0, 0);
  check(aqua::drain_moves(-1), "drained");
  for (int i = 0; i < 3; ++i) check(status_of(moves[i].ticket) == MoveStatus::kDone, "done");
  check(status_of(moves[3].ticket) == MoveStatus::kOutOfBounds, "no such page");
  check(std::equal(before.begin(), before.end(), memory.begin()), "the space's pages");
  check(std::equal(&pool[bytes], &pool[2 * bytes], &memory[2 * bytes]), "the pool's page");
  moves = {whole(aqua::kMoveIn, 3, segment, 0, bytes), whole(aqua::kMoveIn, 1, segment, 0, bytes)};
  hand_over(moves);
  check(aqua::drain_moves(-1), "drained");
  check(status_of(moves[0].ticket) == MoveStatus::kSegmentStale, "the space is gone");
  check(status_of(moves[1].ticket) == MoveStatus::kDone, "the pool isn't");
  check(!aqua::hold_segment(own) && aqua::segment_address(own) == nullptr, "gone for steps too");
  check(aqua::retire_segment(segment, false) && aqua::close_pool(owner), "closed: nobody uses them");
}

// Several pools handed over from several threads at once, and more tickets than results.
void many() {
  const int64_t pages = 256, bytes = 64;
  std::atomic<uint64_t> tickets{next_ticket};
  const auto play = [&](unsigned seed) {
    Bytes pool = noise(pages * bytes, seed), memory(pages * bytes);
    const Handle owner = aqua::open_pool();
    for (int step = 0; step < 90; ++step) {
      const Handle segment = aqua::open_segment(memory.data(), memory.size());
      std::vector<Move> moves;
      const uint64_t first = tickets.fetch_add(256);
      for (int i = 0; i < 256; ++i) {
        moves.push_back({0, i, segment.id, segment.generation, uint64_t(i) * bytes, 0,
                         static_cast<int32_t>(bytes), 1, 0, first + i, 0});
      }
      aqua::enqueue_moves(owner, pool.data(), pages, bytes, moves.data(), moves.size());
      if (!aqua::retire_segment(segment, false) || memory != pool) std::abort();
      if (status_of(first) != MoveStatus::kDone) std::abort();
      memory.assign(memory.size(), 0);
    }
    if (!aqua::close_pool(owner)) std::abort();
  };
  std::vector<std::thread> players;
  for (unsigned seed = 0; seed < 3; ++seed) players.emplace_back(play, seed);
  for (std::thread& player : players) player.join();
  check(tickets - next_ticket > aqua::kResults, "enough tickets for a lap");
  check(status_of(next_ticket) == MoveStatus::kForgotten, "old results are forgotten");
  check(status_of(tickets - 1) == MoveStatus::kDone, "new ones are not");
  next_ticket = tickets;
}

#if !defined(__SANITIZE_THREAD__)  // which allows no threads in the child of a fork
// A child of a fork has a queue of its own; what its parent had in hand is cancelled there.
void fork_child() {
  const int64_t bytes = 4096;
  Bytes pool = noise(2 * bytes, 6), memory(2 * bytes, 0);
  const Handle segment = aqua::open_segment(memory.data(), memory.size());
  const Handle owner = aqua::open_pool();
  aqua::delay_moves(1, 200000);
  Move move = whole(0, 0, segment, 0, bytes);
  aqua::enqueue_moves(owner, pool.data(), 2, bytes, &move, 1);
  const pid_t child = fork();
  if (child == 0) {
    aqua::delay_moves(0, 0);
    bool ok = status_of(move.ticket) != MoveStatus::kPending;
    move.page = 1, move.ticket = next_ticket++, move.offset = bytes;
    aqua::enqueue_moves(owner, pool.data(), 2, bytes, &move, 1);
    ok &= aqua::drain_moves(5000000) && status_of(move.ticket) == MoveStatus::kDone;
    ok &= !std::memcmp(&memory[bytes], &pool[bytes], bytes);
    ok &= aqua::retire_segment(segment, false) && aqua::close_pool(owner);
    aqua::stop_moves();
    _exit(ok ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  check(status == 0, "a forked child has a queue of its own");
  aqua::delay_moves(0, 0);
  check(aqua::retire_segment(segment, false) && aqua::close_pool(owner), "its parent goes on");
  check(status_of(move.ticket) == MoveStatus::kDone, "its parent's move ends");
}
#else
void fork_child() {}
#endif

void stop() {
  const int64_t pages = 50, bytes = 4096;
  Bytes pool = noise(pages * bytes, 7), memory(pages * bytes);
  const Handle segment = aqua::open_segment(memory.data(), memory.size());
  const Handle owner = aqua::open_pool();
  aqua::delay_moves(3, 20000);
  std::vector<Move> moves;
  for (int32_t i = 0; i < pages; ++i) {
    moves.push_back(whole(0, i, segment, (pages - 1 - i) * bytes, bytes));
  }
  aqua::enqueue_moves(owner, pool.data(), pages, bytes, moves.data(), moves.size());
  const auto start = std::chrono::steady_clock::now();
  aqua::stop_moves();
  check(std::chrono::steady_clock::now() - start < std::chrono::milliseconds(400),
        "stopping doesn't wait for the whole queue");
  aqua::stop_moves();
  check(status_of(moves.back().ticket) == MoveStatus::kCancelled, "cancelled");
  Move late = whole(0, 0, segment, 0, bytes);
  aqua::enqueue_moves(owner, pool.data(), pages, bytes, &late, 1);
  check(status_of(late.ticket) == MoveStatus::kCancelled, "cancelled after the end");
  check(aqua::drain_moves(0), "nothing is left");
  check(aqua::retire_segment(segment, false) && aqua::close_pool(owner), "no user is left");
}

}  // namespace

int main() {
  copies();
  exact();
  statuses();
  retire_in_flight();
  spaces();
  many();
  fork_child();
  stop();
  const aqua::MoveCounters end = aqua::move_counters();
  check(end.handed_over == end.finished && end.failed > 0 && end.bytes_in > 0, "counters");
  return failures == 0 ? 0 : 1;
}
