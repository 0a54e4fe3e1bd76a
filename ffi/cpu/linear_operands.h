// Reading the operands of the linear handlers. An operand that is absent has no elements.
#pragma once

#include <algorithm>

#include "linear.h"
#include "xla/ffi/api/ffi.h"

namespace aqua::linear {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using I32 = ffi::Buffer<ffi::S32>;

inline const float* data_or_null(const F32& buffer) {
  return buffer.element_count() == 0 ? nullptr : buffer.typed_data();
}

// Number of leading rows that count: all of them when the operand is absent.
inline int64_t valid_rows(const I32& rows, int64_t all_rows) {
  if (rows.element_count() == 0) return all_rows;
  return std::clamp<int64_t>(rows.typed_data()[0], 0, all_rows);
}

inline ffi::ErrorOr<Element> element_of(const ffi::AnyBuffer& buffer) {
  if (buffer.element_type() == ffi::BF16) return Element::kBf16;
  if (buffer.element_type() == ffi::F32) return Element::kF32;
  return ffi::Unexpected(ffi::Error::InvalidArgument("linear: operands must be bf16 or f32"));
}

// Checks a packed array [panels][steps][16][64](2 for bf16) against k and n.
inline ffi::ErrorOr<Weights> weights_of(const ffi::AnyBuffer& buffer, int64_t k, int64_t n) {
  const auto element = element_of(buffer);
  if (element.has_error()) return ffi::Unexpected(element.error());
  const auto dims = buffer.dimensions();
  const int64_t rank = *element == Element::kBf16 ? 5 : 4, per_step = k_per_step(*element);
  const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns;
  const int64_t steps = (k + per_step - 1) / per_step;
  if (static_cast<int64_t>(dims.size()) != rank || dims[0] != panels || dims[1] != steps ||
      dims[2] != 16 || dims[3] != kPanelColumns || (rank == 5 && dims[4] != 2)) {
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("linear: the weights' packed shape doesn't fit x and out"));
  }
  return Weights{static_cast<const char*>(buffer.untyped_data()), *element, panels, steps};
}

}  // namespace aqua::linear
