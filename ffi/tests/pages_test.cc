// Page copies against the definition: all sources are read before any page is written. Some of the
// pages lie in a space behind the pool.

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../cpu/pages.h"

int main() {
  int failures = 0;
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const int64_t pages = 1 + random() % 12;
    const int64_t bytes = seed % 50 == 0 ? (3 << 20) + 7 : 1 + random() % 300;
    std::vector<char> pool(pages * bytes);
    for (char& x : pool) x = static_cast<char>(random());
    const int count = static_cast<int>(random() % 8);
    std::vector<int32_t> src(count), dst(count);
    bool bad = false;
    for (int i = 0; i < count; ++i) {
      src[i] = static_cast<int32_t>(random() % pages);
      dst[i] = static_cast<int32_t>(random() % pages);
      if (random() % 20 == 0) (random() % 2 ? src : dst)[i] = random() % 2 ? -1 : pages;
      bad |= src[i] < 0 || src[i] >= pages || dst[i] < 0 || dst[i] >= pages;
    }
    const std::vector<char> before = pool;
    std::vector<char> expected = pool;
    for (int i = 0; i < count && !bad; ++i) {
      for (int64_t j = 0; j < bytes; ++j) {
        expected[dst[i] * bytes + j] = before[src[i] * bytes + j];
      }
    }
    const int64_t own = seed % 2 ? pages : 1 + static_cast<int64_t>(random() % pages);
    std::vector<char> behind(pool.begin() + own * bytes, pool.end());
    pool.resize(own * bytes);
    pool.shrink_to_fit();
    const auto address = reinterpret_cast<uintptr_t>(behind.data());
    const aqua::Space space{static_cast<int32_t>(own), static_cast<int32_t>(pages - own),
                            static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32),
                            0, 0, {}};
    const std::string error =
        aqua::copy_pages(pool.data(), own, bytes, src.data(), dst.data(), count, {&space, 1});
    pool.insert(pool.end(), behind.begin(), behind.end());
    if (error.empty() == bad || pool != expected) {
      std::fprintf(stderr, "FAILED: seed %u: '%s'\n", seed, error.c_str());
      ++failures;
    }
  }
  return failures == 0 ? 0 : 1;
}
