// Attention on the matrix units (mma.m16n8k16), with an online softmax in f32: FlashAttention-2
// (Dao 2023, arXiv:2307.08691) over pages. The queries and softmax weights are rounded to the
// pool's 16-bit dtype.
//
// A block of 4 warps takes one kv head and kRows rows, a row being one query head of one token, and
// walks over their keys in blocks of kKeys at multiples of kKeys. Keys and values go through a ring
// of kStages buffers in shared memory, filled by asynchronous 16-byte copies.
//   tiles (kParts false): kRows / 4 rows per warp; each warp sees all keys
//   parts (kParts true): the rows are the query heads of one token (16 at most), and each warp
//     takes a quarter of every block of keys; the warps' sums are added up at the end, in order
#pragma once

#include "attention_plan.cuh"
#include "preload.h"

namespace aqua {
namespace cuda {

template <int kDim, bool kParts>
struct MatrixShape {
  static constexpr int kThreads = 128;
  // A fragment of keys or values that a warp reads from shared memory serves all of its rows: with
  // 32 of them shared memory keeps up with the matrix units, with 16 it is what they wait for.
  static constexpr int kRows = kParts ? 16 : tile_rows(kDim);
  static constexpr int kRowTiles = kParts ? 1 : kRows / 64;  // of 16 rows, per warp
  static constexpr int kKeys = kParts ? kBlockKeys : 32;
  static constexpr int kWarpKeys = kParts ? kKeys / 4 : kKeys;
  // Two buffers in flight while one is used.
  static constexpr int kStages = kDim <= 128 ? 3 : 2;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kSideBytes = kKeys * kDim * 2;  // keys, or values
  static constexpr int kRingBytes = kStages * 2 * kSideBytes;
  static constexpr bool kKeepQueries = kParts && kDim <= 128;  // in registers
  // Queries that are kept pass through the last buffer, which is filled once all have been read. Up
  // to 128 dimensions 96 KiB do, which GPUs without a data centre's shared memory have as well, and
  // two blocks at a time fit an H100, for tiles (80 KiB) an A100 too.
  static constexpr int kQueriesAt = kKeepQueries ? kRingBytes - 2 * kSideBytes : kRingBytes;
  static constexpr int kShared = kKeepQueries ? kRingBytes : kRingBytes + kQueryBytes;
  // What an H100 has, less the 1 KiB a block that the system takes; without spaces on any GPU.
  static_assert(kDim > 128 || (2 * (kShared + 1024 + PageMap::kMostBytes) <= 228 * 1024 &&
                               kShared <= 99 * 1024), "fewer blocks would fit a multiprocessor");
  static_assert(!kKeepQueries || kQueryBytes <= 2 * kSideBytes, "queries don't fit a buffer");
};

template <typename T, int kDim, bool kParts>
__global__ __launch_bounds__(128) void attend_matrix(Attention p) {
  using Shape = MatrixShape<kDim, kParts>;
  constexpr int kKeys = Shape::kKeys, kStages = Shape::kStages, kWarpKeys = Shape::kWarpKeys;
  constexpr int kChunks = kDim / 8;                      // 16-byte chunks of a row
  constexpr int kLoads = kKeys * kChunks / 128;          // per thread, of keys and of values
  constexpr int kRowsApart = 128 / kChunks;              // between a thread's loads
  constexpr int kTilesN = kWarpKeys / 8, kTilesD = kDim / 8, kSteps = kDim / 16;
  constexpr int kRowTiles = Shape::kRowTiles;

  // ---- Which rows, which keys.
  const Counts counts = *reinterpret_cast<const Counts*>(p.counts);
  const int units = kParts ? units_of(p) : p.kv_heads;
  const int number = blockIdx.x / units, unit = blockIdx.x % units;
  if (number >= (kParts ? counts.parts : counts.tiles)) return;
  const Item item = static_cast<const Item*>(kParts ? p.parts : p.tiles)[number];
  const Rows rows = rows_of(p, item.seq);
  const int32_t before = rows.length - rows.count;  // position of the first row
  const int32_t heads_from = kParts ? unit / p.kv_heads * 16 : 0;
  const int32_t kv_head = kParts ? unit % p.kv_heads : unit;
  // Row r of the block is query head `row_head` of token `row_token` of the sequence's rows.
  const int64_t row_base = kParts ? heads_from : int64_t{item.part} * Shape::kRows;
  const int64_t rows_left = (kParts ? p.group : int64_t{rows.count} * p.group) - row_base;
  const int rows_here = static_cast<int>(rows_left < Shape::kRows ? rows_left : Shape::kRows);
  const auto group = static_cast<uint32_t>(p.group);
  const auto token_base = static_cast<int32_t>(row_base / p.group);
  const auto head_base = static_cast<uint32_t>(row_base % p.group);
  const auto row_token = [&](int r) {
    return token_base + static_cast<int32_t>((head_base + r) / group);
  };
  const auto row_head = [&](int r) { return static_cast<int32_t>((head_base + r) % group); };
  const auto row_valid = [&](int r) { return r < rows_here; };

  int32_t first = first_visible(p, before + row_token(0));
  int32_t last = before + row_token(rows_here - 1) + 1;
  if (kParts) {
    const int64_t from = int64_t{item.part} * counts.part_keys;
    if (from > first) first = static_cast<int32_t>(from);
    if (from + counts.part_keys < last) last = static_cast<int32_t>(from + counts.part_keys);
  }
  const int32_t block_first = first / kKeys, block_last = (last - 1) / kKeys;

  // ---- Shared memory and who loads what.
  unsigned char* const ring = shared_memory();
  unsigned char* const query_rows = ring + Shape::kQueriesAt;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread / 32;
  const int chunk = thread % kChunks, load_row = thread / kChunks;
  const PageMap map(p.kv, p.pages, page_bytes(p), p.spaces, ring + Shape::kShared);
  const bool chunk_valid = chunk * 8 < p.head_dim;
  // Bytes from a page's start to this thread's chunk of the first slot, to the next slot, and from
  // keys to values (check: a page has less than 2 GiB).
  const int32_t slot_bytes = p.kv_heads * p.head_dim * 2;
  const auto chunk_at = static_cast<int32_t>(
      (keys_at(p, 0) + int64_t{kv_head} * p.head_dim + chunk * 8) * 2);
  const int32_t values_at = p.page_tokens * slot_bytes;

  const auto find_pages = [&](int32_t block, int32_t pages[kLoads]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t key = block * kKeys + load_row + i * kRowsApart;
      pages[i] = key >= first && key < last ? page_of(p, item.seq, key) : -1;
    }
  };
  const auto load_block = [&](int32_t block, const int32_t pages[kLoads]) {
    unsigned char* keys = ring + (block - block_first) % kStages * 2 * Shape::kSideBytes;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = load_row + i * kRowsApart;
      const int32_t slot = (block * kKeys + row) & (p.page_tokens - 1);
      const bool valid = map.has(pages[i]) && chunk_valid;
      const char* from = static_cast<const char*>(p.kv);  // zeros are copied from there
      if (valid) from = map.at(pages[i]) + chunk_at + slot * slot_bytes;
      const int at = swizzled<kDim>(row, chunk);
      copy_async16(keys + at, from, valid);
      copy_async16(keys + Shape::kSideBytes + at, valid ? from + values_at : from, valid);
    }
  };

