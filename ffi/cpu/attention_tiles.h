// Attention of a tile of prompt rows: one kv head of one sequence, all its query heads, several
// tokens. Matrices are kept transposed, keys x rows, so that a vector register holds one key's
// scores for 16 rows: the softmax needs no step across a register.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aqua {

struct TileProblem {
  // Row t * group + g of the tile is query head g of token t; its q starts at
  // q + (t * token_stride + g * head_dim) elements, its out likewise.
  const void* q = nullptr;
  void* out = nullptr;
  bool q_bf16 = false;  // dtype of q and out
  bool kv_bf16 = false;
  int64_t token_stride = 0;
  int tokens = 0, group = 0, head_dim = 0;
  int64_t position = 0;  // of the first token
  int64_t window = 0;    // 0: none
  float scale = 1.0f;
  int64_t first_key = 0, last_key = 0;  // keys [first_key, last_key) are seen by some row
  // Fills rows[i] with the address of key first + i (of this kv head); null: absent.
  void (*locate)(const void* context, int64_t first, int count, const void** rows) = nullptr;
  const void* context = nullptr;
  int64_t value_offset = 0;  // bytes from a key to its value
  float* scratch = nullptr;  // tile_scratch() floats, 64-byte aligned
};

using AttendTile = void (*)(const TileProblem&);

// Floats of scratch for `rows` rows (tokens * group), enough for every implementation.
size_t tile_scratch(int64_t rows, int head_dim);

#if defined(__x86_64__)
// For bf16 pools. q and the softmax weights are rounded to bf16, sums are f32.
void attend_tile_avx512bf16(const TileProblem&);
void attend_tile_amx(const TileProblem&);
#endif

}  // namespace aqua
