// The row kernels at the avx2 level; CMakeLists.txt gives this file its flags.
#define AQUA_KERNELS attention_kernels_avx2
#include "attention_rows.inc"
