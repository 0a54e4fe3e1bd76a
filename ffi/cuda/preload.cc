#include "preload.h"

const char* aqua_kernels_preload(int32_t device) {
  const aqua::cuda::OnDevice on(device);
  cudaError_t error = on.status();
#ifndef AQUA_EMULATE
  if (error == cudaSuccess) error = cudaFree(nullptr);  // makes the context
#endif
  for (const auto load :
       {aqua::cuda::preload_prepare, aqua::cuda::preload_matrix_bf16,
        aqua::cuda::preload_matrix_f16, aqua::cuda::preload_rows_f32, aqua::cuda::preload_moves,
        aqua::cuda::preload_pages}) {
    if (error == cudaSuccess) error = load();
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}
