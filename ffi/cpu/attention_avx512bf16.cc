// Prompt tiles of bf16 pools with AVX-512 BF16 dot products; CMakeLists.txt gives this file its
// flags.
#include "attention_tiles_rows.inc"

#include "attention_tiles_bf16.inc"

namespace {

void Math::enter() {}
void Math::leave() {}

void Math::multiply32(const bf16_t* a, int64_t a_step, const bf16_t* b, int64_t b_step,
                      int64_t b_half, int chunks, bool add, float* c) {
  constexpr int kRows = kAccumulators / 2;
  for (int row = 0; row < 32; row += kRows) {
    const char* rows = reinterpret_cast<const char*>(a) + row * a_step;
    const char* pair = reinterpret_cast<const char*>(b);
    float* out = c + row * 32;
    vf sum[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = add ? vload(out + r * 32) : vzero();
      sum[r][1] = add ? vload(out + r * 32 + 16) : vzero();
    }
    for (int k = 0; k < chunks * 16; ++k, pair += b_step) {
      const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(pair));
      const __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(pair + b_half * 2));
      for (int r = 0; r < kRows; ++r) {
        int32_t two;
        memcpy(&two, rows + r * a_step + k * 4, 4);
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, b0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, b1);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      vstore(out + r * 32, sum[r][0]);
      vstore(out + r * 32 + 16, sum[r][1]);
    }
  }
}

}  // namespace

#define AQUA_ATTEND_TILE attend_tile_avx512bf16
#include "attention_tiles.inc"
