// Panel kernels for CPUs without AMX, and the choice between all of them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/isa.h"
#include "linear_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace aqua::linear {

namespace generic {
#define AQUA_TARGET
#define AQUA_LANES 4
#define AQUA_ROWS 4
#define AQUA_VECTORS 2
#define AQUA_FMA(a, b, c) ((a) * (b) + (c))
#include "linear_vector.inc"
#undef AQUA_FMA
#undef AQUA_TARGET
#undef AQUA_LANES
#undef AQUA_ROWS
#undef AQUA_VECTORS
}  // namespace generic

#if defined(__x86_64__)

namespace avx2 {
#define AQUA_TARGET __attribute__((target("avx2,fma")))
#define AQUA_LANES 8
#define AQUA_ROWS 6
#define AQUA_VECTORS 2
#define AQUA_FMA(a, b, c) ((Floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "linear_vector.inc"
#undef AQUA_FMA
#undef AQUA_TARGET
#undef AQUA_LANES
#undef AQUA_ROWS
#undef AQUA_VECTORS
}  // namespace avx2

#define AQUA_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
namespace avx512 {
#define AQUA_TARGET __attribute__((target(AQUA_AVX512)))
#define AQUA_LANES 16
#define AQUA_ROWS 6
#define AQUA_VECTORS 4
#define AQUA_FMA(a, b, c) ((Floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "linear_vector.inc"
#undef AQUA_FMA
#undef AQUA_TARGET
#undef AQUA_LANES
#undef AQUA_ROWS
#undef AQUA_VECTORS
}  // namespace avx512

namespace avx512_bf16 {

#define AQUA_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

// Few rows run at memory speed: fetch this far ahead of the first pass over the panel, bytes.
constexpr int64_t kPrefetchBytes = 8 * 1024;

template <int kRows>
AQUA_BF16 inline void multiply(const char* const* a_rows, const char* b, int64_t steps, bool first,
                               bool prefetch, float* c) {
  __m512 sums[kRows][4];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 4; ++v) {
      sums[r][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelColumns + v * 16);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    for (int i = 0; i < 16; ++i) {
      const char* line = b + s * kStepBytes + i * 256;
      __m512i column[4];
      for (int v = 0; v < 4; ++v) column[v] = _mm512_loadu_si512(line + v * 64);
      if (prefetch) {
        for (int v = 0; v < 4; ++v) _mm_prefetch(line + kPrefetchBytes + v * 64, _MM_HINT_T0);
      }
      for (int r = 0; r < kRows; ++r) {
        int pair;
        std::memcpy(&pair, a_rows[r] + s * kTileBytes + i * 4, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < 4; ++v) {
          sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, (__m512bh)column[v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 4; ++v) _mm512_storeu_ps(c + r * kPanelColumns + v * 16, sums[r][v]);
  }
}

AQUA_BF16 void panel(const char* a, int64_t rows, const char* b, int64_t steps, float* c) {
  constexpr int64_t kRows = 6, kBlock = 8;
  const int64_t block = rows <= kRows ? steps : kBlock;
  for (int64_t step = 0; step < steps; step += block) {
    const int64_t count = std::min(block, steps - step);
    for (int64_t row = 0; row < rows;) {
      const int64_t take = std::min(kRows, rows - row);
      const char* at[kRows];
      for (int64_t r = 0; r < take; ++r) {
        const int64_t tile = (row + r) / kTileRows, in_tile = (row + r) % kTileRows;
        at[r] = a + (tile * steps + step) * kTileBytes + in_tile * 64;
      }
      const char* b_block = b + step * kStepBytes;
      const bool first = step == 0, prefetch = row == 0;
      float* sums = c + row * kPanelColumns;
      switch (take) {
        case 1: multiply<1>(at, b_block, count, first, prefetch, sums); break;
        case 2: multiply<2>(at, b_block, count, first, prefetch, sums); break;
        case 3: multiply<3>(at, b_block, count, first, prefetch, sums); break;
        case 4: multiply<4>(at, b_block, count, first, prefetch, sums); break;
        case 5: multiply<5>(at, b_block, count, first, prefetch, sums); break;
        default: multiply<6>(at, b_block, count, first, prefetch, sums); break;
      }
      row += take;
    }
  }
}

}  // namespace avx512_bf16

#endif

namespace {

constexpr Kernels kGenericSet{generic::panel<true>, generic::panel<false>,
                              &generic::row_kernels};
#if defined(__x86_64__)
constexpr Kernels kAvx2Set{avx2::panel<true>, avx2::panel<false>, &avx2::row_kernels};
constexpr Kernels kAvx512Set{avx512::panel<true>, avx512::panel<false>, &avx512::row_kernels};
constexpr Kernels kAvx512Bf16Set{avx512_bf16::panel, avx512::panel<false>, &avx512::row_kernels};
#endif

}  // namespace

const Kernels& kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::kAmx: {
      static const Kernels set{panel_bf16_amx, avx512::panel<false>, &avx512::row_kernels};
      return set;
    }
    case Isa::kAvx512Bf16: return kAvx512Bf16Set;
    case Isa::kAvx512: return kAvx512Set;
    case Isa::kAvx2: return kAvx2Set;
#endif
    default: return kGenericSet;
  }
}

}  // namespace aqua::linear

namespace aqua {
const RowKernels& row_kernels() { return *linear::kernels().rows; }
}  // namespace aqua
