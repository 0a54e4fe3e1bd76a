// The matrix kernels for pools of f16.

#include "attention_matrix.cuh"

namespace aqua {
namespace cuda {

cudaError_t attend_matrix_f16(const Attention& problem, cudaStream_t stream, bool tiles) {
  return attend_matrix_any<F16>(problem, stream, tiles);
}

cudaError_t preload_matrix_f16() { return preload_matrix_any<F16>(); }

}  // namespace cuda
}  // namespace aqua
