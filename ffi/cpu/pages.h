// Copies of whole pages inside the pool (copy on write).
#pragma once

#include <cstdint>
#include <string>

namespace aqua {

// Copies page src[i] over page dst[i] for i < count, as if all sources were read first; of equal
// destinations the last wins. Returns an empty string, or what is wrong (nothing copied then).
std::string copy_pages(void* pool, int64_t pages, int64_t page_bytes, const int32_t* src,
                       const int32_t* dst, int64_t count);

}  // namespace aqua
