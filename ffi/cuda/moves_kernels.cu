// The copies of moves.h on the device.

#include "device.cuh"
#include "moves.h"
#include "moves_checksum.h"
#include "preload.h"

namespace aqua {
namespace cuda {
namespace {

constexpr int kThreads = 256;
// What a block copies at a time: four 16-byte loads of each thread in flight.
constexpr int64_t kChunk = kThreads * 16 * 4;

__device__ bool aligned(const Piece& piece) {
  return ((reinterpret_cast<uintptr_t>(piece.from) | reinterpret_cast<uintptr_t>(piece.to) |
           static_cast<uintptr_t>(piece.bytes) | static_cast<uintptr_t>(piece.stride)) &
          15) == 0;
}

__device__ void copy_chunk(char* to, const char* from, int64_t bytes, bool wide) {
  if (wide) {
    const auto* source = reinterpret_cast<const Vec16*>(from);
    auto* target = reinterpret_cast<Vec16*>(to);
    const int count = static_cast<int>(bytes / 16);
    Vec16 kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at < count) kept[i] = source[at];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at < count) target[at] = kept[i];
    }
  } else {
    for (int64_t at = threadIdx.x; at < bytes; at += kThreads) to[at] = from[at];
  }
}

__global__ __launch_bounds__(kThreads) void copy_pieces_kernel(Pieces all) {
  int64_t chunk = blockIdx.x;  // counted over all pieces
  for (int i = 0; i < all.count; ++i) {
    const Piece& piece = all.pieces[i];
    const int64_t per_run = (piece.bytes + kChunk - 1) / kChunk, chunks = per_run * piece.runs;
    const bool wide = aligned(piece);
    for (; chunk < chunks; chunk += gridDim.x) {
      const int64_t run = chunk / per_run, within = chunk % per_run * kChunk;
      const int64_t at = run * piece.stride + within;
      const int64_t left = piece.bytes - within;
      copy_chunk(piece.to + at, piece.from + at, left < kChunk ? left : kChunk, wide);
    }
    chunk -= chunks;
  }
}

constexpr int kCheckThreads = 128;
constexpr int kTile = kCheckThreads * 16 * 4;  // bytes hashed at a time

// A block per piece: while eight threads hash a tile, the next one is on its way. The eight lanes of
// the checksum follow word upon word, so a piece goes at a few GB/s and only many of them together
// fill a link. What is hashed is what was copied: memory is read once.
__global__ __launch_bounds__(kCheckThreads) void copy_checked_kernel(Pieces all,
                                                                     unsigned long long* sums) {
  const Piece piece = all.pieces[blockIdx.x];
  const bool wide = aligned(piece);
  auto* tiles = shared_memory();  // [2, kTile]
  const int thread = threadIdx.x;
  const int64_t per_run = (piece.bytes + kTile - 1) / kTile, count = per_run * piece.runs;
  uint64_t lane = checksum_lane(thread & 7);

  const auto bytes_of = [&](int64_t tile) {
    const int64_t left = piece.bytes - tile % per_run * kTile;
    return static_cast<int>(left < kTile ? left : kTile);
  };
  const auto start_of = [&](int64_t tile) {
    return tile / per_run * piece.stride + tile % per_run * kTile;
  };
  Vec16 kept[4];
  const auto load = [&](int64_t tile) {
    if (tile >= count || !wide) return;
    const auto* source = reinterpret_cast<const Vec16*>(piece.from + start_of(tile));
    const int vectors = bytes_of(tile) / 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = thread + i * kCheckThreads;
      kept[i] = at < vectors ? source[at] : Vec16{0, 0, 0, 0};
    }
  };
  const auto store = [&](int64_t tile) {
    if (tile >= count) return;
    unsigned char* here = tiles + (tile & 1) * kTile;
    char* to = piece.to == nullptr ? nullptr : piece.to + start_of(tile);
    const int bytes = bytes_of(tile);
    if (wide) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = thread + i * kCheckThreads;
        reinterpret_cast<Vec16*>(here)[at] = kept[i];
        if (at < bytes / 16 && to != nullptr) reinterpret_cast<Vec16*>(to)[at] = kept[i];
      }
    } else {
      const char* from = piece.from + start_of(tile);
      for (int at = thread; at < kTile; at += kCheckThreads) {
        const char byte = at < bytes ? from[at] : 0;
        here[at] = static_cast<unsigned char>(byte);
        if (at < bytes && to != nullptr) to[at] = byte;
      }
    }
  };

  load(0);
  store(0);
  __syncthreads();
  for (int64_t tile = 0; tile < count; ++tile) {
    load(tile + 1);
    if (thread < 8) {
      const auto* words = reinterpret_cast<const uint64_t*>(tiles + (tile & 1) * kTile);
      const int blocks = (bytes_of(tile) + 63) / 64;  // the rest of the last one is zeros
      for (int i = 0; i < blocks; ++i) lane = checksum_step(lane, words[i * 8 + thread]);
    }
    store(tile + 1);
    __syncthreads();
  }
  auto* lanes = reinterpret_cast<uint64_t*>(tiles);
  if (thread < 8) lanes[thread] = lane;
  __syncthreads();
  if (thread == 0) {
    sums[blockIdx.x] = checksum_value(lanes, uint64_t(piece.bytes) * piece.runs);
    __threadfence_system();
  }
}

__global__ __launch_bounds__(kThreads) void hand_over_kernel(const int32_t* head,
                                                             const int32_t* moves, int32_t words,
                                                             const int32_t* spaces,
                                                             int32_t space_words, int32_t* out) {
  if (threadIdx.x < 3) out[threadIdx.x] = head[threadIdx.x];
  static_assert(kSpaceWords <= kThreads, "a thread per word");
  const int thread = threadIdx.x;
  if (thread < space_words) out[4 + thread] = spaces[thread];
  // No more than there are: writes across the bus cost time.
  const int64_t used = head[0] > 0 ? int64_t{head[0]} * (sizeof(Move) / 4) : 0;
  for (int64_t i = threadIdx.x; i < words && i < used; i += kThreads) out[kMovesAt + i] = moves[i];
  __threadfence_system();
}

}  // namespace

cudaError_t copy_pieces(const Pieces& pieces, int blocks, cudaStream_t stream) {
  int64_t chunks = 0;
  for (int i = 0; i < pieces.count; ++i) {
    chunks += (pieces.pieces[i].bytes + kChunk - 1) / kChunk * pieces.pieces[i].runs;
  }
  return launch(copy_pieces_kernel, chunks < blocks ? chunks : blocks, kThreads, 0, stream, pieces);
}

cudaError_t copy_checked(const Pieces& pieces, uint64_t* sums, cudaStream_t stream) {
  return launch(copy_checked_kernel, pieces.count, kCheckThreads, 2 * kTile, stream, pieces,
                reinterpret_cast<unsigned long long*>(sums));
}

cudaError_t hand_over_words(const int32_t* head, const int32_t* moves, int32_t words,
                            const Spaces& spaces, int32_t* out, cudaStream_t stream) {
  return launch(hand_over_kernel, 1, kThreads, 0, stream, head, moves, words,
                reinterpret_cast<const int32_t*>(spaces.rows),
                static_cast<int32_t>(spaces.count * sizeof(Space) / sizeof(int32_t)), out);
}

cudaError_t preload_moves() {
  cudaError_t error = preload(copy_pieces_kernel);
  if (error == cudaSuccess) error = preload(copy_checked_kernel, 2 * kTile);
  return error == cudaSuccess ? preload(hand_over_kernel) : error;
}

}  // namespace cuda
}  // namespace aqua
