// What surrounds the attention kernels: the write of new keys and values, the plan, the merge.

#include "attention_plan.cuh"
#include "preload.h"

namespace aqua {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The sequence whose rows hold `row`, or -1: the last one that starts at or before it. All lanes of
// the warp together; each round cuts what is left into 32.
__device__ int owner_of(const Attention& p, int row, int lane) {
  int32_t low = 0, high = p.num_seqs[0];  // starts[low] <= row < starts[high], if any
  high = high < p.seqs ? high : p.seqs;
  while (high - low > 0) {
    const int32_t step = (high - low + 31) / 32;
    const int32_t at = low + lane * step;
    const bool before = at < high && p.query_starts[at] <= row;
    const int found = __popc(__ballot_sync(kAllLanes, before));
    if (found == 0) return -1;
    const int32_t next = low + (found - 1) * step;
    high = next + step < high ? next + step : high;
    low = next;
    if (step == 1) return low;
  }
  return -1;
}

__device__ void write_row(const Attention& p, int row, int lane) {
  const int seq = owner_of(p, row, lane);
  const Rows rows = rows_of(p, seq);
  const int32_t within = row - rows.start;
  if (rows.count == 0 || within < 0 || within >= rows.count) {
    const int64_t all = int64_t{p.heads} * p.head_dim;
    for (int64_t i = lane; i < all; i += 32) store1(p.out, p.q_type, row * all + i, 0.0f);
    return;
  }
  const int32_t position = rows.length - rows.count + within;
  const int32_t page = page_of(p, seq, position);
  if (page < 0) return;
  int64_t at = page * page_bytes(p);
  if (page >= p.pages) {
    const Space* const space = p.spaces.find(page);
    if (space == nullptr) return;
    at = from_pool(p.kv, *space) + int64_t{page - space->first} * page_bytes(p);
  }
  char* const start = static_cast<char*>(p.kv) + at;
  const int64_t keys = keys_at(p, position & (p.page_tokens - 1));
  const int32_t all = p.kv_heads * p.head_dim;
  for (int which = 0; which < 2; ++which) {
    const void* from = which ? p.v : p.k;
    const int64_t target = keys + which * values_after(p);
    if (p.kv_type == Type::kF32) {
      auto* const to = reinterpret_cast<float*>(start) + target;
      for (int32_t i = lane * 4; i < all; i += 128) {
        float x[4];
        load4(from, p.new_type, int64_t{row} * all + i, x);
        Vec16 raw;
        std::memcpy(&raw, x, 16);
        *reinterpret_cast<Vec16*>(to + i) = raw;
      }
    } else {
      auto* const to = reinterpret_cast<uint16_t*>(start) + target;
      for (int32_t i = lane * 8; i < all; i += 256) {
        float x[8];
        load4(from, p.new_type, int64_t{row} * all + i, x);
        load4(from, p.new_type, int64_t{row} * all + i + 4, x + 4);
        uint32_t raw[4];
        for (int j = 0; j < 4; ++j) {
          raw[j] = p.kv_type == Type::kBf16 ? pack2<Bf16>(x[2 * j], x[2 * j + 1])
                                            : pack2<F16>(x[2 * j], x[2 * j + 1]);
        }
        *reinterpret_cast<Vec16*>(to + i) = Vec16{raw[0], raw[1], raw[2], raw[3]};
      }
    }
  }
}

// Sum of `value` over the threads before this one, and over all.
template <typename N>
__device__ N scan(N value, N* sums, N* total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  N sum = value;
  for (int by = 1; by < 32; by *= 2) {
    const N other = __shfl_up_sync(kAllLanes, sum, by);
    if (lane >= by) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  N before = 0, all = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += sums[i];
    all += sums[i];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

// Writes the lists of items. One block; thread i has sequences [i each, (i + 1) each).
__device__ void plan(const Attention& p) {
  auto* sums = reinterpret_cast<long long*>(shared_memory());
  const int each = (p.seqs + kThreads - 1) / kThreads;
  const int first = threadIdx.x * each;
  const int last = first + each < p.seqs ? first + each : p.seqs;
  long long keys = 0, total = 0;
  for (int s = first; s < last; ++s) {
    const Rows rows = rows_of(p, s);
    if (is_decode(p, rows)) keys += rows.length - first_visible(p, rows.length - 1);
  }
  scan(keys, sums, &total);
  const int32_t part_keys = part_keys_of(p, total);
  long long parts = 0, tiles = 0, all_parts = 0, all_tiles = 0;
  int32_t unused;
  for (int s = first; s < last; ++s) {
    const Rows rows = rows_of(p, s);
    if (rows.count == 0) continue;
    if (is_decode(p, rows)) {
      parts += parts_of(p, rows.length - 1, part_keys, &unused);
    } else {
      tiles += tiles_of(p, rows);
    }
  }
  long long part = scan(parts, sums, &all_parts), tile = scan(tiles, sums, &all_tiles);
  auto* part_items = static_cast<Item*>(p.parts);
  auto* tile_items = static_cast<Item*>(p.tiles);
  auto* merges = static_cast<Merge*>(p.merges);
  for (int s = first; s < last; ++s) {
    const Rows rows = rows_of(p, s);
    Merge merge{static_cast<int32_t>(part), 0};
    if (rows.count > 0 && is_decode(p, rows)) {
      int32_t number;
      merge.count = parts_of(p, rows.length - 1, part_keys, &number);
      for (int i = 0; i < merge.count; ++i, ++part) {
        if (part < p.most_parts) part_items[part] = {s, number + i, merge.count, 0};
      }
    } else if (rows.count > 0) {
      // Late tiles see most keys: they come first, so that none of them is left over at the end.
      const int32_t count = tiles_of(p, rows);
      for (int i = 0; i < count; ++i, ++tile) {
        if (tile < p.most_tiles) tile_items[tile] = {s, count - 1 - i, 1, 0};
      }
    }
    merges[s] = merge;
  }
  if (threadIdx.x == 0) {
    auto* counts = reinterpret_cast<Counts*>(p.counts);
    counts->parts = static_cast<int32_t>(all_parts < p.most_parts ? all_parts : p.most_parts);
    counts->tiles = static_cast<int32_t>(all_tiles < p.most_tiles ? all_tiles : p.most_tiles);
    counts->part_keys = part_keys;
  }
}

__global__ __launch_bounds__(kThreads) void prepare(Attention p) {
  if (blockIdx.x == 0) {
    plan(p);
    return;
  }
  const int row = (blockIdx.x - 1) * kWarps + threadIdx.x / 32;
  if (row < p.tokens) write_row(p, row, threadIdx.x & 31);
}

// One warp per decode and query head.
__global__ __launch_bounds__(kThreads) void merge_parts(Attention p) {
  const int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (task >= int64_t{p.seqs} * p.heads) return;
  const int seq = static_cast<int>(task / p.heads), head = static_cast<int>(task % p.heads);
  const Merge merge = static_cast<const Merge*>(p.merges)[seq];
  if (merge.count < 2) return;
  const int lane = threadIdx.x & 31;
  const float* ml = p.partial_ml + (int64_t{merge.first} * p.heads + head) * 2;
  const int64_t stride = int64_t{p.heads} * 2;
  float most = -INFINITY;
  for (int i = 0; i < merge.count; ++i) most = fmaxf(most, ml[i * stride]);
  const float base = most == -INFINITY ? 0.0f : most;
  float weights = 0.0f, sum[kMaxHeadDim / 32];
  for (float& x : sum) x = 0.0f;
  for (int i = 0; i < merge.count; ++i) {
    const float factor = exp2_of(ml[i * stride] - base);
    weights += factor * ml[i * stride + 1];
    const float* values = p.partial + ((int64_t{merge.first} + i) * p.heads + head) * p.head_dim;
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 32; ++j) {
      const int d = lane + 32 * j;
      if (d < p.head_dim) sum[j] += factor * values[d];
    }
  }
  const float scale = weights > 0.0f ? 1.0f / weights : 0.0f;
  const int64_t out = (int64_t{rows_of(p, seq).start} * p.heads + head) * p.head_dim;
#pragma unroll
  for (int j = 0; j < kMaxHeadDim / 32; ++j) {
    const int d = lane + 32 * j;
    if (d < p.head_dim) store1(p.out, p.q_type, out + d, sum[j] * scale);
  }
}

std::string wrong(const std::string& what, int64_t got, const std::string& allowed) {
  return what + ": got " + std::to_string(got) + "; allowed: " + allowed;
}

}  // namespace

size_t lay_out(Attention* p, unsigned char* workspace) {
  p->most_parts = most_parts_of(*p);
  p->most_tiles = most_tiles_of(*p);
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    unsigned char* here = workspace == nullptr ? nullptr : workspace + at;
    at += (bytes + 255) / 256 * 256;
    return static_cast<void*>(here);
  };
  const auto parts = static_cast<size_t>(p->most_parts);
  p->counts = static_cast<int32_t*>(take(sizeof(Counts)));
  p->parts = take(parts * sizeof(Item));
  p->tiles = take(static_cast<size_t>(p->most_tiles) * sizeof(Item));
  p->merges = take(static_cast<size_t>(p->seqs) * sizeof(Merge));
  p->partial_ml = static_cast<float*>(take(parts * p->heads * 2 * sizeof(float)));
  p->partial = static_cast<float*>(take(parts * p->heads * p->head_dim * sizeof(float)));
  return at;
}

