// XLA's face of sampling.h: a task is a row.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/thread_pool.h"
#include "sampling.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using I32 = ffi::Buffer<ffi::S32>;

ffi::Error SampleTokens(F32 logits, F32 temperature, I32 top_k, F32 top_p, F32 min_p, F32 uniform,
                        I32 rows, ffi::Result<I32> tokens) {
  const auto dims = logits.dimensions();
  const size_t count = dims.size() == 2 ? dims[0] : 0;
  if (dims.size() != 2 || dims[1] < 1 || temperature.element_count() != count ||
      top_k.element_count() != count || top_p.element_count() != count ||
      min_p.element_count() != count || uniform.element_count() != count ||
      tokens->element_count() != count || rows.element_count() > 1) {
    return ffi::Error::InvalidArgument(
        "aqua_sample: allowed: logits [R, V] with V > 0, parameters and tokens [R], rows [0 or 1]");
  }
  const int64_t vocab = dims[1], all = static_cast<int64_t>(count);
  const int64_t valid = rows.element_count() == 0
                            ? all
                            : std::clamp<int64_t>(rows.typed_data()[0], 0, all);
  int32_t* out = tokens->typed_data();
  std::fill(out + valid, out + all, 0);
  aqua::parallel_for(valid, [&](int64_t row, int) {
    thread_local std::vector<float> scratch;
    const aqua::SamplingRule rule{temperature.typed_data()[row], top_k.typed_data()[row],
                                  top_p.typed_data()[row], min_p.typed_data()[row],
                                  uniform.typed_data()[row]};
    if (rule.temperature > 0.0f && static_cast<int64_t>(scratch.size()) < 2 * vocab) {
      scratch.resize(2 * vocab);
    }
    out[row] = aqua::sample_row(logits.typed_data() + row * vocab, vocab, rule, scratch.data());
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaSample, SampleTokens,
                              ffi::Ffi::Bind()
                                  .Arg<F32>()   // logits
                                  .Arg<F32>()   // temperature
                                  .Arg<I32>()   // top_k
                                  .Arg<F32>()   // top_p
                                  .Arg<F32>()   // min_p
                                  .Arg<F32>()   // uniform
                                  .Arg<I32>()   // rows
                                  .Ret<I32>());  // tokens
