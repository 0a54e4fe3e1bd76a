// The matrix kernels for pools of bf16.

#include "attention_matrix.cuh"

namespace aqua {
namespace cuda {

cudaError_t attend_matrix_bf16(const Attention& problem, cudaStream_t stream, bool tiles) {
  return attend_matrix_any<Bf16>(problem, stream, tiles);
}

cudaError_t preload_matrix_bf16() { return preload_matrix_any<Bf16>(); }

}  // namespace cuda
}  // namespace aqua
