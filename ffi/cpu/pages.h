// Copies of whole pages (copy on write), of the pool and of spaces behind it.
#pragma once

#include <cstdint>
#include <string>

#include "../common/spaces.h"

namespace aqua {

// Copies page src[i] over page dst[i] for i < count, as if all sources were read first; of equal
// destinations the last wins. Returns an empty string, or what is wrong (nothing copied then).
std::string copy_pages(void* pool, int64_t pages, int64_t page_bytes, const int32_t* src,
                       const int32_t* dst, int64_t count, const Spaces& spaces = {});

}  // namespace aqua
