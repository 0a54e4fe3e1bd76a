// bf16 panels on Intel AMX tiles (Sapphire Rapids and later).
#include "linear_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>

namespace aqua::linear {
namespace {

#define AQUA_AMX __attribute__((target("amx-tile,amx-bf16,avx512f")))

// Rows beyond two tiles go over B in blocks of 8 steps: 32 KiB, which stay in the 48 KiB L1 while
// all row tiles pass. With fewer nothing is gained by that, and the sums stay in the tiles for all
// of k.
constexpr int64_t kBlockSteps = 8;

// From this many row tiles on the next block of B is fetched while one is used. Core-ms for 98 MB of
// weights, without and with (a plain read takes 8): 64 rows 11.2, 13.0; 128 13.9, 15.0; 192 16.4,
// 14.4; 512 34.3, 29.9. Few rows do better with the processor's own prefetching.
constexpr int64_t kPrefetchTiles = 9;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums of 16 columns each; 4: A; 5, 6: B.
TileConfig tile_config(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 7; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows : 16);
  }
  return config;
}

// Adds `steps` steps to the sums and fetches `lines` cache lines from `ahead` on at each of them.
AQUA_AMX inline void multiply_steps(const char* a, const char* b, int64_t steps, const char* ahead,
                                    int64_t lines) {
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, b, 256);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + 64, 256);
    for (int64_t line = 0; line < lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, b + 128, 256);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, b + 192, 256);
    _tile_dpbf16ps(3, 4, 6);
    a += kTileBytes;
    b += kStepBytes;
  }
}

AQUA_AMX inline void load_sums(float* c) {
  _tile_loadd(0, c, 256);
  _tile_loadd(1, c + 16, 256);
  _tile_loadd(2, c + 32, 256);
  _tile_loadd(3, c + 48, 256);
}

AQUA_AMX inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

AQUA_AMX inline void store_sums(float* c) {
  _tile_stored(0, c, 256);
  _tile_stored(1, c + 16, 256);
  _tile_stored(2, c + 32, 256);
  _tile_stored(3, c + 48, 256);
}

AQUA_AMX void panel_bf16(const char* a, int64_t rows, const char* b, int64_t steps, float* c) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t last_rows = rows - (tiles - 1) * kTileRows;
  const TileConfig full = tile_config(kTileRows), last = tile_config(last_rows);
  const int64_t block = tiles <= 2 ? steps : kBlockSteps;
  const TileConfig* loaded = nullptr;
  for (int64_t step = 0; step < steps; step += block) {
    const int64_t count = std::min(block, steps - step);
    const char* b_step = b + step * kStepBytes;
    // After the last block comes the next panel's first. It may lie beyond the array: fetching
    // there is harmless.
    const char* ahead = b_step + block * kStepBytes;
    const int64_t lines =
        tiles < kPrefetchTiles ? 0 : block * kStepBytes / 64 / (tiles * count);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const TileConfig* wanted = tile + 1 < tiles || last_rows == kTileRows ? &full : &last;
      if (wanted != loaded) _tile_loadconfig(loaded = wanted);
      float* sums = c + tile * kTileRows * kPanelColumns;
      if (step == 0) {
        zero_sums();
      } else {
        load_sums(sums);
      }
      multiply_steps(a + (tile * steps + step) * kTileBytes, b_step, count, ahead, lines);
      ahead += count * lines * 64;
      store_sums(sums);
    }
  }
  _tile_release();
}

}  // namespace

const PanelKernel panel_bf16_amx = panel_bf16;

}  // namespace aqua::linear

#else

namespace aqua::linear {
const PanelKernel panel_bf16_amx = nullptr;
}  // namespace aqua::linear

#endif
