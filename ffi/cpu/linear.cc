// FFI handlers: linear (optionally with the norm before it and the residual after it) and the
// whole gated MLP. An operand that is absent comes as an array of no elements.
#include "linear.h"

#include <algorithm>
#include <cstring>

#include "../common/thread_pool.h"
#include "linear_operands.h"
#include "xla/ffi/api/ffi.h"

namespace aqua::linear {
namespace {

// x [T, k], norm scale [k], bias [n], residual [T, n], rows [1] -> out [T, n].
ffi::Error linear(ffi::AnyBuffer x, ffi::AnyBuffer w, F32 bias, F32 norm_scale, F32 residual,
                  I32 rows, float norm_eps, ffi::Result<F32> out) {
  const auto x_dims = x.dimensions(), out_dims = out->dimensions();
  if (x_dims.size() != 2 || out_dims.size() != 2 || x_dims[0] != out_dims[0]) {
    return ffi::Error::InvalidArgument("linear: x must be [T, k] and out [T, n]");
  }
  const int64_t all_rows = x_dims[0], k = x_dims[1], n = out_dims[1];
  const auto element = element_of(x);
  if (element.has_error()) return element.error();
  const auto weights = weights_of(w, k, n);
  if (weights.has_error()) return weights.error();
  const int64_t valid = valid_rows(rows, all_rows);
  const Input input{x.untyped_data(), *element, valid, k, data_or_null(norm_scale), norm_eps};
  const char* packed = pack_rows(input, weights->element, weights->steps, Slot::kInput);
  multiply_to(packed, valid, all_rows, *weights, n, data_or_null(bias), data_or_null(residual),
              out->typed_data());
  return ffi::Error::Success();
}

// silu(x W_gate + b_gate) * (x W_up + b_up), written as the next product's packed left operand.
// F is a multiple of 64, so that gate and up columns of one index lie in panels p and p + F / 64.
const char* gated_hidden(const char* packed, int64_t rows, const Weights& gate_up,
                         const float* bias, const Weights& down) {
  const Kernels& set = kernels();
  const PanelKernel kernel = gate_up.element == Element::kBf16 ? set.bf16 : set.f32;
  const int64_t panels = gate_up.panels / 2, hidden = panels * kPanelColumns;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  char* to = thread_scratch(Slot::kHidden, tiles * down.steps * kTileBytes);
  const int64_t block = rows_per_task(rows, panels, 2);
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t panel_bytes = gate_up.steps * kStepBytes;
  parallel_for(panels * blocks, [&](int64_t task, int) {
    const int64_t panel = task / blocks, row = task % blocks * block;
    const int64_t count = std::min(block, rows - row), size = block * kPanelColumns;
    float* gate = reinterpret_cast<float*>(
        thread_scratch(Slot::kSums, 2 * size * static_cast<int64_t>(sizeof(float))));
    float* up = gate + size;
    const char* a = packed + row / kTileRows * gate_up.steps * kTileBytes;
    kernel(a, count, gate_up.data + panel * panel_bytes, gate_up.steps, gate);
    kernel(a, count, gate_up.data + (panels + panel) * panel_bytes, gate_up.steps, up);
    if (bias != nullptr) {
      for (int64_t i = 0; i < count * kPanelColumns; ++i) {
        const int64_t column = panel * kPanelColumns + i % kPanelColumns;
        gate[i] += bias[column];
        up[i] += bias[hidden + column];
      }
    }
    set.rows->swiglu(gate, up, gate, count * kPanelColumns);
    const char* from = reinterpret_cast<const char*>(gate);
    if (down.element == Element::kBf16) {
      set.rows->to_bf16(gate, reinterpret_cast<uint16_t*>(up), count * kPanelColumns);
      from = reinterpret_cast<const char*>(up);
    }
    const int64_t lines = kPanelColumns / k_per_step(down.element);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t tile = (row + r) / kTileRows, in_tile = (row + r) % kTileRows;
      char* line = to + (tile * down.steps + panel * lines) * kTileBytes + in_tile * 64;
      for (int64_t i = 0; i < lines; ++i, from += 64) std::memcpy(line + i * kTileBytes, from, 64);
    }
  });
  return to;
}

// x [T, d], gate_up [d, 2F] and its bias [2F], down [F, d] and its bias [d], norm scale [d],
// residual [T, d], rows [1] -> out [T, d].
ffi::Error mlp(ffi::AnyBuffer x, ffi::AnyBuffer gate_up_w, F32 gate_up_bias, ffi::AnyBuffer down_w,
               F32 down_bias, F32 norm_scale, F32 residual, I32 rows, int64_t hidden,
               float norm_eps, ffi::Result<F32> out) {
  const auto x_dims = x.dimensions(), out_dims = out->dimensions();
  if (x_dims.size() != 2 || out_dims.size() != 2 || x_dims[0] != out_dims[0]) {
    return ffi::Error::InvalidArgument("mlp: x must be [T, d] and out [T, n]");
  }
  if (hidden <= 0 || hidden % kPanelColumns != 0) {
    return ffi::Error::InvalidArgument("mlp: the hidden size must be a multiple of 64");
  }
  const int64_t all_rows = x_dims[0], k = x_dims[1], n = out_dims[1];
  const auto element = element_of(x);
  if (element.has_error()) return element.error();
  const auto gate_up = weights_of(gate_up_w, k, 2 * hidden);
  if (gate_up.has_error()) return gate_up.error();
  const auto down = weights_of(down_w, hidden, n);
  if (down.has_error()) return down.error();
  const int64_t valid = valid_rows(rows, all_rows);
  const Input input{x.untyped_data(), *element, valid, k, data_or_null(norm_scale), norm_eps};
  const char* packed = pack_rows(input, gate_up->element, gate_up->steps, Slot::kInput);
  const char* middle = gated_hidden(packed, valid, *gate_up, data_or_null(gate_up_bias), *down);
  multiply_to(middle, valid, all_rows, *down, n, data_or_null(down_bias), data_or_null(residual),
              out->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace aqua::linear

XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaLinear, aqua::linear::linear,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<float>("norm_eps")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaMlp, aqua::linear::mlp,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<int64_t>("hidden")
                                  .Attr<float>("norm_eps")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
