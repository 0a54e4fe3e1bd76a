// Fused KV write and ragged causal attention over a paged KV pool, on the device.
//
// Letters: T tokens of the step, S sequences, P pool pages, L layers, H query heads, K kv heads,
// G = H / K, D head dim.
//
// Four kernels, launched one after another on the step's stream, none of which waits for the host:
//   prepare   writes k and v into their slots, zeroes padding, and (one block) cuts the step into
//             items: parts of decodes' keys, and tiles of prompt chunks' rows
//   parts     decodes: one block per part and kv head (its query heads together)
//   merge     decodes of several parts: sums them up, in the order of their keys
//   tiles     chunks: one block per tile of rows and kv head
// Their grids are bounds from shapes; a block that has no item ends at once. With 16-bit pools
// parts and tiles run on the matrix units (attention_matrix.cuh), with f32 pools on plain f32
// arithmetic, a row at a time (attention_rows.cuh).
//
// Deterministic mode gives every row to `tiles`, where nothing is split: its result then depends on
// its own keys only, which are taken in blocks at fixed absolute positions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../common/spaces.h"
#include "device.h"

namespace aqua {
namespace cuda {

// Items per pass over all decodes that the split aims at, and the least keys of an item: fine
// enough to even out over a GPU's 100-150 multiprocessors, coarse enough that reading and writing
// the partial results stays below 2% of reading the keys and values.
constexpr int kTargetItems = 2048;
constexpr int kLeastPart = 128;
constexpr int kBlockKeys = 64;  // parts are multiples of this
constexpr int kMaxSequences = 8192, kMaxHeadDim = 256;

// One layer's attention of one step; row-major arrays. kv[P, L, 2, page_tokens, K, D];
// q, out [T, H, D]; k, v [T, K, D]. Passed to kernels by value.
struct Attention {
  void* kv;
  const void* q;
  const void* k;
  const void* v;
  void* out;  // of q's dtype
  const int32_t* query_starts;  // [S + 1]
  const int32_t* kv_lens;       // [S], after this step's tokens
  const int32_t* page_table;    // [S, max_pages]; outside pool and spaces: absent
  Spaces spaces;                // of the pages from P on
  const int32_t* num_seqs;      // [1]
  Type kv_type, q_type, new_type;
  int32_t pages, layers, page_tokens, page_shift, kv_heads, head_dim, group;
  int32_t tokens, heads, seqs, max_pages, layer, window;
  float scale;  // of the scores, times log2(e)
  bool deterministic;
  // In the workspace.
  int32_t* counts;    // Counts
  void* parts;        // Item[most_parts]
  void* tiles;        // Item[most_tiles]
  void* merges;       // Merge[S]
  float* partial;     // [most_parts, H, D]: sums of weights times values
  float* partial_ml;  // [most_parts, H, 2]: greatest score, sum of weights
  int32_t most_parts, most_tiles;
};

// Sets the bounds and the workspace's pointers (from `workspace`, if not null) of a problem whose
// shapes are set; its size in bytes.
size_t lay_out(Attention* problem, unsigned char* workspace);

// What is wrong with a problem's shapes; empty if nothing is. Metadata lies on the device and can't
// be checked: a sequence that contradicts itself is skipped, its rows are 0.
std::string check(const Attention& problem);

// Launches all kernels.
cudaError_t attend(const Attention& problem, cudaStream_t stream);

// One translation unit each, since they take long to compile.
cudaError_t attend_matrix_bf16(const Attention& problem, cudaStream_t stream, bool tiles);
cudaError_t attend_matrix_f16(const Attention& problem, cudaStream_t stream, bool tiles);
cudaError_t attend_rows_f32(const Attention& problem, cudaStream_t stream);

}  // namespace cuda
}  // namespace aqua
