// XLA's face of moves.h.

#include <string>

#include "../common/moves.h"
#include "../common/spaces_ffi.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32>;

constexpr int64_t kWords = sizeof(aqua::Move) / sizeof(int32_t);

ffi::Error EnqueueMoves(ffi::AnyBuffer kv, I32 moves, I32 head, aqua::SpacesOperand spaces_in,
                        ffi::Result<ffi::AnyBuffer> out) {
  if (kv.untyped_data() != out->untyped_data()) {
    return ffi::Error::Internal(
        "aqua_enqueue_moves: the pool was not passed in place; donate kv to the compiled function "
        "and don't read it after this call");
  }
  aqua::Spaces spaces;
  if (kv.dimensions().size() < 1 || kv.size_bytes() != out->size_bytes() ||
      moves.dimensions().size() != 2 || moves.dimensions()[1] != kWords ||
      head.element_count() != 3 || !aqua::read_spaces(spaces_in, &spaces)) {
    return ffi::Error::InvalidArgument(
        "aqua_enqueue_moves: allowed: kv [P, ...], moves [N, " + std::to_string(kWords) +
        "], head [3], spaces [N, 8]");
  }
  // More than there is room for can't be meant; it must not cost the pool.
  const int32_t* words = head.typed_data();
  const int64_t count = words[0] < moves.dimensions()[0] ? words[0] : moves.dimensions()[0];
  const int64_t pages = kv.dimensions()[0];
  const int64_t page_bytes = pages == 0 ? 0 : static_cast<int64_t>(kv.size_bytes()) / pages;
  aqua::enqueue_moves({words[1], static_cast<uint32_t>(words[2])}, out->untyped_data(), pages,
                      page_bytes, moves.untyped_data(), count, spaces);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaEnqueueMoves, EnqueueMoves,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()  // kv, aliased with the result
                                  .Arg<I32>()             // moves
                                  .Arg<I32>()             // head: count, pool id, generation
                                  .OptionalArg<I32>()     // spaces
                                  .Ret<ffi::AnyBuffer>());
