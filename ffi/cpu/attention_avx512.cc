// The row kernels at the avx512 level; CMakeLists.txt gives this file its flags.
#define AQUA_KERNELS attention_kernels_avx512
#include "attention_rows.inc"
