// Attention against a plain double-precision model of it, over random ragged batches, for every
// instruction set this processor has. Built with sanitizers (AQUA_SANITIZE) it also shows that no
// metadata makes the kernels leave their arrays.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "attention_batch.h"

namespace {

using aqua::Isa;
using aqua::test::Batch;
using aqua::test::Shape;

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

// What the pool and the result should be, by the definition.
struct Expected {
  aqua::test::Floats kv;
  std::vector<double> out;

  explicit Expected(const Batch& b) : kv(b.kv) {
    const auto& p = b.problem;
    out.assign(p.tokens * p.heads * p.head_dim, 0.0);
    for (int64_t s = 0; s < p.num_seqs; ++s) {
      for (int64_t row = p.query_starts[s]; row < p.query_starts[s + 1]; ++row) write(b, s, row);
      for (int64_t row = p.query_starts[s]; row < p.query_starts[s + 1]; ++row) attend(b, s, row);
    }
  }

  static int64_t slot(const Batch& b, int64_t s, int64_t position) {
    const auto& p = b.problem;
    const int64_t page = p.page_table[s * p.max_pages + position / p.page_tokens];
    if (page < 0) return -1;
    return page * b.page + p.layer * b.layer_stride + position % p.page_tokens * b.token;
  }

  void write(const Batch& b, int64_t s, int64_t row) {
    const int64_t at = slot(b, s, b.problem.positions[row]);
    if (at < 0) return;
    for (int64_t i = 0; i < b.token; ++i) {
      kv.set(at + i, b.k.get(row * b.token + i));
      kv.set(at + b.half + i, b.v.get(row * b.token + i));
    }
  }

  void attend(const Batch& b, int64_t s, int64_t row) {
    const auto& p = b.problem;
    const int64_t position = p.positions[row], dim = p.head_dim;
    const int64_t first = p.window > 0 ? std::max<int64_t>(0, position + 1 - p.window) : 0;
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t head = h / (p.heads / p.kv_heads) * dim;
      const int64_t q = (row * p.heads + h) * dim;
      std::vector<double> weights;
      std::vector<int64_t> slots;
      double top = -1e300, total = 0;
      for (int64_t key = first; key <= position; ++key) {
        const int64_t at = slot(b, s, key);
        if (at < 0) continue;
        double score = 0;
        for (int64_t d = 0; d < dim; ++d) score += double(b.q.get(q + d)) * kv.get(at + head + d);
        weights.push_back(score * p.scale);
        slots.push_back(at + b.half + head);
        top = std::max(top, weights.back());
      }
      for (double& w : weights) total += w = std::exp(w - top);
      for (size_t i = 0; i < slots.size(); ++i) {
        for (int64_t d = 0; d < dim; ++d) out[q + d] += weights[i] / total * kv.get(slots[i] + d);
      }
    }
  }
};

// Largest error over the result, in units of the values' size (about 1).
double error_of(const Batch& b, const Expected& expected) {
  double worst = 0;
  for (size_t i = 0; i < expected.out.size(); ++i) {
    const double error = std::abs(b.out.get(i) - expected.out[i]);
    worst = std::isnan(error) ? 1e9 : std::max(worst, error);
  }
  return worst;
}

int pick(std::mt19937& random, std::initializer_list<int> from) {
  return *(from.begin() + random() % from.size());
}

Shape random_shape(std::mt19937& random) {
  Shape s;
  s.kv_heads = pick(random, {1, 2, 3});
  s.heads = s.kv_heads * pick(random, {1, 2, 3, 5});
  s.head_dim = pick(random, {1, 7, 16, 33, 64, 80, 96, 128});
  s.page_tokens = pick(random, {1, 2, 8, 16, 64});
  s.kv_bf16 = random() % 2;
  s.q_bf16 = random() % 2;
  s.padding_rows = pick(random, {0, 3});
  s.padding_seqs = pick(random, {0, 2});
  const int seqs = 1 + random() % 4;
  for (int i = 0; i < seqs; ++i) {
    const int count = pick(random, {0, 1, 1, 2, 9, 40, 100});
    s.counts.push_back(count);
    s.lens.push_back(count + static_cast<int>(random() % 150));
    if (s.lens.back() == 0) s.lens.back() = 1;
  }
  return s;
}

void check_random_batches(Isa isa, int batches) {
  for (int i = 0; i < batches; ++i) {
    std::mt19937 random(1000 + i);
    const Shape shape = random_shape(random);
    Batch b(shape, 77 + i);
    b.problem.isa = isa;
    b.problem.layer = 1;
    b.problem.window = pick(random, {0, 0, 1, 5, 37});
    b.problem.deterministic = random() % 3 == 0;
    if (random() % 4 == 0) b.page_table[random() % b.page_table.size()] = -1;
    const Expected expected(b);
    const std::string error = aqua::paged_attention(b.problem);
    const std::string name = std::string(aqua::isa_name(isa)) + " batch " + std::to_string(i);
    expect(error.empty(), name + ": " + error);
    expect(b.kv.bytes == expected.kv.bytes, name + ": pool differs");
    const bool bf16_math = shape.kv_bf16 && isa >= Isa::kAvx512Bf16 && !b.problem.deterministic;
    const double allowed = bf16_math ? 0.03 : shape.q_bf16 ? 0.02 : 2e-5;
    const double worst = error_of(b, expected);
    expect(worst < allowed, name + ": error " + std::to_string(worst));
  }
}

