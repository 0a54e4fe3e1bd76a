#include "device.cuh"
#include "pages.h"
#include "preload.h"

namespace aqua {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Unit is what is copied at a time: 16 bytes wherever a page is a multiple of it. Every thread has
// its own columns of all pages, so that an order among copies needs no barrier.
template <typename Unit>
__global__ __launch_bounds__(kThreads) void copy_pages_kernel(
    Unit* pool, int32_t pages, int64_t units, const int32_t* src_in, const int32_t* dst_in,
    const int32_t* count_in, int32_t capacity, Spaces spaces) {
  int count = count_in[0];
  if (count > capacity) count = capacity;
  if (count <= 0) return;
  auto* src = reinterpret_cast<int32_t*>(shared_memory());
  int32_t* dst = src + capacity;
  int32_t* order = dst + capacity;
  int32_t* waiting = order + capacity;
  int32_t* writer = waiting + capacity;
  auto* opens = reinterpret_cast<uint8_t*>(writer + capacity);
  uint8_t* closes = opens + capacity;
  auto* shared_total = reinterpret_cast<int32_t*>(
      shared_memory() + (int64_t{capacity} * 22 + 15) / 16 * 16);  // [2]: order needed, how many
  const PageMap map(pool, pages, units * int64_t{sizeof(Unit)}, spaces,
                    reinterpret_cast<unsigned char*>(shared_total + 4));
  const auto page_at = [&](int32_t page) { return reinterpret_cast<Unit*>(map.at(page)); };
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int32_t from = src_in[i], to = dst_in[i];
    const bool ok = map.has(from) && map.has(to);
    src[i] = ok ? from : -1;
    dst[i] = ok ? to : -1;  // equal: left out
  }
  if (threadIdx.x == 0) shared_total[0] = 0;
  __syncthreads();
  bool ordered = false;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    for (int j = 0; j < count; ++j) ordered |= i != j && src[i] >= 0 && src[i] == dst[j];
  }
  if (ordered) shared_total[0] = 1;
  __syncthreads();

  if (shared_total[0] == 0) {
    const int64_t step = int64_t{gridDim.x} * kThreads, all = count * units;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += step) {
      const int64_t pair = i / units, at = i % units;
      if (src[pair] != dst[pair]) page_at(dst[pair])[at] = page_at(src[pair])[at];
    }
    return;
  }
  if (threadIdx.x == 0) {
    shared_total[1] = order_copies(src, dst, count, order, opens, closes, waiting, writer);
  }
  __syncthreads();
  const int total = shared_total[1];
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < units; at += step) {
    Unit kept{};
    for (int i = 0; i < total; ++i) {
      const int pair = order[i];
      Unit* const to = page_at(dst[pair]) + at;
      if (opens[i]) kept = *to;
      *to = closes[i] ? kept : page_at(src[pair])[at];
    }
  }
}

// Bytes of shared memory besides the map.
size_t shared_of(int64_t capacity) {
  return static_cast<size_t>((capacity * 22 + 15) / 16 * 16 + 16);
}

template <typename Unit>
cudaError_t launch_copies(void* pool, int64_t pages, int64_t page_bytes, const int32_t* src,
                          const int32_t* dst, const int32_t* count, int32_t capacity,
                          const Spaces& spaces, cudaStream_t stream) {
  const int64_t units = page_bytes / static_cast<int64_t>(sizeof(Unit));
  // Enough for any GPU; a page alone has fewer.
  const int64_t wanted = (units * capacity + kThreads - 1) / kThreads;
  const size_t shared = shared_of(capacity) + static_cast<size_t>(PageMap::bytes(spaces));
  return launch(copy_pages_kernel<Unit>, wanted < 512 ? wanted : 512, kThreads, shared, stream,
                static_cast<Unit*>(pool), static_cast<int32_t>(pages), units, src, dst, count,
                capacity, spaces);
}

}  // namespace

cudaError_t copy_pages(void* pool, int64_t pages, int64_t page_bytes, const int32_t* src,
                       const int32_t* dst, const int32_t* count, int32_t capacity,
                       const Spaces& spaces, cudaStream_t stream) {
  if (capacity <= 0 || page_bytes <= 0) return cudaSuccess;
  if (capacity > kMostCopies) return cudaErrorInvalidValue;
  if (page_bytes % 16 == 0) {
    return launch_copies<Vec16>(pool, pages, page_bytes, src, dst, count, capacity, spaces, stream);
  }
  return launch_copies<uint8_t>(pool, pages, page_bytes, src, dst, count, capacity, spaces,
                                stream);
}

cudaError_t preload_pages() {
  const size_t most = shared_of(kMostCopies) + PageMap::kMostBytes;
  const cudaError_t error = preload(copy_pages_kernel<Vec16>, most);
  return error == cudaSuccess ? preload(copy_pages_kernel<uint8_t>, most) : error;
}

}  // namespace cuda
}  // namespace aqua
