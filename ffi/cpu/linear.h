// Matrix products against packed weights, as the handlers of linear.cc and mlp.cc share them.
#pragma once

#include <cstdint>
#include <functional>

#include "linear_kernels.h"

namespace aqua::linear {

enum class Element { kBf16, kF32 };

// The left operand as XLA hands it over, with the norm that may stand before a projection.
struct Input {
  const void* data;  // [rows][k]
  Element element;
  int64_t rows;
  int64_t k;
  const float* norm_scale = nullptr;  // [k]: rms_norm the rows first
  float norm_eps = 0;
};

// Weights in the layout of ops/linear.py's `pack`.
struct Weights {
  const char* data;
  Element element;
  int64_t panels;  // ceil(n / 64)
  int64_t steps;   // ceil(k / k per step)
};

inline int64_t k_per_step(Element element) { return element == Element::kBf16 ? 32 : 16; }

// 64-byte aligned memory of the calling thread, kept for its next call. Two slots, because the
// fused MLP holds its input and its hidden rows at once; a third for sums. Grows, never shrinks:
// a fresh 1.5 MiB block a call costs 400 page faults, more than the packing itself.
enum class Slot { kInput, kHidden, kSums };
char* thread_scratch(Slot slot, int64_t bytes);

// Writes x in A tiles of the weights' element type; the result lives in the caller's `slot`.
const char* pack_rows(const Input& x, Element element, int64_t steps, Slot slot);

// Rows that one task takes: enough tasks to balance the threads, and sums of `group` panels that
// stay in L2. A multiple of 16.
int64_t rows_per_task(int64_t rows, int64_t tasks_per_block, int64_t group);

// Calls store(first panel, panels, first row, rows, sums, stride) for every block of rows x `group`
// panels (the last may have fewer); panel i of the block has its sums [rows][64] at
// sums + i * stride.
using Store = std::function<void(int64_t panel, int64_t panels, int64_t row, int64_t rows,
                                 const float* sums, int64_t stride)>;
void multiply(const char* packed, int64_t rows, const Weights& weights, int64_t group,
              const Store& store);

// out[rows][n] = packed * weights (+ bias[n]) (+ residual[rows][n]); rows from `rows` up to
// `all_rows` become 0. bias and residual may be null.
void multiply_to(const char* packed, int64_t rows, int64_t all_rows, const Weights& weights,
                 int64_t n, const float* bias, const float* residual, float* out);

}  // namespace aqua::linear
