// Attention over pools of f32 without matrix units, for the same precision as the CPU's: one row at
// a time, four of its keys per warp and step.
//
// A block of 4 warps takes the query heads of one kv head (8 at most) of one row. A key's vector
// lies across kDim / 4 lanes (32 at most), 16 bytes each. Every warp (every half warp where kDim is
// 64) has a running softmax of its own over the keys it meets; which keys these are depends on
// their absolute position alone. They are summed up at the end, in order.

#include "attention_plan.cuh"
#include "preload.h"

namespace aqua {
namespace cuda {
namespace {

constexpr int kThreads = 128, kHeads = 8, kUnroll = 4;

template <int kDim>
struct RowShape {
  static constexpr int kLanes = kDim / 4 < 32 ? kDim / 4 : 32;  // of a key
  static constexpr int kVectors = kDim / 4 / kLanes;            // per lane
  static constexpr int kStates = kThreads / kLanes;             // keys at a time, and softmaxes
  static constexpr int kShared = kStates * kHeads * (kDim + 2) * 4;
};

template <int kDim>
__global__ __launch_bounds__(kThreads) void attend_row(Attention p) {
  using Shape = RowShape<kDim>;
  constexpr int kVectors = Shape::kVectors, kStates = Shape::kStates;

  const Counts counts = *reinterpret_cast<const Counts*>(p.counts);
  const int units = units_of(p);
  int number = blockIdx.x / units;
  const int unit = blockIdx.x % units;
  // Parts of decodes first, then whole rows.
  const bool whole = number >= p.most_parts;
  if (whole) number -= p.most_parts;
  if (number >= (whole ? counts.tiles : counts.parts)) return;
  const Item item = static_cast<const Item*>(whole ? p.tiles : p.parts)[number];
  const Rows rows = rows_of(p, item.seq);
  const int32_t row = whole ? item.part : 0;
  const int32_t position = rows.length - rows.count + row;
  const int32_t kv_head = unit % p.kv_heads, heads_from = unit / p.kv_heads * kHeads;
  const int heads_here = p.group - heads_from < kHeads ? p.group - heads_from : kHeads;
  const int64_t head0 = int64_t{kv_head} * p.group + heads_from;
  const int64_t row_at = (int64_t{rows.start} + row) * p.heads + head0;

  int32_t first = first_visible(p, position), last = position + 1;
  if (!whole) {
    const int64_t from = int64_t{item.part} * counts.part_keys;
    if (from > first) first = static_cast<int32_t>(from);
    if (from + counts.part_keys < last) last = static_cast<int32_t>(from + counts.part_keys);
  }

  const PageMap map(p.kv, p.pages, page_bytes(p), p.spaces, shared_memory() + Shape::kShared);
  const int state = threadIdx.x / Shape::kLanes, lane = threadIdx.x % Shape::kLanes;
  float query[kHeads][kVectors][4], sums[kHeads][kVectors][4], most[kHeads], weights[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    most[h] = -INFINITY;
    weights[h] = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int d = (lane + i * Shape::kLanes) * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) query[h][i][j] = sums[h][i][j] = 0.0f;
      if (h < heads_here && d < p.head_dim) {
        load4(p.q, p.q_type, (row_at + h) * p.head_dim + d, query[h][i]);
      }
    }
  }

  constexpr int kStep = kStates * kUnroll;
  for (int32_t from = first / kStep * kStep; from < last; from += kStep) {
    float keys[kUnroll][kVectors][4], values[kUnroll][kVectors][4];
    bool seen[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t key = from + u * kStates + state;
      int32_t page = -1;
      if (key >= first && key < last) page = page_of(p, item.seq, key);
      seen[u] = map.has(page);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int d = (lane + i * Shape::kLanes) * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) keys[u][i][j] = values[u][i][j] = 0.0f;
        if (seen[u] && d < p.head_dim) {
          const char* from = map.at(page);
          const int64_t at =
              keys_at(p, key & (p.page_tokens - 1)) + int64_t{kv_head} * p.head_dim + d;
          load4<float>(from, at, keys[u][i]);
          load4<float>(from, at + values_after(p), values[u][i]);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= heads_here) break;  // the same for the whole block
      float score[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        score[u] = 0.0f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) score[u] += query[h][i][j] * keys[u][i][j];
        }
#pragma unroll
        for (int mask = Shape::kLanes / 2; mask > 0; mask /= 2) {
          score[u] += __shfl_xor_sync(kAllLanes, score[u], mask);
        }
        score[u] = seen[u] ? score[u] * p.scale : -INFINITY;
      }
      float greatest = most[h];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) greatest = fmaxf(greatest, score[u]);
      const float base = greatest == -INFINITY ? 0.0f : greatest;
      const float shrink = exp2_of(most[h] - base);
      most[h] = greatest;
      weights[h] *= shrink;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[h][i][j] *= shrink;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float weight = exp2_of(score[u] - base);
        weights[h] += weight;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[h][i][j] += weight * values[u][i][j];
        }
      }
    }
  }

  auto* all = reinterpret_cast<float*>(shared_memory());   // [kStates, kHeads, kDim]
  float* scales = all + kStates * kHeads * kDim;           // [kStates, kHeads, 2]
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int at = state * kHeads + h;
    if (lane == 0) scales[2 * at] = most[h], scales[2 * at + 1] = weights[h];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        all[at * kDim + (lane + i * Shape::kLanes) * 4 + j] = sums[h][i][j];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads_here * kDim; i += kThreads) {
    const int h = i / kDim, d = i % kDim;
    if (d >= p.head_dim) continue;
    float greatest = -INFINITY;
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      greatest = fmaxf(greatest, scales[2 * (s * kHeads + h)]);
    }
    const float base = greatest == -INFINITY ? 0.0f : greatest;
    float sum = 0.0f, weight = 0.0f;
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const float factor = exp2_of(scales[2 * (s * kHeads + h)] - base);
      weight += factor * scales[2 * (s * kHeads + h) + 1];
      sum += factor * all[(s * kHeads + h) * kDim + d];
    }
    if (whole || item.parts == 1) {
      const float scale = weight > 0.0f ? 1.0f / weight : 0.0f;
      store1(p.out, p.q_type, (row_at + h) * p.head_dim + d, sum * scale);
    } else {
      const int64_t at = int64_t{number} * p.heads + head0 + h;
      p.partial[at * p.head_dim + d] = sum;
      if (d == 0) p.partial_ml[2 * at] = greatest, p.partial_ml[2 * at + 1] = weight;
    }
  }
}

template <int kDim>
cudaError_t launch_rows(const Attention& p, cudaStream_t stream) {
  const int64_t items = int64_t{p.most_parts} + p.most_tiles;
  return launch(attend_row<kDim>, items * units_of(p), kThreads,
                RowShape<kDim>::kShared + PageMap::bytes(p.spaces), stream, p);
}

}  // namespace

cudaError_t attend_rows_f32(const Attention& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_rows<64>(p, stream);
  if (p.head_dim <= 128) return launch_rows<128>(p, stream);
  return launch_rows<256>(p, stream);
}

cudaError_t preload_rows_f32() {
  cudaError_t error = preload(attend_row<64>, RowShape<64>::kShared + PageMap::kMostBytes);
  if (error == cudaSuccess) {
    error = preload(attend_row<128>, RowShape<128>::kShared + PageMap::kMostBytes);
  }
  if (error != cudaSuccess) return error;
  return preload(attend_row<256>, RowShape<256>::kShared + PageMap::kMostBytes);
}

}  // namespace cuda
}  // namespace aqua
