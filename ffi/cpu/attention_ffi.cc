// XLA's face of attention.h.

#include <string>

#include "../common/spaces_ffi.h"
#include "attention.h"
#include "spaces_use.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32>;

bool is_float(ffi::DataType type) { return type == ffi::F32 || type == ffi::BF16; }

std::string dims_text(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(dims[i]);
  }
  return text + "]";
}

bool same_dims(ffi::AnyBuffer::Dimensions a, ffi::AnyBuffer::Dimensions b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

ffi::Error invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("aqua_attention: " + what);
}

ffi::Error Attention(ffi::AnyBuffer kv, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     I32 positions, I32 query_starts, I32 kv_lens, I32 page_table, I32 num_seqs,
                     aqua::SpacesOperand spaces, ffi::Result<ffi::AnyBuffer> kv_out,
                     ffi::Result<ffi::AnyBuffer> out, int64_t layer, float scale, int64_t window, bool deterministic) {
  for (const auto& buffer : {kv, q, k, v}) {
    if (!is_float(buffer.element_type())) return invalid("arrays must be float32 or bfloat16");
  }
  const auto kv_dims = kv.dimensions(), q_dims = q.dimensions(), k_dims = k.dimensions();
  if (kv_dims.size() != 6 || kv_dims[2] != 2) {
    return invalid("kv: got " + dims_text(kv_dims) + "; allowed: [P, L, 2, page_tokens, K, D]");
  }
  if (q_dims.size() != 3 || q_dims[2] != kv_dims[5]) {
    return invalid("q: got " + dims_text(q_dims) + "; allowed: [T, H, D] with kv's D");
  }
  if (k_dims.size() != 3 || k_dims[0] != q_dims[0] || k_dims[1] != kv_dims[4] ||
      k_dims[2] != kv_dims[5] || !same_dims(k_dims, v.dimensions()) ||
      k.element_type() != v.element_type()) {
    return invalid("k, v: got " + dims_text(k_dims) + " and " + dims_text(v.dimensions()) +
                   "; allowed: [T, K, D] both, of one dtype");
  }
  if (!same_dims(q_dims, out->dimensions()) || q.element_type() != out->element_type() ||
      !same_dims(kv_dims, kv_out->dimensions()) || kv.element_type() != kv_out->element_type()) {
    return invalid("results must have the shapes and dtypes of q and kv");
  }
  const auto table_dims = page_table.dimensions();
  if (positions.dimensions().size() != 1 || positions.dimensions()[0] != q_dims[0] ||
      kv_lens.dimensions().size() != 1 || table_dims.size() != 2 ||
      table_dims[0] != kv_lens.dimensions()[0] || query_starts.dimensions().size() != 1 ||
      query_starts.dimensions()[0] != table_dims[0] + 1 || num_seqs.element_count() != 1) {
    return invalid(
        "metadata: allowed: positions [T], query_starts [S + 1], kv_lens [S], "
        "page_table [S, max_pages], num_seqs [1]");
  }
  // The pool must be updated where it lies: a copy of it would be both slow and lost.
  if (kv.untyped_data() != kv_out->untyped_data()) {
    return ffi::Error::Internal(
        "aqua_attention: the pool was not passed in place; donate kv to the compiled function and "
        "don't read it after this call");
  }

  aqua::AttentionProblem p;
  p.kv = kv_out->untyped_data();
  p.q = q.untyped_data();
  p.k = k.untyped_data();
  p.v = v.untyped_data();
  p.out = out->untyped_data();
  p.kv_bf16 = kv.element_type() == ffi::BF16;
  p.q_bf16 = q.element_type() == ffi::BF16;
  p.new_bf16 = k.element_type() == ffi::BF16;
  p.pages = kv_dims[0];
  p.layers = kv_dims[1];
  p.page_tokens = kv_dims[3];
  p.kv_heads = kv_dims[4];
  p.head_dim = kv_dims[5];
  p.tokens = q_dims[0];
  p.heads = q_dims[1];
  p.seqs = table_dims[0];
  p.max_pages = table_dims[1];
  p.positions = positions.typed_data();
  p.query_starts = query_starts.typed_data();
  p.kv_lens = kv_lens.typed_data();
  p.page_table = page_table.typed_data();
  p.num_seqs = num_seqs.typed_data()[0];
  p.layer = layer;
  p.scale = scale;
  p.window = window;
  p.deterministic = deterministic;
  p.isa = aqua::current_isa();
  if (!aqua::read_spaces(spaces, &p.spaces)) return invalid("spaces: allowed: [N, 8]");
  const aqua::SpacesInUse in_use(p.spaces);
  std::string error = in_use.error();
  if (error.empty()) error = aqua::paged_attention(p);
  return error.empty() ? ffi::Error::Success() : invalid(error);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaAttention, Attention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()  // kv, aliased with the first result
                                  .Arg<ffi::AnyBuffer>()  // q
                                  .Arg<ffi::AnyBuffer>()  // k
                                  .Arg<ffi::AnyBuffer>()  // v
                                  .Arg<I32>()             // positions
                                  .Arg<I32>()             // query_starts
                                  .Arg<I32>()             // kv_lens
                                  .Arg<I32>()             // page_table
                                  .Arg<I32>()             // num_seqs
                                  .OptionalArg<I32>()     // spaces
                                  .Ret<ffi::AnyBuffer>()  // kv
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<bool>("deterministic"));

// Name of the instruction set the kernels use now; for the library's report.
extern "C" const char* aqua_isa() { return aqua::isa_name(aqua::current_isa()); }
extern "C" const char* aqua_detected_isa() { return aqua::isa_name(aqua::detected_isa()); }
