// What attention.cc needs from an instruction set: a table of functions, one table per set.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "attention_tiles.h"

namespace aqua {

// Keys are taken in blocks of so many tokens, aligned to multiples of it in absolute position.
constexpr int kBlock = 16;

// One block of keys and values as addresses of each token's first kv head.
struct KeyBlock {
  const void* k[kBlock];
  const void* v[kBlock];
  uint32_t visible = 0;         // bit t: the rows may see token t
  int first = 0, last = 0;      // tokens [first, last) hold all visible ones
  const KeyBlock* next = nullptr;  // prefetched meanwhile; null: none
};

struct RowShape {
  int heads, kv_heads, head_dim;
  int padded;  // head_dim rounded up to padded_dim()
};

// Running softmax of one token's H rows, base 2. Arrays are [H], [H, padded] for q and acc, whose
// elements lie in the kernel's own order.
struct RowState {
  float* q;    // scaled by softmax scale * log2(e)
  float* max;  // starts at -inf
  float* sum;  // starts at 0
  float* acc;  // starts at 0
};

struct AttentionKernels {
  // head_dim rounded up to what RowState arrays need.
  int (*padded_dim)(int head_dim);
  // q[H, D] of one token (bf16 or f32) into state.q, and the running values reset.
  void (*start_rows)(const RowShape&, const void* q, bool q_bf16, bool kv_bf16, float scale,
                     RowState& state);
  // One block of keys into the running softmax, for all heads.
  void (*add_block)(const RowShape&, bool kv_bf16, const KeyBlock&, RowState& state);
  // Folds `other` (same q) into `state`.
  void (*merge_rows)(const RowShape&, RowState& state, const RowState& other);
  // acc / sum into out[H, D]; 0 where sum is 0.
  void (*finish_rows)(const RowShape&, bool kv_bf16, const RowState& state, void* out,
                      bool out_bf16);
  // n elements, each side f32 or bf16.
  void (*convert)(const void* from, bool from_bf16, void* to, bool to_bf16, int64_t n);
  // A tile of prompt rows, all arithmetic in f32.
  AttendTile attend_tile;
};

const AttentionKernels& attention_kernels_generic();
#if defined(__x86_64__)
const AttentionKernels& attention_kernels_avx2();
const AttentionKernels& attention_kernels_avx512();
#endif

}  // namespace aqua
