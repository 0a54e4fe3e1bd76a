// A random ragged batch over a random pool, and what attention over it should give.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../common/thread_pool.h"
#include "../cpu/attention.h"

namespace aqua::test {

struct Shape {
  int64_t layers = 2, page_tokens = 16, kv_heads = 2, heads = 4, head_dim = 64;
  bool kv_bf16 = false, q_bf16 = false;
  std::vector<int> counts, lens;  // of each sequence: rows in this step, length after it
  int padding_rows = 0, padding_seqs = 0;
};

inline float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t narrow(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// An array of f32 or bf16 on the heap, at its exact size so that overruns are seen.
struct Floats {
  bool bf16 = false;
  std::vector<char> bytes;

  void resize(int64_t n, bool as_bf16) {
    bf16 = as_bf16;
    bytes.assign(n * (bf16 ? 2 : 4), 0);
  }
  float get(int64_t i) const {
    if (bf16) {
      uint16_t x;
      std::memcpy(&x, &bytes[2 * i], 2);
      return widen(x);
    }
    float x;
    std::memcpy(&x, &bytes[4 * i], 4);
    return x;
  }
  void set(int64_t i, float x) {
    if (bf16) {
      const uint16_t y = narrow(x);
      std::memcpy(&bytes[2 * i], &y, 2);
    } else {
      std::memcpy(&bytes[4 * i], &x, 4);
    }
  }
  void randomise(std::mt19937& random) {
    std::normal_distribution<float> normal;
    const int64_t n = static_cast<int64_t>(bytes.size()) / (bf16 ? 2 : 4);
    for (int64_t i = 0; i < n; ++i) set(i, normal(random));
  }
};

struct Batch {
  Shape shape;
  AttentionProblem problem;
  Floats kv, q, k, v, out;
  std::vector<std::vector<char>> behind;  // pages of spaces
  std::vector<Space> spaces;
  std::vector<int32_t> positions, query_starts, kv_lens, page_table;
  int64_t token, half, layer_stride, page;  // elements

  explicit Batch(const Shape& s, unsigned seed = 1) : shape(s) {
    std::mt19937 random(seed);
    const int64_t seqs = static_cast<int64_t>(s.counts.size());
    int64_t rows = 0, pages = 1, max_pages = 1;
    for (int64_t i = 0; i < seqs; ++i) {
      rows += s.counts[i];
      const int64_t n = (s.lens[i] + s.page_tokens - 1) / s.page_tokens;
      pages += n;
      max_pages = std::max(max_pages, n);
    }
    token = s.kv_heads * s.head_dim;
    half = s.page_tokens * token;
    layer_stride = 2 * half;
    page = s.layers * layer_stride;
    const int64_t all_rows = rows + s.padding_rows, all_seqs = seqs + s.padding_seqs;
    kv.resize(pages * page, s.kv_bf16);
    q.resize(all_rows * s.heads * s.head_dim, s.q_bf16);
    k.resize(all_rows * token, false);
    v.resize(all_rows * token, false);
    out.resize(all_rows * s.heads * s.head_dim, s.q_bf16);
    for (Floats* array : {&kv, &q, &k, &v, &out}) array->randomise(random);

    std::vector<int32_t> free_pages(pages);
    for (int64_t i = 0; i < pages; ++i) free_pages[i] = static_cast<int32_t>(i);
    std::shuffle(free_pages.begin(), free_pages.end(), random);
    positions.assign(all_rows, 0);
    query_starts.assign(all_seqs + 1, static_cast<int32_t>(rows));
    kv_lens.assign(all_seqs, 0);
    page_table.assign(all_seqs * max_pages, -1);
    int32_t row = 0;
    for (int64_t i = 0; i < seqs; ++i) {
      query_starts[i] = row;
      kv_lens[i] = s.lens[i];
      for (int j = 0; j < s.counts[i]; ++j) positions[row++] = s.lens[i] - s.counts[i] + j;
      for (int64_t j = 0; j * s.page_tokens < s.lens[i]; ++j) {
        page_table[i * max_pages + j] = free_pages.back();
        free_pages.pop_back();
      }
    }
    problem.pages = pages;
    problem.layers = s.layers;
    problem.page_tokens = s.page_tokens;
    problem.kv_heads = s.kv_heads;
    problem.head_dim = s.head_dim;
    problem.tokens = all_rows;
    problem.heads = s.heads;
    problem.seqs = all_seqs;
    problem.max_pages = max_pages;
    problem.num_seqs = static_cast<int32_t>(seqs);
    problem.kv_bf16 = s.kv_bf16;
    problem.q_bf16 = s.q_bf16;
    problem.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    point();
  }

  Batch(const Batch&) = delete;

  // Cuts the pool before each of these pages: what follows the first cut lies in spaces.
  void split(const std::vector<int64_t>& cuts) {
    const int64_t bytes = page * (shape.kv_bf16 ? 2 : 4);
    for (size_t i = 0; i < cuts.size(); ++i) {
      const int64_t end = i + 1 < cuts.size() ? cuts[i + 1] : problem.pages;
      behind.emplace_back(&kv.bytes[cuts[i] * bytes], &kv.bytes[0] + end * bytes);
      const auto address = reinterpret_cast<uintptr_t>(behind.back().data());
      spaces.push_back({static_cast<int32_t>(cuts[i]), static_cast<int32_t>(end - cuts[i]),
                        static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32), 0, 0,
                        {}});
    }
    problem.pages = cuts[0];
    problem.spaces = {spaces.data(), static_cast<int32_t>(spaces.size())};
    // A copy at its exact size, so that overruns are seen.
    kv.bytes = std::vector<char>(kv.bytes.begin(), kv.bytes.begin() + cuts[0] * bytes);
    point();
  }

  // All pages, wherever they lie.
  std::vector<char> all_pages() const {
    std::vector<char> all = kv.bytes;
    for (const auto& part : behind) all.insert(all.end(), part.begin(), part.end());
    return all;
  }

  void point() {
    problem.kv = kv.bytes.data();
    problem.q = q.bytes.data();
    problem.k = k.bytes.data();
    problem.v = v.bytes.data();
    problem.out = out.bytes.data();
    problem.positions = positions.data();
    problem.query_starts = query_starts.data();
    problem.kv_lens = kv_lens.data();
    problem.page_table = page_table.data();
  }
};

}  // namespace aqua::test
