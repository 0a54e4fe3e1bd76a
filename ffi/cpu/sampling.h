// Choosing one token per row of logits; the rules are those of aqua_jax/ops/sampling.py.
#pragma once

#include <cstdint>

namespace aqua {

// How one row's token is chosen.
struct SamplingRule {
  float temperature;  // <= 0: the likeliest token, the first of equals
  int32_t top_k;      // <= 0: all
  float top_p;        // >= 1: all
  float min_p;        // <= 0: all; least probability relative to the likeliest token's
  float uniform;      // [0, 1): where in the distribution to draw
};

// The token for one row of `vocab` logits, or -1 when the largest is not finite. `scratch` holds
// 2 * vocab floats and is only used when the temperature is above 0.
int32_t sample_row(const float* logits, int64_t vocab, const SamplingRule& rule, float* scratch);

}  // namespace aqua
