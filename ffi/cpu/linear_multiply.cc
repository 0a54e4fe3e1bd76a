#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/thread_pool.h"
#include "linear.h"

namespace aqua::linear {
namespace {

// Below this many elements packing is not worth handing to another thread (2 us of work).
constexpr int64_t kInlineElements = 32 * 1024;

// 512 rows: each panel of weights is read once per block of rows, and at 256 rows reading it from
// memory held the products back by 20%. Sums of 512 x 64 columns are 128 KiB.
constexpr int64_t kMaxTilesPerTask = 32;

// An output that L2 can't hold is written past the caches: no line is read to be overwritten.
// 1,024 x 4,096 f32: 9.0 -> 7.3 ms; 1,024 x 768: 4.0 -> 3.2 ms.
constexpr int64_t kStreamBytes = 2 * 1024 * 1024;

struct Buffer {
  std::unique_ptr<char, decltype(&std::free)> data{nullptr, &std::free};
  int64_t bytes = 0;
};

// Spreads k values of one row over the tiles' lines, padded with zeros.
void copy_lines(const void* row, int64_t k, Element element, int64_t steps, char* to) {
  const int64_t bytes = k * (element == Element::kBf16 ? 2 : 4);
  const char* from = static_cast<const char*>(row);
  const int64_t whole = bytes / 64;
  for (int64_t s = 0; s < whole; ++s) std::memcpy(to + s * kTileBytes, from + s * 64, 64);
  if (whole < steps) {
    std::memset(to + whole * kTileBytes, 0, 64);
    std::memcpy(to + whole * kTileBytes, from + whole * 64, bytes - whole * 64);
  }
}

void pack_row(const Input& x, int64_t row, Element element, int64_t steps, float* scratch,
              char* to) {
  const RowKernels& kernels = row_kernels();
  const bool plain_bf16 = x.element == Element::kBf16 && element == Element::kBf16 &&
                          x.norm_scale == nullptr;
  if (plain_bf16) {
    copy_lines(static_cast<const uint16_t*>(x.data) + row * x.k, x.k, element, steps, to);
    return;
  }
  const float* from = static_cast<const float*>(x.data) + row * x.k;
  if (x.element == Element::kBf16) {
    kernels.from_bf16(static_cast<const uint16_t*>(x.data) + row * x.k, scratch, x.k);
    from = scratch;
  }
  if (x.norm_scale != nullptr) {
    kernels.rms_norm(from, x.norm_scale, x.norm_eps, scratch, x.k);
    from = scratch;
  }
  // Converted as a whole: a call per line costs more than the conversion (25 against 3 ns).
  if (element == Element::kBf16) kernels.to_bf16(from, reinterpret_cast<uint16_t*>(scratch), x.k);
  copy_lines(element == Element::kBf16 ? scratch : from, x.k, element, steps, to);
}

void store_row(const float* sums, const float* bias, const float* residual, int64_t count,
               bool stream, float* out) {
  alignas(64) float line[kPanelColumns];
  if (bias != nullptr || residual != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      line[i] = sums[i] + (bias != nullptr ? bias[i] : 0.0f);
      if (residual != nullptr) line[i] += residual[i];
    }
    sums = line;
  }
#if defined(__x86_64__)
  if (stream && count == kPanelColumns && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    for (int64_t i = 0; i < count; i += 4) _mm_stream_ps(out + i, _mm_load_ps(sums + i));
    return;
  }
#else
  (void)stream;
#endif
  std::memcpy(out, sums, count * sizeof(float));
}

}  // namespace

char* thread_scratch(Slot slot, int64_t bytes) {
  thread_local Buffer buffers[3];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    const int64_t wanted = (bytes + 4095) / 4096 * 4096;
    buffer.data.reset(static_cast<char*>(std::aligned_alloc(64, wanted)));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = wanted;
  }
  return buffer.data.get();
}

const char* pack_rows(const Input& x, Element element, int64_t steps, Slot slot) {
  const int64_t tiles = (x.rows + kTileRows - 1) / kTileRows;
  char* packed = thread_scratch(slot, tiles * steps * kTileBytes);
  const auto pack_tile = [&](int64_t tile, int) {
    float* scratch =
        reinterpret_cast<float*>(thread_scratch(Slot::kSums, x.k * sizeof(float)));
    const int64_t end = std::min(x.rows, (tile + 1) * kTileRows);
    for (int64_t row = tile * kTileRows; row < end; ++row) {
      char* to = packed + tile * steps * kTileBytes + row % kTileRows * 64;
      pack_row(x, row, element, steps, scratch, to);
    }
  };
  if (x.rows * x.k <= kInlineElements) {
    for (int64_t tile = 0; tile < tiles; ++tile) pack_tile(tile, 0);
  } else {
    parallel_for(tiles, pack_tile);
  }
  return packed;
}

int64_t rows_per_task(int64_t rows, int64_t tasks_per_block, int64_t group) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t wanted_blocks = (4 * num_threads() + tasks_per_block - 1) / tasks_per_block;
  const int64_t balanced = std::max<int64_t>(1, tiles / wanted_blocks);
  const int64_t cached = std::max<int64_t>(1, kMaxTilesPerTask * 2 / std::max<int64_t>(2, group));
  return std::min(cached, balanced) * kTileRows;
}

void multiply(const char* packed, int64_t rows, const Weights& weights, int64_t group,
              const Store& store) {
  if (rows == 0) return;
  const Kernels& set = kernels();
  const PanelKernel kernel = weights.element == Element::kBf16 ? set.bf16 : set.f32;
  const int64_t groups = (weights.panels + group - 1) / group;
  const int64_t block = rows_per_task(rows, groups, group), blocks = (rows + block - 1) / block;
  const int64_t stride = block * kPanelColumns;
  parallel_for(groups * blocks, [&](int64_t task, int) {
    const int64_t first = task / blocks * group, row = task % blocks * block;
    const int64_t panels = std::min(group, weights.panels - first);
    const int64_t count = std::min(block, rows - row);
    float* sums = reinterpret_cast<float*>(
        thread_scratch(Slot::kSums, group * stride * static_cast<int64_t>(sizeof(float))));
    for (int64_t panel = 0; panel < panels; ++panel) {
      kernel(packed + row / kTileRows * weights.steps * kTileBytes, count,
             weights.data + (first + panel) * weights.steps * kStepBytes, weights.steps,
             sums + panel * stride);
    }
    store(first, panels, row, count, sums, stride);
  });
}

void multiply_to(const char* packed, int64_t rows, int64_t all_rows, const Weights& weights,
                 int64_t n, const float* bias, const float* residual, float* out) {
  const bool stream = rows * n * static_cast<int64_t>(sizeof(float)) > kStreamBytes;
  multiply(packed, rows, weights, 1, [&](int64_t panel, int64_t, int64_t row, int64_t count,
                                         const float* sums, int64_t) {
    const int64_t column = panel * kPanelColumns, width = std::min(kPanelColumns, n - column);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (row + r) * n + column;
      store_row(sums + r * kPanelColumns, bias == nullptr ? nullptr : bias + column,
                residual == nullptr ? nullptr : residual + at, width, stream, out + at);
    }
#if defined(__x86_64__)
    if (stream) _mm_sfence();
#endif
  });
  std::memset(out + rows * n, 0, (all_rows - rows) * n * sizeof(float));
}

}  // namespace aqua::linear