  int32_t pages[kLoads];
  find_pages(block_first, pages);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (block_first + i <= block_last) load_block(block_first + i, pages);
    commit_copies();
    find_pages(block_first + i + 1, pages);
  }

  // ---- Queries, as fragments a of the products. Rows that don't exist are zeros.
  for (int i = thread; i < Shape::kRows * kChunks; i += 128) {
    const int r = i / kChunks, c = i % kChunks;
    float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (row_valid(r) && c * 8 < p.head_dim) {
      const int64_t head = int64_t{kv_head} * p.group + row_head(r);
      const int64_t at =
          ((int64_t{rows.start} + row_token(r)) * p.heads + head) * p.head_dim + c * 8;
      load4(p.q, p.q_type, at, x);
      load4(p.q, p.q_type, at + 4, x + 4);
    }
    *reinterpret_cast<Vec16*>(query_rows + swizzled<kDim>(r, c)) =
        Vec16{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
              pack2<T>(x[6], x[7])};
  }
  __syncthreads();
  const int warp_row = kParts ? 0 : warp * 16 * kRowTiles;
  const int matrix = lane / 8, matrix_row = lane % 8;
  uint32_t queries[Shape::kKeepQueries ? kSteps : 1][kRowTiles][4];
  const auto load_queries = [&](int step, uint32_t to[kRowTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int row = warp_row + m * 16 + matrix % 2 * 8 + matrix_row;
      load_matrices(to[m], query_rows + swizzled<kDim>(row, step * 2 + matrix / 2));
    }
  };
  if constexpr (Shape::kKeepQueries) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_queries(step, queries[step]);
  }

  // ---- This thread's rows, two of each 16, and what they see.
  const int row_of_lane = lane / 4, pair = lane % 4;
  int32_t positions[kRowTiles][2];  // -1 if there is no such row
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = warp_row + m * 16 + row_of_lane + 8 * i;
      positions[m][i] = row_valid(r) ? before + row_token(r) : -1;
    }
  }
  // What any row of the warp sees.
  const int warp_end = warp_row + 16 * kRowTiles;
  const int warp_last_row = (warp_end < rows_here ? warp_end : rows_here) - 1;
  const int32_t warp_low = first_visible(p, before + row_token(warp_row));
  const int32_t warp_high = warp_row < rows_here ? before + row_token(warp_last_row) : -1;

  float sums[kRowTiles][kTilesD][4], most[kRowTiles][2], weights[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) most[m][i] = -INFINITY, weights[m][i] = 0.0f;