std::string check(const Attention& p) {
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0) {
    return wrong("query heads", p.heads, "a multiple of " + std::to_string(p.kv_heads));
  }
  const int step = on_matrix_units(p) ? 8 : 4;
  if (p.head_dim < step || p.head_dim % step != 0 || p.head_dim > kMaxHeadDim) {
    return wrong("head_dim", p.head_dim, "multiples of " + std::to_string(step) + " up to " +
                                             std::to_string(kMaxHeadDim));
  }
  if (p.page_tokens < 1 || p.page_tokens != 1 << p.page_shift) {
    return wrong("page_tokens", p.page_tokens, "a power of two");
  }
  if (p.layer < 0 || p.layer >= p.layers) {
    return wrong("layer", p.layer, "0 to " + std::to_string(p.layers - 1));
  }
  if (page_bytes(p) > INT32_MAX) return wrong("bytes of a page", page_bytes(p), "below 2 GiB");
  if (p.window < 0) return wrong("window", p.window, ">= 1, or 0 for none");
  if (!(p.scale > 0.0f)) return "scale: allowed: > 0";
  if (p.seqs < 1 || p.seqs > kMaxSequences) {
    return wrong("sequences", p.seqs, "1 to " + std::to_string(kMaxSequences));
  }
  return "";
}

cudaError_t attend(const Attention& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  const int64_t rows = (p.tokens + kWarps - 1) / kWarps;
  cudaError_t error =
      launch(prepare, 1 + rows, kThreads, kWarps * sizeof(long long), stream, p);
  if (error != cudaSuccess) return error;
  const auto matrix = p.kv_type == Type::kBf16 ? attend_matrix_bf16 : attend_matrix_f16;
  error = on_matrix_units(p) ? matrix(p, stream, false) : attend_rows_f32(p, stream);
  if (error != cudaSuccess) return error;
  if (!p.deterministic) {
    const int64_t tasks = int64_t{p.seqs} * p.heads;
    error = launch(merge_parts, (tasks + kWarps - 1) / kWarps, kThreads, 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  return on_matrix_units(p) ? matrix(p, stream, true) : cudaSuccess;
}

cudaError_t preload_prepare() {
  const cudaError_t error = preload(prepare);
  return error == cudaSuccess ? preload(merge_parts) : error;
}

}  // namespace cuda
}  // namespace aqua
