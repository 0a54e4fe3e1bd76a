// Kernels over one row of floats, one set per instruction set, chosen at run time with kernels()
// of linear_kernels.h. All arithmetic is f32.
#pragma once

#include <cstdint>

namespace aqua {

struct RowKernels {
  // Rounds to bf16, to nearest even; NaN stays NaN.
  void (*to_bf16)(const float* from, uint16_t* to, int64_t count);
  void (*from_bf16)(const uint16_t* from, float* to, int64_t count);
  // to[i] = x[i] / sqrt(mean(x^2) + eps) * scale[i]
  void (*rms_norm)(const float* x, const float* scale, float eps, float* to, int64_t count);
  // to[i] = gate[i] / (1 + exp(-gate[i])) * up[i]
  void (*swiglu)(const float* gate, const float* up, float* to, int64_t count);
  // Rotary embedding of one head of 2 * half elements: pair i is (head[i], head[half + i]).
  void (*rotate)(const float* head, const float* cos, const float* sin, float* to, int64_t half);
};

// Those that go with linear::kernels().
const RowKernels& row_kernels();

}  // namespace aqua