#pragma unroll
    for (int j = 0; j < kTilesD; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][j][i] = 0.0f;
    }
  }

  const int warp_key = kParts ? warp * kWarpKeys : 0;  // within a block
  // Whether the warp's keys are there, as seen by lane i for keys i and i + 32.
  bool there[2] = {true, true};
  const auto look = [&](int32_t block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t key = block * kKeys + warp_key + lane + 32 * i;
      const bool asked = lane + 32 * i < kWarpKeys && key >= first && key < last;
      there[i] = !asked || map.has(page_of(p, item.seq, key));
    }
  };
  look(block_first);

  for (int32_t block = block_first; block <= block_last; ++block) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (block + kStages - 1 <= block_last) load_block(block + kStages - 1, pages);
    commit_copies();
    find_pages(block + kStages, pages);
    const uint32_t there_low = __ballot_sync(kAllLanes, there[0]);
    const uint32_t there_high = __ballot_sync(kAllLanes, there[1]);
    look(block + 1);

    const int32_t key0 = block * kKeys + warp_key;
    if (key0 > warp_high || key0 + kWarpKeys <= warp_low) continue;  // for the whole warp
    const unsigned char* keys = ring + (block - block_first) % kStages * 2 * Shape::kSideBytes;
    const unsigned char* values = keys + Shape::kSideBytes;

    // Scores of the warp's rows and kWarpKeys keys.
    float score[kRowTiles][kTilesN][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][j][i] = 0.0f;
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t query[kRowTiles][4];
      if constexpr (Shape::kKeepQueries) {
#pragma unroll
        for (int i = 0; i < 4 * kRowTiles; ++i) query[i / 4][i % 4] = queries[step][i / 4][i % 4];
      } else {
        load_queries(step, query);
      }
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        uint32_t b[4];
        load_matrices(b, keys + swizzled<kDim>(warp_key + j * 8 + matrix / 2 * 8 + matrix_row,
                                               step * 2 + matrix % 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply<T>(score[m][j], query[m], b[0], b[1]);
          multiply<T>(score[m][j + 1], query[m], b[2], b[3]);
        }
      }
    }

    const bool absent = (there_low & there_high) != kAllLanes;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Hide what the row doesn't see.
        const int32_t position = positions[m][i];
        const int32_t since = first_visible(p, position);
        const int32_t low = since > first ? since : first;
        const int32_t high = position < last ? position : last - 1;
        if (absent || key0 < low || key0 + kWarpKeys - 1 > high) {
#pragma unroll
          for (int j = 0; j < 2 * kTilesN; ++j) {
            const int at = j / 2 * 8 + pair * 2 + j % 2;
            const uint32_t bits = at < 32 ? there_low : there_high;
            const int32_t key = key0 + at;
            const bool seen = key >= low && key <= high && (bits >> (at & 31) & 1);
            if (!seen) score[m][j / 2][2 * i + j % 2] = -INFINITY;
          }
        }
        // The running softmax of the row, which three other lanes share. Weights are powers of two
        // of score * scale - base, in one rounding.
        float greatest = -INFINITY;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          greatest = fmaxf(greatest, fmaxf(score[m][j][2 * i], score[m][j][2 * i + 1]));
        }
        greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, 1));
        greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, 2));
        greatest = fmaxf(most[m][i], greatest * p.scale);
        const float base = greatest == -INFINITY ? 0.0f : greatest;
        const float shrink = exp2_of(most[m][i] - base);
        most[m][i] = greatest;
        weights[m][i] *= shrink;
