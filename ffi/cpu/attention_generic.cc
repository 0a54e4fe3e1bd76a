// Rows, and prompt tiles in f32, at the generic level; CMakeLists.txt gives this file its flags.
#define AQUA_KERNELS attention_kernels_generic
#define AQUA_ATTEND_TILE attend_tile_generic
#include "attention_tiles_rows.inc"

#include "attention_tiles_f32.inc"

#include "attention_tiles.inc"

#include "attention_rows.inc"
