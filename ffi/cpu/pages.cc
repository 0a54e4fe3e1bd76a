#include "pages.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/thread_pool.h"

namespace aqua {
namespace {

constexpr int64_t kTaskBytes = 1 << 20;

// Whether some page is written and also read, or written twice.
bool overlapping(const int32_t* src, const int32_t* dst, int64_t count) {
  std::vector<int32_t> written(dst, dst + count);
  std::sort(written.begin(), written.end());
  if (std::adjacent_find(written.begin(), written.end()) != written.end()) return true;
  return std::any_of(src, src + count, [&](int32_t page) {
    return std::binary_search(written.begin(), written.end(), page);
  });
}

}  // namespace

std::string copy_pages(void* pool, int64_t pages, int64_t page_bytes, const int32_t* src,
                       const int32_t* dst, int64_t count, const Spaces& spaces) {
  const auto at = [&](int32_t page) {
    return page < pages ? static_cast<char*>(pool) + page * page_bytes
                        : spaces.page(page, page_bytes);
  };
  for (int64_t i = 0; i < count; ++i) {
    for (const int32_t page : {src[i], dst[i]}) {
      if (page < 0 || at(page) == nullptr) {
        return "page of copy " + std::to_string(i) + ": got " + std::to_string(page) +
               "; allowed: 0 to " + std::to_string(pages - 1) + ", or one of " +
               std::to_string(spaces.count) + " spaces";
      }
    }
  }
  if (overlapping(src, dst, count)) {
    std::vector<char> sources(count * page_bytes);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&sources[i * page_bytes], at(src[i]), page_bytes);
    }
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(at(dst[i]), &sources[i * page_bytes], page_bytes);
    }
    return "";
  }
  const int64_t pieces = (page_bytes + kTaskBytes - 1) / kTaskBytes;
  parallel_for(count * pieces, [&](int64_t task, int) {
    const int64_t i = task / pieces, from = task % pieces * kTaskBytes;
    const int64_t bytes = std::min(kTaskBytes, page_bytes - from);
    std::memcpy(at(dst[i]) + from, at(src[i]) + from, bytes);
  });
  return "";
}

}  // namespace aqua
