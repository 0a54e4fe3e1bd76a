// Index arithmetic of the attention kernels: who owns a row, what it sees, how work is cut. Runs on
// host and device; ffi/tests/cuda_attention_test.cc compares it with brute force.
#pragma once

#include "attention.h"
#include "device.cuh"

namespace aqua {
namespace cuda {

struct Counts {
  int32_t parts, tiles;   // items there are
  int32_t part_keys;      // keys of a part, which begins at a multiple of it
};

// A part: keys [part * part_keys, (part + 1) * part_keys) of the one row of `seq`; `parts` of the
// row in all. A tile: `part` counts tiles of the sequence's rows.
struct alignas(16) Item {
  int32_t seq, part, parts, unused;
};

// Parts [first, first + count) of the items are sequence s's.
struct alignas(8) Merge {
  int32_t first, count;
};

// The rows of a sequence in this step; count is 0 for what is padding or contradicts itself.
struct Rows {
  int32_t start, count, length;
};

AQUA_HD Rows rows_of(const Attention& p, int seq) {
  int32_t n = p.num_seqs[0];
  n = n < p.seqs ? n : p.seqs;
  if (seq < 0 || seq >= n) return {0, 0, 0};
  const int32_t start = p.query_starts[seq], end = p.query_starts[seq + 1];
  const int32_t length = p.kv_lens[seq];
  if (start < 0 || end <= start || end > p.tokens || length < end - start ||
      length > int64_t{p.max_pages} * p.page_tokens) {
    return {0, 0, 0};
  }
  return {start, end - start, length};
}

// First key that a query at `position` sees; it sees itself last.
AQUA_HD int32_t first_visible(const Attention& p, int32_t position) {
  return p.window > 0 && position >= p.window ? position + 1 - p.window : 0;
}

AQUA_HD bool is_decode(const Attention& p, const Rows& rows) {
  return rows.count == 1 && !p.deterministic;
}

AQUA_HD bool on_matrix_units(const Attention& p) { return p.kv_type != Type::kF32; }

// Query heads that one block of `parts` takes together, and how many such blocks there are.
AQUA_HD int32_t unit_heads(const Attention& p) { return on_matrix_units(p) ? 16 : 8; }
AQUA_HD int32_t units_of(const Attention& p) {
  return p.kv_heads * ((p.group + unit_heads(p) - 1) / unit_heads(p));
}

// Rows of a tile of the matrix kernel: tokens times G, flattened, a token's heads together.
AQUA_HD constexpr int tile_rows(int head_dim) { return head_dim <= 128 ? 128 : 64; }
AQUA_HD int32_t tiles_of(const Attention& p, const Rows& rows) {
  if (!on_matrix_units(p)) return rows.count;
  const int per_tile = tile_rows(p.head_dim);
  return static_cast<int32_t>((int64_t{rows.count} * p.group + per_tile - 1) / per_tile);
}

// Keys of a part, such that decodes that see `keys` keys in all become about kTargetItems items.
AQUA_HD int32_t part_keys_of(const Attention& p, int64_t keys) {
  const int64_t most = kTargetItems / units_of(p) > 0 ? kTargetItems / units_of(p) : 1;
  int64_t part = (keys + most - 1) / most;
  part = (part + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
  return static_cast<int32_t>(part < kLeastPart ? kLeastPart : part);
}

// Parts of the row at `position`, and the first one's number.
AQUA_HD int32_t parts_of(const Attention& p, int32_t position, int32_t part_keys, int32_t* first) {
  *first = first_visible(p, position) / part_keys;
  return position / part_keys - *first + 1;
}

// Bounds on items, for shapes alone. A row of n keys has at most n / part + 2 parts.
AQUA_HD int32_t most_parts_of(const Attention& p) {
  if (p.deterministic) return 0;
  const int32_t target = kTargetItems / units_of(p) > 0 ? kTargetItems / units_of(p) : 1;
  return target + 2 * (p.seqs < p.tokens ? p.seqs : p.tokens);
}
AQUA_HD int32_t most_tiles_of(const Attention& p) {
  if (!on_matrix_units(p)) return p.tokens;
  const int64_t least = p.deterministic ? 1 : 2;  // rows of a sequence that has tiles
  if (p.tokens < least) return 0;
  const int64_t chunks = p.tokens / least < p.seqs ? p.tokens / least : p.seqs;
  return static_cast<int32_t>(int64_t{p.tokens} * p.group / tile_rows(p.head_dim) + chunks);
}

AQUA_HD int64_t page_bytes(const Attention& p) {
  return int64_t{p.layers} * 2 * p.page_tokens * p.kv_heads * p.head_dim * size_of(p.kv_type);
}
// Elements from a page's start to a token's keys; its values are `values_after` further on.
AQUA_HD int64_t keys_at(const Attention& p, int32_t slot) {
  return (int64_t{p.layer} * 2 * p.page_tokens + slot) * p.kv_heads * p.head_dim;
}
AQUA_HD int64_t values_after(const Attention& p) {
  return int64_t{p.page_tokens} * p.kv_heads * p.head_dim;
}

// The table's entry for a key, whether there is such a page or not. `key` lies within the table.
AQUA_HD int32_t page_of(const Attention& p, int seq, int32_t key) {
  return p.page_table[int64_t{seq} * p.max_pages + (key >> p.page_shift)];
}

// Where 16-byte chunk `chunk` of row `row` of a tile in shared memory lies, in bytes: chunks are
// permuted within a row so that eight rows' same chunks fall into different banks.
template <int kDim>
AQUA_HD int swizzled(int row, int chunk) {
  return row * (kDim * 2) + ((chunk ^ (row & 7)) << 4);
}

}  // namespace cuda
}  // namespace aqua