std::vector<int64_t> random_cuts(std::mt19937& random, int64_t pages) {
  std::vector<int64_t> cuts;
  for (int64_t page = 1; page < pages && cuts.size() < 3; ++page) {
    if (random() % 4 == 0) cuts.push_back(page);
  }
  if (cuts.empty()) cuts.push_back(1);
  return cuts;
}

// A pool and spaces give what one pool of all pages gives, to the last bit.
void check_spaces(Isa isa, int batches) {
  for (int i = 0; i < batches; ++i) {
    std::mt19937 random(9000 + i);
    const Shape shape = random_shape(random);
    Batch whole(shape, 77 + i), parts(shape, 77 + i);
    if (whole.problem.pages < 2) continue;
    parts.split(random_cuts(random, parts.problem.pages));
    for (Batch* b : {&whole, &parts}) {
      b->problem.isa = isa;
      b->problem.layer = 1;
      b->problem.window = i % 3 == 0 ? 20 : 0;
      b->problem.deterministic = i % 2;
      expect(aqua::paged_attention(b->problem).empty(), "spaces: error");
    }
    const std::string name = std::string("spaces, ") + aqua::isa_name(isa) + " batch " +
                             std::to_string(i);
    expect(parts.all_pages() == whole.kv.bytes, name + ": pages differ");
    expect(parts.out.bytes == whole.out.bytes, name + ": result differs");
  }
}

// Slots beyond a sequence's end, and pages of others, hold NaN: none may reach a result.
void check_ignores_garbage(Isa isa) {
  for (const bool bf16 : {false, true}) {
    Shape shape;
    shape.kv_bf16 = bf16;
    shape.counts = {1, 40, 3};
    shape.lens = {41, 40, 35};
    Batch b(shape);
    b.problem.isa = isa;
    std::vector<char> written(b.kv.bytes.size(), 0);
    const int64_t n = b.problem.pages * b.page;
    std::vector<bool> known(n, false);
    for (int64_t s = 0; s < b.problem.num_seqs; ++s) {
      for (int64_t at = 0; at < b.kv_lens[s]; ++at) {
        const int64_t slot = Expected::slot(b, s, at);
        for (int64_t i = 0; i < b.token; ++i) known[slot + i] = known[slot + b.half + i] = true;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      if (!known[i]) b.kv.set(i, std::nanf(""));
    }
    const Expected expected(b);
    expect(aqua::paged_attention(b.problem).empty(), "garbage: error");
    expect(error_of(b, expected) < 0.03, std::string("garbage reaches results, ") +
                                             aqua::isa_name(isa) + (bf16 ? " bf16" : " f32"));
  }
}

// Random damage to the metadata gives an error or a result, and never a stray access.
void check_bad_metadata(Isa isa, int batches) {
  int refused = 0;
  for (int i = 0; i < batches; ++i) {
    std::mt19937 random(5000 + i);
    Batch b(random_shape(random), 3 + i);
    b.problem.isa = isa;
    if (i % 2 && b.problem.pages > 1) b.split(random_cuts(random, b.problem.pages));
    std::vector<int32_t>* arrays[] = {&b.positions, &b.query_starts, &b.kv_lens, &b.page_table};
    std::vector<int32_t>& array = *arrays[random() % 4];
    if (array.empty()) continue;
    array[random() % array.size()] =
        pick(random, {-2147483647, -7, -1, 0, 1, 50, 100000, 2147483647});
    if (random() % 8 == 0) b.problem.num_seqs = pick(random, {-1, 0, 1, 100});
    const auto before = b.all_pages();
    const std::string error = aqua::paged_attention(b.problem);
    if (!error.empty()) {
      ++refused;
      expect(b.all_pages() == before, "refused metadata still wrote: " + error);
    }
  }
  expect(refused > batches / 3, "bad metadata was refused only " + std::to_string(refused) +
                                    " times of " + std::to_string(batches));
}

}  // namespace

int main(int argc, char** argv) {
  const int scale = argc > 1 ? std::atoi(argv[1]) : 1;
  for (int i = 0; i <= static_cast<int>(aqua::detected_isa()); ++i) {
    const Isa isa = static_cast<Isa>(i);
    check_random_batches(isa, 40 * scale);
    check_spaces(isa, 20 * scale);
    check_ignores_garbage(isa);
    check_bad_metadata(isa, 60 * scale);
    std::printf("%s: %d failures so far\n", aqua::isa_name(isa), failures);
  }
  return failures == 0 ? 0 : 1;
}
