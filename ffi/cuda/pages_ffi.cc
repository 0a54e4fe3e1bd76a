// XLA's face of pages.h on CUDA.
//
// Compatible with command buffers: one kernel on the given stream, driven by device arrays.

#include <string>

#include "../common/spaces_ffi.h"
#include "pages.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32>;

ffi::Error copy(cudaStream_t stream, ffi::AnyBuffer kv, I32 src, I32 dst, I32 count,
                aqua::SpacesOperand spaces_in, ffi::Result<ffi::AnyBuffer> kv_out) {
  if (kv.untyped_data() != kv_out->untyped_data()) {
    return ffi::Error::Internal(
        "aqua_copy_pages: the pool was not passed in place; donate kv to the compiled function "
        "and don't read it after this call");
  }
  aqua::Spaces spaces;
  if (kv.dimensions().size() < 1 || kv.size_bytes() != kv_out->size_bytes() ||
      src.dimensions().size() != 1 || src.element_count() != dst.element_count() ||
      count.element_count() != 1 || src.element_count() > aqua::cuda::kMostCopies ||
      !aqua::read_spaces(spaces_in, &spaces)) {
    return ffi::Error::InvalidArgument(
        "aqua_copy_pages: allowed: kv [P, ...], src [C], dst [C], count [1], spaces [N, 8], "
        "C at most " +
        std::to_string(aqua::cuda::kMostCopies));
  }
  const int64_t pages = kv.dimensions()[0];
  const int64_t bytes = pages == 0 ? 0 : static_cast<int64_t>(kv.size_bytes()) / pages;
  const cudaError_t status = aqua::cuda::copy_pages(
      kv_out->untyped_data(), pages, bytes, src.typed_data(), dst.typed_data(),
      count.typed_data(), static_cast<int32_t>(src.element_count()), spaces, stream);
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("aqua_copy_pages: ") + cudaGetErrorString(status));
}

#ifdef AQUA_EMULATE
ffi::Error on_host(ffi::AnyBuffer kv, I32 src, I32 dst, I32 count, aqua::SpacesOperand spaces,
                   ffi::Result<ffi::AnyBuffer> kv_out) {
  const emulation::Capturing as_on_a_device;
  return copy(nullptr, kv, src, dst, count, spaces, kv_out);
}
#endif

}  // namespace

#define AQUA_PAGES_OPERANDS                                 \
      .Arg<ffi::AnyBuffer>()  /* kv, aliased with the result */ \
      .Arg<I32>()             /* src */                     \
      .Arg<I32>()             /* dst */                     \
      .Arg<I32>()             /* count */                   \
      .OptionalArg<I32>()     /* spaces */                  \
      .Ret<ffi::AnyBuffer>()

#ifdef AQUA_EMULATE
XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaCopyPages, on_host, ffi::Ffi::Bind() AQUA_PAGES_OPERANDS);
#else
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AquaCopyPages, copy,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() AQUA_PAGES_OPERANDS,
    {ffi::Traits::kCmdBufferCompatible});
#endif
