// Copies of whole pages, of the pool and of spaces behind it, on the device.
#pragma once

#include <cstdint>

#include "../common/spaces.h"
#include "device.h"

namespace aqua {
namespace cuda {

// Most copies in a call: their numbers are kept in shared memory.
constexpr int kMostCopies = 4096;

// Copies page src[i] over page dst[i] for i < count[0] (capacity at most), as if all sources were
// read first. No two dst may be equal. Pairs with a page that doesn't exist are left out. All arrays
// and the rows of `spaces` lie on the device.
cudaError_t copy_pages(void* pool, int64_t pages, int64_t page_bytes, const int32_t* src,
                       const int32_t* dst, const int32_t* count, int32_t capacity,
                       const Spaces& spaces, cudaStream_t stream);

// Puts copies in an order in which each may be done at once: `order[i]` is the pair to do i-th, and
// a page is written only when nobody is left to read it. A cycle of pages has no such order: its
// first pair in `order` is marked in `opens`, and whoever carries it out keeps what the pair
// overwrites for the cycle's last pair, marked in `closes`, to write. Works in place on `waiting`
// and `writer`, all arrays of `count`. Pairs with src == dst are left out; returns how many are
// not.
AQUA_HD int order_copies(const int32_t* src, const int32_t* dst, int count, int32_t* order,
                         uint8_t* opens, uint8_t* closes, int32_t* waiting, int32_t* writer) {
  // writer[i]: the pair that writes what i reads. waiting[i]: pairs that must read dst[i] first;
  // -1 when i is in the order.
  for (int i = 0; i < count; ++i) {
    writer[i] = -1;
    waiting[i] = src[i] == dst[i] ? -1 : 0;
  }
  for (int i = 0; i < count; ++i) {
    if (waiting[i] < 0) continue;
    for (int j = 0; j < count; ++j) {
      if (j == i || waiting[j] < 0 || src[i] != dst[j]) continue;
      writer[i] = j;
      ++waiting[j];
    }
  }
  int done = 0;
  const auto put = [&](int i) {
    order[done] = i;
    opens[done] = closes[done] = 0;
    waiting[i] = -1;
    return done++;
  };
  for (int start = 0; start < count; ++start) {
    for (int i = start; i >= 0 && waiting[i] == 0;) {
      const int next = writer[i];
      put(i);
      if (next >= 0) --waiting[next];
      i = next;
    }
  }
  // What is left are cycles: everyone is read by exactly one other.
  for (int start = 0; start < count; ++start) {
    if (waiting[start] < 0) continue;
    opens[put(start)] = 1;
    int last = done - 1;
    for (int i = writer[start]; i >= 0 && waiting[i] >= 0; i = writer[i]) last = put(i);
    closes[last] = 1;
  }
  return done;
}

}  // namespace cuda
}  // namespace aqua
