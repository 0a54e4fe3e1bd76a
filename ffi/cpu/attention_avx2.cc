// Rows, and prompt tiles in f32, at the avx2 level; CMakeLists.txt gives this file its flags.
#define AQUA_KERNELS attention_kernels_avx2
#define AQUA_ATTEND_TILE attend_tile_avx2
#include "attention_tiles_rows.inc"

#include "attention_tiles_f32.inc"

#include "attention_tiles.inc"

#include "attention_rows.inc"
