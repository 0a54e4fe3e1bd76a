// Attention on the matrix units (mma.m16n8k16), with an online softmax in f32: FlashAttention-2
// (Dao 2023, arXiv:2307.08691) over pages. The queries and softmax weights are rounded to the
// pool's 16-bit dtype.
//
// A block of 4 warps takes one kv head and kRows rows, a row being one query head of one token, and
// walks over their keys in blocks of kKeys at multiples of kKeys. Keys and values go through a ring
// of kStages buffers in shared memory, filled by asynchronous 16-byte copies.
//   tiles (kParts false): 64 rows, 16 per warp; each warp sees all keys
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
  static constexpr int kRows = kParts ? 16 : kTileRows;
  static constexpr int kKeys = !kParts && kDim > 128 ? 32 : kBlockKeys;
  static constexpr int kWarpKeys = kParts ? kKeys / 4 : kKeys;
  // Parts are bound by memory: two buffers in flight while one is used.
  static constexpr int kStages = kParts && kDim <= 128 ? 3 : 2;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kSideBytes = kKeys * kDim * 2;  // keys, or values
  static constexpr int kRingBytes = kStages * 2 * kSideBytes;
  static constexpr bool kKeepQueries = kDim <= 128;  // in registers
  // Queries that are kept pass through the last buffer, which is filled once all have been read: up
  // to 128 dimensions, 96 KiB do, which GPUs without a data centre's shared memory have as well.
  static constexpr int kQueriesAt = kKeepQueries ? kRingBytes - 2 * kSideBytes : kRingBytes;
  static constexpr int kShared = kKeepQueries ? kRingBytes : kRingBytes + kQueryBytes;
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
  const int64_t row_base = kParts ? heads_from : int64_t{item.part} * kTileRows;
  const int64_t rows_end = kParts ? p.group : int64_t{rows.count} * p.group;
  const auto row_token = [&](int r) { return static_cast<int32_t>((row_base + r) / p.group); };
  const auto row_head = [&](int r) { return static_cast<int32_t>((row_base + r) % p.group); };
  const auto row_valid = [&](int r) { return row_base + r < rows_end; };
  const int32_t rows_here = static_cast<int32_t>(
      rows_end - row_base < Shape::kRows ? rows_end - row_base : Shape::kRows);

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
  const T* const pool = static_cast<const T*>(p.kv);
  const PageMap map(p.kv, p.pages, page_bytes(p), p.spaces, ring + Shape::kShared);
  const bool chunk_valid = chunk * 8 < p.head_dim;

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
      const T* from = valid ? reinterpret_cast<const T*>(map.at(pages[i])) + keys_at(p, slot) +
                                  int64_t{kv_head} * p.head_dim + chunk * 8
                            : pool;
      const int at = swizzled<kDim>(row, chunk);
      copy_async16(keys + at, from, valid);
      copy_async16(keys + Shape::kSideBytes + at, valid ? from + values_after(p) : pool, valid);
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
  const int warp_row = kParts ? 0 : warp * 16;
  const int matrix = lane / 8, matrix_row = lane % 8;
  uint32_t queries[Shape::kKeepQueries ? kSteps : 1][4];
  const auto load_queries = [&](int step, uint32_t to[4]) {
    load_matrices(to, query_rows + swizzled<kDim>(warp_row + matrix % 2 * 8 + matrix_row,
                                                  step * 2 + matrix / 2));
  };
  if constexpr (Shape::kKeepQueries) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_queries(step, queries[step]);
  }

  // ---- This thread's two rows, and what they see.
  const int row_of_lane = lane / 4, pair = lane % 4;
  int32_t low[2], high[2];  // keys seen, both ends included
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = warp_row + row_of_lane + 8 * i;
    const int32_t position = row_valid(r) ? before + row_token(r) : -1;
    low[i] = first_visible(p, position);
    high[i] = position;
    if (kParts) {
      low[i] = low[i] > first ? low[i] : first;
      high[i] = high[i] < last ? high[i] : last - 1;
    }
  }
  // What any row of the warp sees.
  const int warp_last_row = warp_row + 15 < rows_here ? warp_row + 15 : rows_here - 1;
  const int32_t warp_low = first_visible(p, before + row_token(warp_row));
  const int32_t warp_high = warp_row < rows_here ? before + row_token(warp_last_row) : -1;

  float sums[kTilesD][4];
  float most[2] = {-INFINITY, -INFINITY}, weights[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < kTilesD; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
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

    // Scores of 16 rows and kWarpKeys keys.
    float score[kTilesN][4];
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[j][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t query[4];
      if constexpr (Shape::kKeepQueries) {
#pragma unroll
        for (int i = 0; i < 4; ++i) query[i] = queries[step][i];
      } else {
        load_queries(step, query);
      }
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        uint32_t b[4];
        load_matrices(b, keys + swizzled<kDim>(warp_key + j * 8 + matrix / 2 * 8 + matrix_row,
                                               step * 2 + matrix % 2));
        multiply<T>(score[j], query, b[0], b[1]);
        multiply<T>(score[j + 1], query, b[2], b[3]);
      }
    }

    // Scale, and hide what the rows don't see.
    bool hide = (there_low & there_high) != kAllLanes;
