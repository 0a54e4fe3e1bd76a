// Greedy choice is one pass for the maximum and a search for its first place. A random one adds a
// pass of exponentials and, with filters, a histogram of the scaled logits: it finds the bin a
// threshold lies in, so only the few values down to that bin are sorted, never the row.

#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
// One source for three instruction sets, chosen when the library is loaded.
#define AQUA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define AQUA_CLONES
#endif

namespace aqua {
namespace {

constexpr int64_t kBlock = 256;   // values per partial sum of the inverse CDF
constexpr int kBins = 2048;       // of scaled logits, 0 (the largest) downwards
constexpr float kBinsPerUnit = 64.0f;  // 2048 bins reach 32 below the largest: e^-32 of its weight

// The largest value; NaN if any is NaN or +infinity.
AQUA_CLONES float row_max(const float* x, int64_t n) {
  constexpr int kLanes = 64;
  float lanes[kLanes];
  float poison = 0.0f;  // becomes NaN with the first NaN or +infinity
  for (int j = 0; j < kLanes; ++j) lanes[j] = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  float poisons[kLanes] = {};
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float v = x[i + j];
      lanes[j] = lanes[j] > v ? lanes[j] : v;
      // -inf is a banned token and allowed; v * 0 is NaN for NaN and +inf alone then.
      poisons[j] += (v < -std::numeric_limits<float>::max() ? 0.0f : v) * 0.0f;
    }
  }
  float best = -std::numeric_limits<float>::infinity();
  for (; i < n; ++i) {
    best = best > x[i] ? best : x[i];
    poison += (x[i] < -std::numeric_limits<float>::max() ? 0.0f : x[i]) * 0.0f;
  }
  for (int j = 0; j < kLanes; ++j) {
    best = best > lanes[j] ? best : lanes[j];
    poison += poisons[j];
  }
  return poison == 0.0f ? best : std::numeric_limits<float>::quiet_NaN();
}

AQUA_CLONES int64_t first_equal(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = std::min(n, i + kBlock);
    int hits = 0;
    for (int64_t j = i; j < end; ++j) hits += x[j] == value;
    if (hits == 0) continue;
    for (int64_t j = i; j < end; ++j) {
      if (x[j] == value) return j;
    }
  }
  return n - 1;
}

// exp for x <= 0 to 2 ulp, or 0 unless `keep`: 2^k times a polynomial on [-ln2/2, ln2/2] (Cephes'
// coefficients). The choice is a mask on the bits of 2^k: a branch would keep loops scalar.
inline float exp_negative(float x, bool keep = true) {
  const float clipped = x < -87.0f ? -87.0f : x;
  // Truncation rounds to nearest here, and unlike floor vectorises on every instruction set.
  const int32_t power = static_cast<int32_t>(clipped * 1.44269504f - 0.5f);
  const float k = static_cast<float>(power);
  const float r = (clipped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t mask = -static_cast<int32_t>(keep & (x >= -87.0f));
  const int32_t bits = ((power + 127) << 23) & mask;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// scaled[i] = (x[i] - largest) * inverse temperature, all <= 0.
AQUA_CLONES void scale_row(const float* x, int64_t n, float largest, float inverse, float* scaled) {
  for (int64_t i = 0; i < n; ++i) scaled[i] = (x[i] - largest) * inverse;
}

// weights[i] = exp(scaled[i]) for values >= threshold, else 0.
AQUA_CLONES void weigh(const float* scaled, int64_t n, float threshold, float* weights) {
  for (int64_t i = 0; i < n; ++i) weights[i] = exp_negative(scaled[i], scaled[i] >= threshold);
}

AQUA_CLONES float block_sum(const float* x, int64_t n) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) lanes[j] += x[i + j];
  }
  float sum = 0.0f;
  for (; i < n; ++i) sum += x[i];
  for (float lane : lanes) sum += lane;
  return sum;
}

int bin_of(float scaled) {
  const float place = -scaled * kBinsPerUnit;
  return place < kBins - 1 ? static_cast<int>(place) : kBins - 1;
}

