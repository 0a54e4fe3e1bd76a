// XLA's face of attention.h on CUDA.
//
// Compatible with command buffers: it launches kernels on the stream it is given and nothing else.
// All it depends on at run time lies in device arrays, its scratch memory is a result, and grids
// are bounds from shapes.

#include <cmath>
#include <string>

#include "../common/spaces_ffi.h"
#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using aqua::cuda::Type;
using I32 = ffi::Buffer<ffi::S32>;

bool type_of(ffi::DataType type, Type* out) {
  if (type == ffi::F32) *out = Type::kF32;
  if (type == ffi::BF16) *out = Type::kBf16;
  if (type == ffi::F16) *out = Type::kF16;
  return type == ffi::F32 || type == ffi::BF16 || type == ffi::F16;
}

bool same_dims(ffi::AnyBuffer::Dimensions a, ffi::AnyBuffer::Dimensions b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

ffi::Error invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("aqua_attention: " + what);
}

int shift_of(int64_t tokens) {
  int shift = 0;
  while (int64_t{1} << shift < tokens) ++shift;
  return shift;
}

ffi::Error attention(cudaStream_t stream, ffi::AnyBuffer kv, ffi::AnyBuffer q, ffi::AnyBuffer k,
                     ffi::AnyBuffer v, I32 positions, I32 query_starts, I32 kv_lens,
                     I32 page_table, I32 num_seqs, aqua::SpacesOperand spaces,
                     ffi::Result<ffi::AnyBuffer> kv_out, ffi::Result<ffi::AnyBuffer> out,
                     ffi::Result<ffi::Buffer<ffi::U8>> workspace, int64_t layer, float scale,
                     int64_t window, bool deterministic) {
  aqua::cuda::Attention p{};
  if (!type_of(kv.element_type(), &p.kv_type) || !type_of(q.element_type(), &p.q_type) ||
      !type_of(k.element_type(), &p.new_type)) {
    return invalid("arrays must be float32, bfloat16 or float16");
  }
  const auto kv_dims = kv.dimensions(), q_dims = q.dimensions(), k_dims = k.dimensions();
  const auto table_dims = page_table.dimensions();
  if (kv_dims.size() != 6 || kv_dims[2] != 2 || q_dims.size() != 3 || q_dims[2] != kv_dims[5] ||
      k_dims.size() != 3 || k_dims[0] != q_dims[0] || k_dims[1] != kv_dims[4] ||
      k_dims[2] != kv_dims[5] || !same_dims(k_dims, v.dimensions()) ||
      k.element_type() != v.element_type()) {
    return invalid(
        "allowed: kv [P, L, 2, page_tokens, K, D], q [T, H, D], k and v [T, K, D] of one dtype");
  }
  if (!same_dims(q_dims, out->dimensions()) || q.element_type() != out->element_type() ||
      !same_dims(kv_dims, kv_out->dimensions()) || kv.element_type() != kv_out->element_type()) {
    return invalid("results must have the shapes and dtypes of q and kv");
  }
  if (positions.element_count() != static_cast<size_t>(q_dims[0]) ||
      kv_lens.dimensions().size() != 1 || table_dims.size() != 2 ||
      table_dims[0] != kv_lens.dimensions()[0] || query_starts.dimensions().size() != 1 ||
      query_starts.dimensions()[0] != table_dims[0] + 1 || num_seqs.element_count() != 1) {
    return invalid(
        "metadata: allowed: positions [T], query_starts [S + 1], kv_lens [S], "
        "page_table [S, max_pages], num_seqs [1]");
  }
  if (kv.untyped_data() != kv_out->untyped_data()) {
    return ffi::Error::Internal(
        "aqua_attention: the pool was not passed in place; donate kv to the compiled function and "
        "don't read it after this call");
  }
  if (!aqua::read_spaces(spaces, &p.spaces)) return invalid("spaces: allowed: [N, 8]");
  for (const int64_t dim : {kv_dims[0], q_dims[0], table_dims[0], table_dims[1], layer, window}) {
    if (dim < 0 || dim > 0x3fffffff) return invalid("a dimension is too large");
  }
  p.kv = kv_out->untyped_data();
  p.q = q.untyped_data();
  p.k = k.untyped_data();
  p.v = v.untyped_data();
  p.out = out->untyped_data();
  p.query_starts = query_starts.typed_data();
  p.kv_lens = kv_lens.typed_data();
  p.page_table = page_table.typed_data();
  p.num_seqs = num_seqs.typed_data();
  p.pages = static_cast<int32_t>(kv_dims[0]);
  p.layers = static_cast<int32_t>(kv_dims[1]);
  p.page_tokens = static_cast<int32_t>(kv_dims[3]);
  p.page_shift = shift_of(kv_dims[3]);
  p.kv_heads = static_cast<int32_t>(kv_dims[4]);
  p.head_dim = static_cast<int32_t>(kv_dims[5]);
  p.tokens = static_cast<int32_t>(q_dims[0]);
  p.heads = static_cast<int32_t>(q_dims[1]);
  p.group = p.kv_heads > 0 ? p.heads / p.kv_heads : 0;
  p.seqs = static_cast<int32_t>(table_dims[0]);
  p.max_pages = static_cast<int32_t>(table_dims[1]);
  p.layer = static_cast<int32_t>(layer);
  p.window = static_cast<int32_t>(window);
  p.scale = scale * static_cast<float>(1.4426950408889634);  // log2(e): the kernels take powers of 2
  p.deterministic = deterministic;
  const std::string error = aqua::cuda::check(p);
  if (!error.empty()) return invalid(error);
  const size_t bytes = aqua::cuda::lay_out(&p, workspace->typed_data());
  if (workspace->size_bytes() < bytes) {
    return invalid("workspace: got " + std::to_string(workspace->size_bytes()) +
                   " bytes; allowed: at least " + std::to_string(bytes));
  }
  const cudaError_t status = aqua::cuda::attend(p, stream);
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("aqua_attention: ") + cudaGetErrorString(status));
}

