// XLA's face of pages.h.

#include <string>

#include "../common/spaces_ffi.h"
#include "pages.h"
#include "spaces_use.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32>;

ffi::Error CopyPages(ffi::AnyBuffer kv, I32 src, I32 dst, I32 count,
                     aqua::SpacesOperand spaces_in, ffi::Result<ffi::AnyBuffer> kv_out) {
  if (kv.untyped_data() != kv_out->untyped_data()) {
    return ffi::Error::Internal(
        "aqua_copy_pages: the pool was not passed in place; donate kv to the compiled function "
        "and don't read it after this call");
  }
  aqua::Spaces spaces;
  if (kv.dimensions().size() < 1 || kv.size_bytes() != kv_out->size_bytes() ||
      src.dimensions().size() != 1 || src.element_count() != dst.element_count() ||
      count.element_count() != 1 || !aqua::read_spaces(spaces_in, &spaces)) {
    return ffi::Error::InvalidArgument(
        "aqua_copy_pages: allowed: kv [P, ...], src [C], dst [C], count [1], spaces [N, 8]");
  }
  const int64_t copies = count.typed_data()[0];
  if (copies < 0 || copies > static_cast<int64_t>(src.element_count())) {
    return ffi::Error::InvalidArgument("aqua_copy_pages: count: got " + std::to_string(copies) +
                                       "; allowed: 0 to " + std::to_string(src.element_count()));
  }
  if (copies == 0) return ffi::Error::Success();
  const int64_t pages = kv.dimensions()[0];
  const int64_t bytes = pages == 0 ? 0 : static_cast<int64_t>(kv.size_bytes()) / pages;
  const aqua::SpacesInUse in_use(spaces);
  std::string error = in_use.error();
  if (error.empty()) {
    error = aqua::copy_pages(kv_out->untyped_data(), pages, bytes, src.typed_data(),
                             dst.typed_data(), copies, spaces);
  }
  return error.empty() ? ffi::Error::Success()
                       : ffi::Error::InvalidArgument("aqua_copy_pages: " + error);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaCopyPages, CopyPages,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()  // kv, aliased with the result
                                  .Arg<I32>()             // src
                                  .Arg<I32>()             // dst
                                  .Arg<I32>()             // count
                                  .OptionalArg<I32>()     // spaces
                                  .Ret<ffi::AnyBuffer>());
