// The row kernels at the generic level; CMakeLists.txt gives this file its flags.
#define AQUA_KERNELS attention_kernels_generic
#include "attention_rows.inc"