#ifdef AQUA_EMULATE
ffi::Error on_host(ffi::AnyBuffer kv, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   I32 positions, I32 query_starts, I32 kv_lens, I32 page_table, I32 num_seqs,
                   aqua::SpacesOperand spaces, ffi::Result<ffi::AnyBuffer> kv_out,
                   ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::Buffer<ffi::U8>> workspace, int64_t layer, float scale,
                   int64_t window, bool deterministic) {
  const emulation::Capturing as_on_a_device;
  return attention(nullptr, kv, q, k, v, positions, query_starts, kv_lens, page_table, num_seqs,
                   spaces, kv_out, out, workspace, layer, scale, window, deterministic);
}
#endif

}  // namespace

// Bytes of the workspace for these shapes; 0 if the handler can't take them.
// kv_type: 0 f32, 1 bf16, 2 f16.
extern "C" int64_t aqua_attention_workspace(int32_t kv_type, int64_t tokens, int64_t heads,
                                            int64_t seqs, int64_t page_tokens, int64_t kv_heads,
                                            int64_t head_dim, int32_t deterministic) {
  aqua::cuda::Attention p{};
  for (const int64_t dim : {tokens, heads, seqs, page_tokens, kv_heads, head_dim}) {
    if (dim < 0 || dim > 0x3fffffff) return 0;
  }
  p.kv_type = static_cast<Type>(kv_type);
  p.layers = 1;
  p.page_tokens = static_cast<int32_t>(page_tokens);
  p.page_shift = shift_of(page_tokens);
  p.kv_heads = static_cast<int32_t>(kv_heads);
  p.head_dim = static_cast<int32_t>(head_dim);
  p.tokens = static_cast<int32_t>(tokens);
  p.heads = static_cast<int32_t>(heads);
  p.group = p.kv_heads > 0 ? p.heads / p.kv_heads : 0;
  p.seqs = static_cast<int32_t>(seqs);
  p.scale = 1.0f;
  p.deterministic = deterministic != 0;
  return aqua::cuda::check(p).empty() ? static_cast<int64_t>(aqua::cuda::lay_out(&p, nullptr)) : 0;
}

#define AQUA_ATTENTION_OPERANDS                                   \
      .Arg<ffi::AnyBuffer>()        /* kv, aliased with the result */ \
      .Arg<ffi::AnyBuffer>()        /* q */                       \
      .Arg<ffi::AnyBuffer>()        /* k */                       \
      .Arg<ffi::AnyBuffer>()        /* v */                       \
      .Arg<I32>()                   /* positions */               \
      .Arg<I32>()                   /* query_starts */            \
      .Arg<I32>()                   /* kv_lens */                 \
      .Arg<I32>()                   /* page_table */              \
      .Arg<I32>()                   /* num_seqs */                \
      .OptionalArg<I32>()           /* spaces */                  \
      .Ret<ffi::AnyBuffer>()        /* kv */                      \
      .Ret<ffi::AnyBuffer>()        /* out */                     \
      .Ret<ffi::Buffer<ffi::U8>>()  /* workspace */               \
      .Attr<int64_t>("layer")                                     \
      .Attr<float>("scale")                                       \
      .Attr<int64_t>("window")                                    \
      .Attr<bool>("deterministic")

#ifdef AQUA_EMULATE
XLA_FFI_DEFINE_HANDLER_SYMBOL(AquaAttention, on_host, ffi::Ffi::Bind() AQUA_ATTENTION_OPERANDS);
#else
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AquaAttention, attention,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() AQUA_ATTENTION_OPERANDS,
    {ffi::Traits::kCmdBufferCompatible});
#endif