#pragma unroll
        for (int j = 0; j < 2 * kTilesN; ++j) {
          float& x = score[m][j / 2][2 * i + j % 2];
          x = exp2_of(fmaf(x, p.scale, -base));
          weights[m][i] += x;
        }
#pragma unroll
        for (int j = 0; j < kTilesD; ++j) {
          sums[m][j][2 * i] *= shrink;
          sums[m][j][2 * i + 1] *= shrink;
        }
      }
    }

    // Weights times values: a product's fragment c is the next one's a.
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* both = score[m][j + i / 2] + i % 2 * 2;
          a[m][i] = pack2<T>(both[0], both[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < kTilesD; d += 2) {
        uint32_t b[4];
        load_matrices_transposed(
            b, values + swizzled<kDim>(warp_key + j * 8 + matrix % 2 * 8 + matrix_row,
                                       d + matrix / 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply<T>(sums[m][d], a[m], b[0], b[1]);
          multiply<T>(sums[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  wait_copies<0>();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weights[m][i] += __shfl_xor_sync(kAllLanes, weights[m][i], 1);
      weights[m][i] += __shfl_xor_sync(kAllLanes, weights[m][i], 2);
    }
  }

  // ---- Results.
  if constexpr (!kParts) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = warp_row + m * 16 + row_of_lane + 8 * i;
        if (!row_valid(r)) continue;
        const float scale = weights[m][i] > 0.0f ? 1.0f / weights[m][i] : 0.0f;
        const int64_t head = int64_t{kv_head} * p.group + row_head(r);
        const int64_t out = ((int64_t{rows.start} + row_token(r)) * p.heads + head) * p.head_dim;
#pragma unroll
        for (int j = 0; j < kTilesD; ++j) {
          const int d = j * 8 + pair * 2;
          if (d < p.head_dim) {
            const float* both = sums[m][j] + 2 * i;
            store2(p.out, p.q_type, out + d, both[0] * scale, both[1] * scale);
          }
        }
      }
    }
  } else {
    // The warps' sums, one behind the other, over the ring, which nobody reads any more.
    __syncthreads();
    constexpr int kApart = kDim + 8;  // so that four lanes' rows fall into different banks
    auto* all = reinterpret_cast<float*>(ring);              // [4, 16, kApart]
    auto* scales = all + 4 * 16 * kApart;                    // [4, 16, 2]
    static_assert(4 * 16 * (kApart + 2) * 4 <= Shape::kRingBytes, "no room for the sums");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = warp * 16 + row_of_lane + 8 * i;
      if (pair == 0) scales[2 * r] = most[0][i], scales[2 * r + 1] = weights[0][i];
#pragma unroll
      for (int j = 0; j < kTilesD; ++j) {
        store2(all, Type::kF32, r * kApart + j * 8 + pair * 2, sums[0][j][2 * i],
               sums[0][j][2 * i + 1]);
      }
    }
    __syncthreads();
    for (int i = thread; i < rows_here * kDim; i += 128) {
      const int r = i / kDim, d = i % kDim;
      if (d >= p.head_dim) continue;
      float greatest = -INFINITY;
#pragma unroll
      for (int w = 0; w < 4; ++w) greatest = fmaxf(greatest, scales[2 * (w * 16 + r)]);
      const float base = greatest == -INFINITY ? 0.0f : greatest;
      float sum = 0.0f, weight = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float factor = exp2_of(scales[2 * (w * 16 + r)] - base);
        weight += factor * scales[2 * (w * 16 + r) + 1];
        sum += factor * all[(w * 16 + r) * kApart + d];
      }
      const int64_t head = int64_t{kv_head} * p.group + heads_from + r;
      if (item.parts == 1) {
        const float scale = weight > 0.0f ? 1.0f / weight : 0.0f;
        store1(p.out, p.q_type, (int64_t{rows.start} * p.heads + head) * p.head_dim + d,
               sum * scale);
      } else {
        const int64_t at = int64_t{number} * p.heads + head;
        p.partial[at * p.head_dim + d] = sum;
        if (d == 0) p.partial_ml[2 * at] = greatest, p.partial_ml[2 * at + 1] = weight;
      }
    }
  }
}

