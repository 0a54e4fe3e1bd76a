// FFI handler: the projection before attention, with all that stands between it and the cache:
// norm of the input, bias, norm of each query and key head, rotary embedding. XLA would make a
// pass (and an array) of each.
#include <cstring>
#include <numeric>

#include "linear_operands.h"
#include "xla/ffi/api/ffi.h"

namespace aqua::linear {
namespace {

struct Heads {
  int64_t query, key, size;              // H, K, D
  const float *cos, *sin;                // [T][D / 2]
  const float *query_scale, *key_scale;  // [D] or null
  float eps;
  float *q, *k, *v;  // [T][H][D], [T][K][D], [T][K][D]
};

// Head `index` of the row, in the order of the weights' columns: queries, keys, values.
void finish_head(const RowKernels& kernels, const Heads& heads, int64_t row, int64_t index,
                 const float* from, float* scratch) {
  const int64_t size = heads.size, half = size / 2;
  if (index >= heads.query + heads.key) {
    const int64_t at = row * heads.key + index - heads.query - heads.key;
    std::memcpy(heads.v + at * size, from, size * sizeof(float));
    return;
  }
  const bool query = index < heads.query;
  const float* scale = query ? heads.query_scale : heads.key_scale;
  if (scale != nullptr) {
    kernels.rms_norm(from, scale, heads.eps, scratch, size);
    from = scratch;
  }
  float* to = query ? heads.q + (row * heads.query + index) * size
                    : heads.k + (row * heads.key + index - heads.query) * size;
  kernels.rotate(from, heads.cos + row * half, heads.sin + row * half, to, half);
}

// x [T, k], w to (H + 2K) * D columns, bias, norm scale [k], query and key norm scales [D],
// cos and sin [T, D / 2], rows [1] -> q [T, H, D], k [T, K, D], v [T, K, D].
ffi::Error qkv(ffi::AnyBuffer x, ffi::AnyBuffer w, F32 bias, F32 norm_scale, F32 query_scale,
               F32 key_scale, F32 cos, F32 sin, I32 rows, float norm_eps, float head_eps,
               ffi::Result<F32> q, ffi::Result<F32> k, ffi::Result<F32> v) {
  const auto x_dims = x.dimensions(), q_dims = q->dimensions(), k_dims = k->dimensions();
  if (x_dims.size() != 2 || q_dims.size() != 3 || k_dims.size() != 3 || q_dims[0] != x_dims[0] ||
      k_dims[0] != x_dims[0] || q_dims[2] != k_dims[2] || q_dims[2] % 2 != 0 ||
      v->element_count() != k->element_count()) {
    return ffi::Error::InvalidArgument("qkv: x must be [T, k], q [T, H, D], k and v [T, K, D]");
  }
  const int64_t all_rows = x_dims[0], size = q_dims[2];
  const Heads heads{q_dims[1], k_dims[1], size, cos.typed_data(), sin.typed_data(),
                    data_or_null(query_scale), data_or_null(key_scale), head_eps,
                    q->typed_data(), k->typed_data(), v->typed_data()};
  const auto is_angles = [&](const F32& a) {
    return static_cast<int64_t>(a.element_count()) == all_rows * size / 2;
  };
  if (!is_angles(cos) || !is_angles(sin)) {
    return ffi::Error::InvalidArgument("qkv: cos and sin must be [T, D / 2]");
  }
  const int64_t columns = (heads.query + 2 * heads.key) * size;
  const auto element = element_of(x);
  if (element.has_error()) return element.error();
  const auto weights = weights_of(w, x_dims[1], columns);
  if (weights.has_error()) return weights.error();
  const int64_t valid = valid_rows(rows, all_rows);
  const Input input{x.untyped_data(), *element, valid, x_dims[1], data_or_null(norm_scale),
                    norm_eps};
  const char* packed = pack_rows(input, weights->element, weights->steps, Slot::kInput);
  // Whole heads and whole panels both: one panel for D = 64, two for 128, three for 96.
  const int64_t group = std::lcm(size, kPanelColumns) / kPanelColumns;
  const float* added = data_or_null(bias);
  const RowKernels& kernels = row_kernels();
  multiply(packed, valid, *weights, group,
           [&](int64_t panel, int64_t panels, int64_t row, int64_t count, const float* sums,
               int64_t stride) {
    const int64_t start = panel * kPanelColumns;
    const int64_t end = std::min(columns, start + panels * kPanelColumns);
    // A head, and then what its norm makes of it.
    float* head = reinterpret_cast<float*>(
        thread_scratch(Slot::kHidden, 2 * size * static_cast<int64_t>(sizeof(float))));
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t column = start; column < end; column += size) {
        for (int64_t i = 0; i < size;) {
          const int64_t at = column - start + i, in_panel = at % kPanelColumns;
          const int64_t run = std::min(size - i, kPanelColumns - in_panel);
          const float* from =
              sums + at / kPanelColumns * stride + r * kPanelColumns + in_panel;
          std::memcpy(head + i, from, run * sizeof(float));
          i += run;
        }
        if (added != nullptr) {
          for (int64_t i = 0; i < size; ++i) head[i] += added[column + i];
        }
        finish_head(kernels, heads, row + r, column / size, head, head + size);
      }
    }
  });
  const auto zero_rest = [&](float* to, int64_t width) {
    std::memset(to + valid * width, 0, (all_rows - valid) * width * sizeof(float));
  };
  zero_rest(heads.q, heads.query * size);
  zero_rest(heads.k, heads.key * size);
  zero_rest(heads.v, heads.key * size);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace aqua::linear

XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaQkv, aqua::linear::qkv,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<float>("norm_eps")
                                  .Attr<float>("head_eps")
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
