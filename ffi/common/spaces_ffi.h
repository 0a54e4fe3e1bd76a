// The operand `spaces` of handlers of any platform.
#pragma once

#include <optional>

#include "spaces.h"
#include "xla/ffi/api/ffi.h"

namespace aqua {

using SpacesOperand = std::optional<xla::ffi::Buffer<xla::ffi::S32>>;

// The rows of the operand, which may be absent; false if it has another shape.
inline bool read_spaces(const SpacesOperand& operand, Spaces* spaces) {
  if (!operand.has_value()) return true;
  const auto dims = operand->dimensions();
  constexpr int64_t kWords = sizeof(Space) / sizeof(int32_t);
  if (dims.size() != 2 || dims[1] != kWords || dims[0] > kMostSpaces) return false;
  spaces->rows = reinterpret_cast<const Space*>(operand->typed_data());
  spaces->count = static_cast<int32_t>(dims[0]);
  return true;
}

}  // namespace aqua
