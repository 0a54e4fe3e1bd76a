// FFI handler: silu(gate) * up over the rows of a [T, 2F] array, for widths that the fused MLP of
// linear.cc doesn't take.
#include <algorithm>
#include <cstring>

#include "../common/thread_pool.h"
#include "row_kernels.h"
#include "xla/ffi/api/ffi.h"

namespace aqua {
namespace {

namespace ffi = xla::ffi;

// Elements that one task takes: enough to outweigh claiming it (0.1 us), few enough to balance.
constexpr int64_t kTaskElements = 16 * 1024;

ffi::Error swiglu(ffi::Buffer<ffi::F32> gate_up, ffi::Buffer<ffi::S32> rows,
                  ffi::Result<ffi::AnyBuffer> out) {
  const auto in = gate_up.dimensions(), to = out->dimensions();
  if (in.size() != 2 || to.size() != 2 || in[0] != to[0] || in[1] != 2 * to[1]) {
    return ffi::Error::InvalidArgument("swiglu: gate_up must be [T, 2F] and out [T, F]");
  }
  const bool bf16 = out->element_type() == ffi::BF16;
  if (!bf16 && out->element_type() != ffi::F32) {
    return ffi::Error::InvalidArgument("swiglu: out must be bf16 or f32");
  }
  const int64_t all_rows = to[0], width = to[1];
  const int64_t valid = rows.element_count() == 0
                            ? all_rows
                            : std::clamp<int64_t>(rows.typed_data()[0], 0, all_rows);
  const int64_t block = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  const RowKernels& kernels = row_kernels();
  const float* from = gate_up.typed_data();
  parallel_for((valid + block - 1) / block, [&](int64_t task, int) {
    const int64_t end = std::min(valid, (task + 1) * block);
    for (int64_t row = task * block; row < end; ++row) {
      const float* gate = from + row * 2 * width;
      const float* up = gate + width;
      if (!bf16) {
        kernels.swiglu(gate, up, static_cast<float*>(out->untyped_data()) + row * width, width);
        continue;
      }
      uint16_t* line = static_cast<uint16_t*>(out->untyped_data()) + row * width;
      float part[256];
      for (int64_t i = 0; i < width; i += 256) {
        const int64_t count = std::min<int64_t>(256, width - i);
        kernels.swiglu(gate + i, up + i, part, count);
        kernels.to_bf16(part, line + i, count);
      }
    }
  });
  const int64_t row_bytes = width * (bf16 ? 2 : 4);
  std::memset(static_cast<char*>(out->untyped_data()) + valid * row_bytes, 0,
              (all_rows - valid) * row_bytes);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace aqua

XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaSwiglu, aqua::swiglu,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
