#include "preload.h"

#include <map>
#include <mutex>
#include <utility>

namespace aqua {
namespace cuda {

#ifndef AQUA_EMULATE
cudaError_t allow_shared(const void* kernel, size_t bytes) {
  constexpr size_t kAlways = 48 * 1024;
  if (bytes <= kAlways) return cudaSuccess;
  static std::mutex lock;
  static auto* const allowed = new std::map<std::pair<int, const void*>, size_t>;  // never destroyed
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::lock_guard<std::mutex> guard(lock);
  size_t& most = (*allowed)[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}
#endif

}  // namespace cuda
}  // namespace aqua

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