// The least scaled logit that min-p, top-k and top-p keep. Ties at the cut are kept. `weights` is
// scratch.
float filter_threshold(const float* scaled, int64_t vocab, const SamplingRule& rule,
                       float* weights) {
  float threshold = -std::numeric_limits<float>::infinity();
  if (rule.min_p > 0.0f) threshold = std::log(rule.min_p);
  const bool by_rank = rule.top_k > 0 && rule.top_k < vocab;
  const bool by_mass = rule.top_p < 1.0f;
  if (!by_rank && !by_mass) return threshold;

  std::vector<int32_t> counts(kBins, 0);
  std::vector<double> masses(kBins, 0.0);
  double total = 0.0;
  if (by_rank) {
    for (int64_t i = 0; i < vocab; ++i) counts[bin_of(scaled[i])] += scaled[i] >= threshold;
  } else {
    weigh(scaled, vocab, threshold, weights);
    for (int64_t i = 0; i < vocab; ++i) masses[bin_of(scaled[i])] += weights[i];
  }
  // The first bin whose end satisfies every filter; what is above it can be sorted cheaply.
  int last = 0;
  if (by_rank) {
    int64_t seen = counts[0];
    while (last + 1 < kBins && seen < rule.top_k) seen += counts[++last];
  } else {
    for (double mass : masses) total += mass;
    double seen = masses[0];
    while (last + 1 < kBins && seen < rule.top_p * total) seen += masses[++last];
  }
  std::vector<float> kept;
  for (int64_t i = 0; i < vocab; ++i) {
    if (scaled[i] >= threshold && bin_of(scaled[i]) <= last) kept.push_back(scaled[i]);
  }
  std::sort(kept.begin(), kept.end(), std::greater<float>());
  if (kept.empty()) return threshold;
  if (by_rank) {
    const int64_t rank = std::min<int64_t>(rule.top_k, static_cast<int64_t>(kept.size()));
    threshold = std::max(threshold, kept[rank - 1]);
    while (!kept.empty() && kept.back() < threshold) kept.pop_back();  // ties stay
    total = 0.0;
    for (float value : kept) total += exp_negative(value);
  }
  if (by_mass) {
    double seen = 0.0;
    for (float value : kept) {
      seen += exp_negative(value);
      if (seen >= rule.top_p * total) {
        threshold = std::max(threshold, value);
        break;
      }
    }
  }
  return threshold;
}

// The first index whose cumulative weight exceeds uniform * total, in two levels.
int32_t draw(const float* weights, int64_t n, float uniform, std::vector<float>& ends) {
  ends.clear();
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i += kBlock) {
    sum += block_sum(weights + i, std::min(kBlock, n - i));
    ends.push_back(sum);
  }
  const float target = uniform * sum;
  int64_t block = std::upper_bound(ends.begin(), ends.end(), target) - ends.begin();
  block = std::min<int64_t>(block, static_cast<int64_t>(ends.size()) - 1);
  float within = block > 0 ? ends[block - 1] : 0.0f;
  const int64_t end = std::min(n, (block + 1) * kBlock);
  // Rounding may leave the target unreached: then it is the block's last possible token.
  int64_t last = block * kBlock;
  for (int64_t i = block * kBlock; i < end; ++i) {
    if (weights[i] <= 0.0f) continue;
    last = i;
    within += weights[i];
    if (within > target) break;
  }
  return static_cast<int32_t>(last);
}

}  // namespace

int32_t sample_row(const float* logits, int64_t vocab, const SamplingRule& rule, float* scratch) {
  const float largest = row_max(logits, vocab);
  if (!std::isfinite(largest)) return -1;
  if (rule.temperature <= 0.0f) return static_cast<int32_t>(first_equal(logits, vocab, largest));
  scale_row(logits, vocab, largest, 1.0f / rule.temperature, scratch);
  float* weights = scratch + vocab;
  weigh(scratch, vocab, filter_threshold(scratch, vocab, rule, weights), weights);
  std::vector<float> ends;
  ends.reserve(vocab / kBlock + 1);
  return draw(weights, vocab, rule.uniform, ends);
}

}  // namespace aqua