#pragma unroll
    for (int i = 0; i < 2; ++i) hide |= key0 < low[i] || key0 + kWarpKeys - 1 > high[i];
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[j][i] *= p.scale;
        if (hide) {
          const int at = j * 8 + pair * 2 + (i & 1);
          const uint32_t bits = at < 32 ? there_low : there_high;
          const int32_t key = key0 + at;
          const bool seen = key >= low[i / 2] && key <= high[i / 2] && (bits >> (at & 31) & 1);
          if (!seen) score[j][i] = -INFINITY;
        }
      }
    }

    // The running softmax of this thread's two rows, each shared with the three other lanes of four.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float greatest = most[i];
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        greatest = fmaxf(greatest, fmaxf(score[j][2 * i], score[j][2 * i + 1]));
      }
      greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, 1));
      greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, 2));
      const float base = greatest == -INFINITY ? 0.0f : greatest;
      const float shrink = exp2_of(most[i] - base);
      most[i] = greatest;
      weights[i] *= shrink;
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        score[j][2 * i] = exp2_of(score[j][2 * i] - base);
        score[j][2 * i + 1] = exp2_of(score[j][2 * i + 1] - base);
        weights[i] += score[j][2 * i] + score[j][2 * i + 1];
      }
#pragma unroll
      for (int j = 0; j < kTilesD; ++j) {
        sums[j][2 * i] *= shrink;
        sums[j][2 * i + 1] *= shrink;
      }
    }

    // Weights times values: a product's fragment c is the next one's a.
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      const uint32_t a[4] = {
          pack2<T>(score[j][0], score[j][1]), pack2<T>(score[j][2], score[j][3]),
          pack2<T>(score[j + 1][0], score[j + 1][1]), pack2<T>(score[j + 1][2], score[j + 1][3])};
#pragma unroll
      for (int d = 0; d < kTilesD; d += 2) {
        uint32_t b[4];
        load_matrices_transposed(
            b, values + swizzled<kDim>(warp_key + j * 8 + matrix % 2 * 8 + matrix_row,
                                       d + matrix / 2));
        multiply<T>(sums[d], a, b[0], b[1]);
        multiply<T>(sums[d + 1], a, b[2], b[3]);
      }
    }
  }
  wait_copies<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weights[i] += __shfl_xor_sync(kAllLanes, weights[i], 1);
    weights[i] += __shfl_xor_sync(kAllLanes, weights[i], 2);
  }

  // ---- Results.
  if constexpr (!kParts) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = warp_row + row_of_lane + 8 * i;
      if (!row_valid(r)) continue;
      const float scale = weights[i] > 0.0f ? 1.0f / weights[i] : 0.0f;
      const int64_t head = int64_t{kv_head} * p.group + row_head(r);
      const int64_t out = ((int64_t{rows.start} + row_token(r)) * p.heads + head) * p.head_dim;
#pragma unroll
      for (int j = 0; j < kTilesD; ++j) {
        const int d = j * 8 + pair * 2;
        if (d < p.head_dim) {
          store2(p.out, p.q_type, out + d, sums[j][2 * i] * scale, sums[j][2 * i + 1] * scale);
        }
      }
    }
  } else {
    // The warps' sums, one behind the other, over the ring, which nobody reads any more.
    __syncthreads();
    auto* all = reinterpret_cast<float*>(ring);              // [4, 16, kDim]
    auto* scales = all + 4 * 16 * kDim;                      // [4, 16, 2]
    static_assert(4 * 16 * (kDim + 2) * 4 <= Shape::kRingBytes, "no room for the sums");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = warp * 16 + row_of_lane + 8 * i;
      if (pair == 0) scales[2 * r] = most[i], scales[2 * r + 1] = weights[i];
#pragma unroll
      for (int j = 0; j < kTilesD; ++j) {
        all[r * kDim + j * 8 + pair * 2] = sums[j][2 * i];
        all[r * kDim + j * 8 + pair * 2 + 1] = sums[j][2 * i + 1];
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
        sum += factor * all[(w * 16 + r) * kDim + d];
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
