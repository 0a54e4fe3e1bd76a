// Moves of KV pages between the pool and segments of other memory, beside the running step, on
// CUDA. What callers see is ../common/moves.h, with these differences:
//
// A step's moves lie in device memory. The handler launches a small kernel that writes them into
// pinned memory, and records an event; a worker thread of the host sees the event, checks the moves
// as the CPU's queue does, and puts copies onto side streams of its own, one per direction. So a
// copy begins when the stream has reached the step's head, which is when everything before the step
// has been written, and the step never waits for one.
//
// Large copies go to the copy engines, smaller ones, scattered ones, those with a checksum and those
// that stay on the GPU to kernels with 16-byte accesses, through mappings of pinned or peer memory
// (move_streams.h, Place).
// Statuses come from the host, which looks at events.
#pragma once

#include <cstdint>

#include "../common/moves.h"
#include "device.h"

namespace aqua {
namespace cuda {

// Pieces of one kernel launch, which are its argument (4 KiB are allowed).
constexpr int kPieces = 64;

// One move for a kernel: `runs` pieces of `bytes` bytes, `stride` apart.
struct Piece {
  const char* from;
  char* to;
  int32_t bytes, runs, stride, unused;
};
struct Pieces {
  Piece pieces[kPieces];
  int32_t count;
};

// Copies, with at most so many blocks; all addresses are the device's.
cudaError_t copy_pieces(const Pieces& pieces, int blocks, cudaStream_t stream);
// The same, and writes each piece's checksum (../cpu/moves_copy.h) to sums[i]; with `to` null, only
// that.
cudaError_t copy_checked(const Pieces& pieces, uint64_t* sums, cudaStream_t stream);
// Writes to `out`, which the host can read: `head` (3 words) and an unused one, the rows of
// kMostSpaces spaces, `spaces` being the first of them, and `words` words of moves.
cudaError_t hand_over_words(const int32_t* head, const int32_t* moves, int32_t words,
                            const Spaces& spaces, int32_t* out, cudaStream_t stream);
constexpr int kSpaceWords = kMostSpaces * sizeof(Space) / sizeof(int32_t);
constexpr int kMovesAt = 4 + kSpaceWords;  // words before the moves

// What the handler does: the step's moves reach the queue when `stream` gets here. `capacity` is the
// most moves there can be. Head, moves and the rows of spaces lie on the device.
cudaError_t hand_over(cudaStream_t stream, void* pool, int64_t pages, int64_t page_bytes,
                      const int32_t* head, const int32_t* moves, int64_t capacity,
                      const Spaces& spaces);

}  // namespace cuda
}  // namespace aqua
