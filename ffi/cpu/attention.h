// Fused KV write and ragged causal attention over a paged KV pool. No XLA here: attention_ffi.cc
// binds it, ffi/tests drives it directly.
//
// Letters: T tokens of the step, S sequences, P pool pages, L layers, H query heads, K kv heads,
// G = H / K, D head dim.
#pragma once

#include <cstdint>
#include <string>

#include "../common/isa.h"
#include "../common/spaces.h"

namespace aqua {

// Row-major arrays. kv[P, L, 2, page_tokens, K, D]; q, out [T, H, D]; k, v [T, K, D].
struct AttentionProblem {
  void* kv = nullptr;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;     // dtype of q
  bool kv_bf16 = false;    // otherwise f32, as below
  bool q_bf16 = false;
  bool new_bf16 = false;   // dtype of k and v
  int64_t pages = 0, layers = 0, page_tokens = 0, kv_heads = 0, head_dim = 0;
  int64_t tokens = 0, heads = 0, seqs = 0, max_pages = 0;
  const int32_t* positions = nullptr;     // [T]
  const int32_t* query_starts = nullptr;  // [S + 1]
  const int32_t* kv_lens = nullptr;       // [S], after this step's tokens
  const int32_t* page_table = nullptr;    // [S, max_pages]; negative: absent
  Spaces spaces;                          // of the pages from P on
  int32_t num_seqs = 0;
  int64_t layer = 0;
  int64_t window = 0;  // a query sees itself and window - 1 tokens before; 0: all
  float scale = 1.0f;
  bool deterministic = false;
  Isa isa = Isa::kGeneric;
};

// Writes k and v into their slots, then attends. Rows from query_starts[num_seqs] on are padding:
// nothing is written for them, their output is 0. Keys on absent pages are invisible; a row that
// sees no key gets 0.
//
// Returns an empty string, or what is wrong with the problem; nothing has been written then.
// Metadata can't make it read or write outside the arrays given.
std::string paged_attention(const AttentionProblem& problem);

}  // namespace aqua
