// The arithmetic that host and device share in ffi/cuda, against brute force: how a step is cut into
// items, the order of page copies, the checksum.

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../cpu/moves_copy.h"
#include "../cuda/attention_plan.cuh"
#include "../cuda/moves_checksum.h"
#include "../cuda/pages.h"

namespace {

using namespace aqua::cuda;

int failures = 0;
std::mt19937 random_source(7);

void check(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_source); }

template <typename T>
T pick(std::initializer_list<T> all) {
  return all.begin()[draw(0, static_cast<int>(all.size()) - 1)];
}

// One random step: every key of a decode lies in one part, and no list outgrows its bound.
void plan_once() {
  Attention p{};
  p.kv_type = pick({Type::kF32, Type::kBf16});
  p.page_tokens = 1 << draw(0, 6);
  p.kv_heads = pick({1, 2, 8, 3000});
  p.group = pick({1, 4, 7, 17, 40});
  p.heads = p.kv_heads * p.group;
  p.head_dim = 64;
  p.seqs = draw(1, 40);
  p.window = pick({0, 0, 1, 100, 1000});
  p.deterministic = draw(0, 3) == 0;
  const int most_keys = pick({100, 5000, 200000});
  p.max_pages = most_keys / p.page_tokens + 1;
  std::vector<int32_t> starts{0}, lens;
  const int used = draw(0, p.seqs);
  for (int s = 0; s < p.seqs; ++s) {
    const int count = s < used ? pick({0, 1, 1, 1, 2, 30, 300}) : 0;
    starts.push_back(starts.back() + count);
    lens.push_back(std::min(most_keys, std::max(count, draw(1, most_keys))));
    if (lens.back() < count) lens.back() = count;
  }
  p.tokens = starts.back() + draw(0, 3);
  if (p.tokens == 0) p.tokens = 1;
  const int32_t num_seqs = used;
  p.query_starts = starts.data();
  p.kv_lens = lens.data();
  p.num_seqs = &num_seqs;

  int64_t keys = 0, parts = 0, tiles = 0, rows = 0;
  for (int s = 0; s < p.seqs; ++s) {
    const Rows r = rows_of(p, s);
    if (is_decode(p, r)) keys += r.length - first_visible(p, r.length - 1);
    rows += r.count;
  }
  const int32_t part_keys = part_keys_of(p, keys);
  check(part_keys >= kLeastPart && part_keys % kBlockKeys == 0, "a part is whole blocks of keys");
  for (int s = 0; s < p.seqs; ++s) {
    const Rows r = rows_of(p, s);
    if (r.count == 0) continue;
    if (!is_decode(p, r)) {
      tiles += tiles_of(p, r);
      continue;
    }
    int32_t first;
    const int32_t count = parts_of(p, r.length - 1, part_keys, &first);
    const int32_t low = first_visible(p, r.length - 1);
    check(int64_t{first} * part_keys <= low && low < (int64_t{first} + 1) * part_keys,
          "the first key lies in the first part");
    const int64_t end = (int64_t{first} + count) * part_keys;
    check(r.length <= end && r.length > end - part_keys, "the last key lies in the last part");
    parts += count;
  }
  check(rows <= p.tokens, "rows are the step's");
  check(parts <= most_parts_of(p), "parts fit: " + std::to_string(parts) + " of " +
                                       std::to_string(most_parts_of(p)));
  check(tiles <= most_tiles_of(p), "tiles fit: " + std::to_string(tiles) + " of " +
                                       std::to_string(most_tiles_of(p)));
}

void swizzle_is_a_permutation() {
  std::vector<int> seen(64 * 256 / 16, 0);
  for (int row = 0; row < 64; ++row) {
    for (int chunk = 0; chunk < 16; ++chunk) {
      const int at = swizzled<128>(row, chunk);
      check(at / 256 == row && at % 16 == 0, "a chunk stays in its row");
      ++seen[at / 16];
    }
    // Eight rows' same chunk: eight different groups of four banks.
    std::vector<int> groups;
    for (int i = 0; i < 8; ++i) groups.push_back(swizzled<128>(row / 8 * 8 + i, row % 16) / 16 % 8);
    std::sort(groups.begin(), groups.end());
    check(std::unique(groups.begin(), groups.end()) == groups.end(), "no bank twice");
  }
  check(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }), "each place once");
}

void copies_once() {
  const int pages = draw(2, 12), count = draw(0, pages);
  std::vector<int32_t> src(count), dst(pages), order(count), waiting(count), writer(count);
  std::vector<uint8_t> opens(count), closes(count);
  for (int i = 0; i < pages; ++i) dst[i] = i;
  std::shuffle(dst.begin(), dst.end(), random_source);
  dst.resize(count);
  for (int32_t& page : src) page = draw(0, pages - 1);
  if (draw(0, 1)) {
    src = dst;
    std::shuffle(src.begin(), src.end(), random_source);
  }
  std::vector<int> pool(pages), expected;
  for (int i = 0; i < pages; ++i) pool[i] = i;
  expected = pool;
  for (int i = 0; i < count; ++i) expected[dst[i]] = pool[src[i]];
  const int done = order_copies(src.data(), dst.data(), count, order.data(), opens.data(),
                                closes.data(), waiting.data(), writer.data());
  int kept = -1;
  for (int i = 0; i < done; ++i) {
    const int pair = order[i];
    if (opens[i]) kept = pool[dst[pair]];
    pool[dst[pair]] = closes[i] ? kept : pool[src[pair]];
  }
  check(pool == expected, "copies as if all sources were read first");
}

void checksums_agree() {
  for (const int bytes : {1, 63, 64, 65, 1000, 8192, 8193, 40000}) {
    for (const int runs : {1, 3}) {
      std::vector<char> data(bytes * runs), copy(bytes);
      for (char& x : data) x = static_cast<char>(random_source());
      aqua::Checksum expected;
      uint64_t lanes[8];
      for (int i = 0; i < 8; ++i) lanes[i] = checksum_lane(i);
      for (int run = 0; run < runs; ++run) {
        expected.copy(copy.data(), &data[run * bytes], bytes);
        std::vector<char> padded((bytes + 63) / 64 * 64, 0);
        std::copy_n(&data[run * bytes], bytes, padded.begin());
        for (size_t at = 0; at < padded.size(); at += 8) {
          uint64_t word;
          std::memcpy(&word, &padded[at], 8);
          lanes[at / 8 % 8] = checksum_step(lanes[at / 8 % 8], word);
        }
      }
      check(checksum_value(lanes, static_cast<uint64_t>(bytes) * runs) == expected.value(),
            "checksum of " + std::to_string(bytes) + " bytes");
    }
  }
}

}  // namespace

int main() {
  for (int i = 0; i < 2000; ++i) plan_once();
  for (int i = 0; i < 5000; ++i) copies_once();
  swizzle_is_a_permutation();
  checksums_agree();
  if (failures == 0) std::printf("cuda_plan_test: ok\n");
  return failures == 0 ? 0 : 1;
}
