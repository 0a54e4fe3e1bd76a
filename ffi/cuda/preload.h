// Loads every kernel before any is launched.
#pragma once

#include "device.h"

namespace aqua {
namespace cuda {

// One of each file of kernels: loads its own onto the current device.
cudaError_t preload_prepare();
cudaError_t preload_matrix_bf16();
cudaError_t preload_matrix_f16();
cudaError_t preload_rows_f32();
cudaError_t preload_moves();
cudaError_t preload_pages();

}  // namespace cuda
}  // namespace aqua

extern "C" {

// Loads all kernels onto a device, whose context must be there already or is made. To be called
// before programs run: XLA may capture the handlers in graphs (pages_ffi.cc, attention_ffi.cc), and
// loading a kernel isn't allowed then. Null, or why not.
const char* aqua_kernels_preload(int32_t device);
}