template <typename T, int kDim>
cudaError_t launch_matrix(const Attention& p, cudaStream_t stream, bool tiles) {
  if (tiles) {
    using Shape = MatrixShape<kDim, false>;
    return launch(attend_matrix<T, kDim, false>, int64_t{p.most_tiles} * p.kv_heads, 128,
                  Shape::kShared + PageMap::bytes(p.spaces), stream, p);
  }
  using Shape = MatrixShape<kDim, true>;
  return launch(attend_matrix<T, kDim, true>, int64_t{p.most_parts} * units_of(p), 128,
                Shape::kShared + PageMap::bytes(p.spaces), stream, p);
}

template <typename T>
cudaError_t attend_matrix_any(const Attention& p, cudaStream_t stream, bool tiles) {
  if (p.head_dim <= 64) return launch_matrix<T, 64>(p, stream, tiles);
  if (p.head_dim <= 128) return launch_matrix<T, 128>(p, stream, tiles);
  return launch_matrix<T, 256>(p, stream, tiles);
}

template <typename T, int kDim>
cudaError_t preload_matrix_of() {
  const cudaError_t error = preload(attend_matrix<T, kDim, false>,
                                    MatrixShape<kDim, false>::kShared + PageMap::kMostBytes);
  if (error != cudaSuccess) return error;
  return preload(attend_matrix<T, kDim, true>,
                 MatrixShape<kDim, true>::kShared + PageMap::kMostBytes);
}

template <typename T>
cudaError_t preload_matrix_any() {
  cudaError_t error = preload_matrix_of<T, 64>();
  if (error == cudaSuccess) error = preload_matrix_of<T, 128>();
  return error == cudaSuccess ? preload_matrix_of<T, 256>() : error;
}

}  // namespace cuda
}  // namespace aqua
