// XLA's face of moves.h on CUDA.
//
// Not compatible with command buffers: each execution takes a buffer of its own and wakes the
// worker, which replaying a captured graph would not. It stands once at a program's head, so the
// rest of the step is captured all the same.

#include <string>

#include "../common/spaces_ffi.h"
#include "moves.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32>;

constexpr int64_t kWords = sizeof(aqua::Move) / sizeof(int32_t);

ffi::Error enqueue(cudaStream_t stream, ffi::AnyBuffer kv, I32 moves, I32 head,
                   aqua::SpacesOperand spaces_in, ffi::Result<ffi::AnyBuffer> out) {
  if (kv.untyped_data() != out->untyped_data()) {
    return ffi::Error::Internal(
        "aqua_enqueue_moves: the pool was not passed in place; donate kv to the compiled function "
        "and don't read it after this call");
  }
  aqua::Spaces spaces;
  if (kv.dimensions().size() < 1 || kv.size_bytes() != out->size_bytes() ||
      moves.dimensions().size() != 2 || moves.dimensions()[1] != kWords ||
      head.element_count() != 3 || moves.dimensions()[0] > (1 << 24) ||
      !aqua::read_spaces(spaces_in, &spaces)) {
    return ffi::Error::InvalidArgument(
        "aqua_enqueue_moves: allowed: kv [P, ...], moves [N, " + std::to_string(kWords) +
        "], head [3], spaces [N, 8]");
  }
  const int64_t pages = kv.dimensions()[0];
  const int64_t page_bytes = pages == 0 ? 0 : static_cast<int64_t>(kv.size_bytes()) / pages;
  const cudaError_t status =
      aqua::cuda::hand_over(stream, out->untyped_data(), pages, page_bytes, head.typed_data(),
                            moves.typed_data(), moves.dimensions()[0], spaces);
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("aqua_enqueue_moves: ") + cudaGetErrorString(status));
}

#ifdef AQUA_EMULATE
ffi::Error on_host(ffi::AnyBuffer kv, I32 moves, I32 head, aqua::SpacesOperand spaces,
                   ffi::Result<ffi::AnyBuffer> out) {
  return enqueue(nullptr, kv, moves, head, spaces, out);
}
#endif

}  // namespace

#define AQUA_MOVES_OPERANDS                                 \
      .Arg<ffi::AnyBuffer>()  /* kv, aliased with the result */ \
      .Arg<I32>()             /* moves */                   \
      .Arg<I32>()             /* head: count, pool id, generation */ \
      .OptionalArg<I32>()     /* spaces */                  \
      .Ret<ffi::AnyBuffer>()

#ifdef AQUA_EMULATE
XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaEnqueueMoves, on_host, ffi::Ffi::Bind() AQUA_MOVES_OPERANDS);
#else
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AquaEnqueueMoves, enqueue,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() AQUA_MOVES_OPERANDS);
#endif
