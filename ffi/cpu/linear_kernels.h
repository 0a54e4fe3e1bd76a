// Inner kernels of `linear`, one set per instruction set, chosen at run time.
//
// All kernels share one geometry, whatever the element type, because both types fill 64 bytes:
//   element   k per step   A tile (1 KiB)            B step (4 KiB)
//   bf16      32           [16 rows][32] bf16        [16][64 columns][2] bf16
//   f32       16           [16 rows][16] f32         [16][64 columns] f32
// A is packed by the caller to [row tiles][steps] tiles; B is one panel of 64 output columns,
// [steps] consecutive blocks of the layout that ops/linear.py's `pack` writes.
//
// Every kernel adds the products of one output element in ascending k into one f32 accumulator
// (AMX, AVX512-BF16 and the plain ones differ from each other in how they round, so a process
// uses one of them throughout). A row's result therefore depends bitwise on nothing but the row
// and the weights: not on its position, the number of rows, or the blocking.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace aqua::linear {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPanelColumns = 64;
constexpr int64_t kStepBytes = 4096;

// c[r][0..63] = sum over k of a[r][k] * b[k][0..63] for r < rows.
//   a: first row tile; tile t of step s is at a + (t * steps + s) * kTileBytes
//   c: [ceil(rows / 16) * 16][64] f32, contiguous, 64-byte aligned
using PanelKernel = void (*)(const char* a, int64_t rows, const char* b, int64_t steps, float* c);

struct Kernels {
  PanelKernel bf16;
  PanelKernel f32;
  const RowKernels* rows;  // row operations of the same instruction set
};

// The set for current_isa().
const Kernels& kernels();

// The bf16 kernel on AMX tiles; null where the build lacks it.
extern const PanelKernel panel_bf16_amx;

}  // namespace aqua::linear
