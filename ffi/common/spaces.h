// Where pages lie. Page ids below P are pages of the pool that XLA owns, the ids behind them pages
// of memory of ours (spaces), in consecutive ranges, in order. Plain data, for handlers of any
// platform.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define AQUA_SPACES_HD __host__ __device__ __forceinline__
#else
#define AQUA_SPACES_HD inline
#endif

namespace aqua {

// Most spaces behind the pool. A look-up goes through all of them.
constexpr int kMostSpaces = 8;

// A row of the operand i32[N, 8] (aqua_jax/ops/spaces.py). On GPUs it lies in device memory.
struct alignas(4) Space {
  int32_t first, pages;     // ids [first, first + pages)
  uint32_t low, high;       // address of page `first`, as whoever copies or computes sees it
  int32_t segment;          // the Handle under which moves.h counts users of the memory
  uint32_t generation;
  int32_t stride;           // bytes from one page to the next; 0: as in the pool
  int32_t unused;

  AQUA_SPACES_HD bool has(int32_t page) const {
    return page >= first && int64_t{page} - first < pages;
  }
  AQUA_SPACES_HD char* base() const {
    return reinterpret_cast<char*>(static_cast<uintptr_t>(uint64_t{high} << 32 | low));
  }
  // The first byte of a page that it has.
  AQUA_SPACES_HD char* at(int32_t page, int64_t page_bytes) const {
    return base() + int64_t{page - first} * (stride == 0 ? page_bytes : stride);
  }
};
static_assert(sizeof(Space) == 32, "the layout is aqua_jax/ops/spaces.py's");

// The spaces behind a pool.
struct Spaces {
  const Space* rows = nullptr;
  int32_t count = 0;

  // The one that has the page; null if none has.
  AQUA_SPACES_HD const Space* find(int32_t page) const {
    for (int32_t i = 0; i < count; ++i) {
      if (rows[i].has(page)) return rows + i;
    }
    return nullptr;
  }

  // The first byte of a page behind the pool; null if there is none of that id.
  AQUA_SPACES_HD char* page(int32_t id, int64_t page_bytes) const {
    const Space* space = find(id);
    return space == nullptr ? nullptr : space->at(id, page_bytes);
  }
};

}  // namespace aqua
