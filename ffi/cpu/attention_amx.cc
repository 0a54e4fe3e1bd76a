// Prompt tiles of bf16 pools on AMX's matrix unit; CMakeLists.txt gives this file its flags.
#include "attention_tiles_rows.inc"

#include "attention_tiles_bf16.inc"

namespace {

// Eight tiles of 16 rows of 64 bytes: 0-3 results, 4-5 rows of a, 6-7 halves of b.
void Math::enter() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// Tiles in use would make every thread switch save 8 KiB more.
void Math::leave() { _tile_release(); }

void Math::multiply32(const bf16_t* a, int64_t a_step, const bf16_t* b, int64_t b_step,
                      int64_t b_half, int chunks, bool add, float* c) {
  constexpr int kStep = 32 * sizeof(float);
  if (add) {
    _tile_loadd(0, c, kStep);
    _tile_loadd(1, c + 16, kStep);
    _tile_loadd(2, c + 16 * 32, kStep);
    _tile_loadd(3, c + 16 * 32 + 16, kStep);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < chunks; ++i) {
    const bf16_t* b_chunk = b + i * 8 * b_step;  // 16 pairs, b_step / 2 elements each
    _tile_loadd(4, a + i * 32, a_step);
    _tile_loadd(6, b_chunk, b_step);
    _tile_loadd(7, b_chunk + b_half, b_step);
    _tile_loadd(5, a + i * 32 + 8 * a_step, a_step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kStep);
  _tile_stored(1, c + 16, kStep);
  _tile_stored(2, c + 16 * 32, kStep);
  _tile_stored(3, c + 16 * 32 + 16, kStep);
}

}  // namespace

#define AQUA_ATTEND_TILE attend_tile_amx
#include "attention_tiles.inc"
