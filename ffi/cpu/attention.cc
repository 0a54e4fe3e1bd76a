#include "attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../common/thread_pool.h"
#include "attention_kernels.h"
#include "attention_plan.h"

namespace aqua {
namespace {

const AttentionKernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return attention_kernels_avx512();
  if (isa >= Isa::kAvx2) return attention_kernels_avx2();
#endif
  (void)isa;
  return attention_kernels_generic();
}

AttendTile tiles_for(const AttentionProblem& p) {
#if defined(__x86_64__)
  if (p.kv_bf16 && p.isa >= Isa::kAmx) return attend_tile_amx;
  if (p.kv_bf16 && p.isa >= Isa::kAvx512Bf16) return attend_tile_avx512bf16;
#endif
  return kernels_for(p.isa).attend_tile;
}

// Floats of scratch that grow and are never initialised; one per thread.
float* scratch(size_t floats) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t capacity = 0;
  if (floats > capacity) {
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, bytes));
    capacity = bytes / sizeof(float);
  }
  return static_cast<float*>(memory.get());
}

size_t state_floats(const RowShape& s) {
  return static_cast<size_t>(s.heads) * (2 * s.padded + 2) + 64;
}

RowState state_in(float* memory, const RowShape& s) {
  const size_t rows = static_cast<size_t>(s.heads) * s.padded;
  return RowState{memory, memory + 2 * rows, memory + 2 * rows + s.heads, memory + rows};
}

class Attention {
 public:
  Attention(const AttentionProblem& problem, const Plan& plan)
      : p_(problem),
        plan_(plan),
        kernels_(kernels_for(problem.isa)),
        attend_tile_(tiles_for(problem)),
        element_(problem.kv_bf16 ? 2 : 4),
        row_(problem.head_dim * element_),
        token_(problem.kv_heads * row_),
        half_(problem.page_tokens * token_),
        layer_(2 * half_),
        page_(problem.layers * layer_),
        shift_(__builtin_ctzll(static_cast<unsigned long long>(problem.page_tokens))) {
    shape_.heads = static_cast<int>(p_.heads);
    shape_.kv_heads = static_cast<int>(p_.kv_heads);
    shape_.head_dim = static_cast<int>(p_.head_dim);
    shape_.padded = kernels_.padded_dim(shape_.head_dim);
    // What absent tokens point at: D elements of each head, all 0.
    zeros_.assign(static_cast<size_t>(token_), 0);
  }

  void run() {
    write();
    std::vector<float> partials(plan_.num_partials * state_floats(shape_));
    partials_ = partials.data();
    const auto& items = plan_.items;
    parallel_for(static_cast<int64_t>(items.size()),
                 [&](int64_t i, int) { attend(items[i]); });
    const auto& merges = plan_.merges;
    parallel_for(static_cast<int64_t>(merges.size()),
                 [&](int64_t i, int) { merge(merges[i]); });
    clear_padding();
  }

 private:
  // Address of a token's K (kv = 0) or V (1) in the layer; null when its page is absent.
  char* slot(int64_t seq, int64_t position, int kv) const {
    const int32_t page = p_.page_table[seq * p_.max_pages + (position >> shift_)];
    if (page < 0) return nullptr;
    char* const start =
        page < p_.pages ? static_cast<char*>(p_.kv) + page * page_ : p_.spaces.page(page, page_);
    return start + p_.layer * layer_ + kv * half_ + (position & (p_.page_tokens - 1)) * token_;
  }

  // Addresses of the keys first .. first + count - 1, `offset` bytes in; null where absent.
  void locate(int64_t seq, int64_t first, int count, int64_t offset, const void** rows) const {
    for (int i = 0; i < count;) {
      const int64_t in_page = (first + i) & (p_.page_tokens - 1);
      const int end = static_cast<int>(std::min<int64_t>(count, i + p_.page_tokens - in_page));
      const char* row = slot(seq, first + i, 0);
      if (row == nullptr) {
        for (; i < end; ++i) rows[i] = nullptr;
      } else {
        for (row += offset; i < end; ++i, row += token_) rows[i] = row;
      }
    }
  }

  void write() {
    const int64_t elements = p_.kv_heads * p_.head_dim;
    const int64_t from_bytes = elements * (p_.new_bf16 ? 2 : 4);
    // A task of its own is worth about 64 KiB of writes; below that a wake-up costs more.
    const int64_t rows_per_task = std::max<int64_t>(1, (64 << 10) / (2 * token_));
    const int64_t rows = plan_.rows.size();
    parallel_for((rows + rows_per_task - 1) / rows_per_task, [&](int64_t task, int) {
      const int64_t end = std::min(rows, (task + 1) * rows_per_task);
      for (int64_t i = task * rows_per_task; i < end; ++i) {
        for (int kv = 0; kv < 2; ++kv) {
          char* to = slot(plan_.rows[i], p_.positions[i], kv);
          if (to == nullptr) continue;
          const char* from = static_cast<const char*>(kv == 0 ? p_.k : p_.v) + i * from_bytes;
          kernels_.convert(from, p_.new_bf16, to, p_.kv_bf16, elements);
        }
      }
    });
  }

  void fill_block(int64_t seq, int64_t block, int64_t first, int64_t last, KeyBlock* out) const {
    const int64_t start = block * kBlock;
    out->first = static_cast<int>(std::max<int64_t>(0, first - start));
    out->last = static_cast<int>(std::min<int64_t>(kBlock, last - start));
    out->visible = 0;
    for (int t = 0; t < kBlock; ++t) out->k[t] = nullptr;
    locate(seq, start + out->first, out->last - out->first, 0, out->k + out->first);
    for (int t = 0; t < kBlock; ++t) {
      const char* k = static_cast<const char*>(out->k[t]);
      out->k[t] = k == nullptr ? zeros_.data() : k;
      out->v[t] = k == nullptr ? zeros_.data() : k + half_;
      out->visible |= static_cast<uint32_t>(k != nullptr) << t;
    }
  }

  // One token against keys [first, last).
  void attend_row(int64_t seq, int64_t row, int64_t first, int64_t last, RowState& state) const {
    const int64_t width = p_.heads * p_.head_dim;
    const char* q = static_cast<const char*>(p_.q) + row * width * (p_.q_bf16 ? 2 : 4);
    kernels_.start_rows(shape_, q, p_.q_bf16, p_.kv_bf16, p_.scale, state);
    if (first >= last) return;
    // A block is prefetched while the one before it is worked on: 2.35 ms instead of 3.35 for 64 x
    // 256 keys from memory on one thread; two or three blocks ahead were no better.
    constexpr int64_t kAhead = 1;
    KeyBlock blocks[kAhead + 1];
    const int64_t begin = first / kBlock, end = (last + kBlock - 1) / kBlock;
    auto block = [&](int64_t b) { return &blocks[b % (kAhead + 1)]; };
    for (int64_t b = begin; b < std::min(end, begin + kAhead); ++b) {
      fill_block(seq, b, first, last, block(b));
    }
    for (int64_t b = begin; b < end; ++b) {
      KeyBlock* now = block(b);
      now->next = nullptr;
      if (b + kAhead < end) {
        now->next = block(b + kAhead);
        fill_block(seq, b + kAhead, first, last, block(b + kAhead));
      }
      if (now->visible != 0) kernels_.add_block(shape_, p_.kv_bf16, *now, state);
    }
  }

  void finish(int64_t row, const RowState& state) const {
    const int64_t width = p_.heads * p_.head_dim;
    char* out = static_cast<char*>(p_.out) + row * width * (p_.q_bf16 ? 2 : 4);
    kernels_.finish_rows(shape_, p_.kv_bf16, state, out, p_.q_bf16);
  }

  // What a tile's kernel needs to find keys: the pool, the sequence, the kv head.
  struct Where {
    const Attention* attention;
    int64_t seq, head_offset;
  };

  static void locate_from(const void* context, int64_t first, int count, const void** rows) {
    const Where& where = *static_cast<const Where*>(context);
    where.attention->locate(where.seq, first, count, where.head_offset, rows);
  }

  void attend_tile(const Item& item) const {
    const int64_t group = p_.heads / p_.kv_heads;
    const int64_t offset = (item.row * p_.heads + item.head * group) * p_.head_dim;
    const Where where{this, item.seq, item.head * row_};
    TileProblem t;
    t.q = static_cast<const char*>(p_.q) + offset * (p_.q_bf16 ? 2 : 4);
    t.out = static_cast<char*>(p_.out) + offset * (p_.q_bf16 ? 2 : 4);
    t.q_bf16 = p_.q_bf16;
    t.kv_bf16 = p_.kv_bf16;
    t.token_stride = p_.heads * p_.head_dim;
    t.tokens = static_cast<int>(item.rows);
    t.group = static_cast<int>(group);
    t.head_dim = shape_.head_dim;
    t.position = p_.positions[item.row];
    t.window = p_.window;
    t.scale = p_.scale;
    t.first_key = first_visible(p_, t.position);
    t.last_key = t.position + item.rows;
    t.locate = &locate_from;
    t.context = &where;
    t.value_offset = half_;
    t.scratch = scratch(tile_scratch(item.rows * group, shape_.head_dim));
    attend_tile_(t);
  }

  void attend(const Item& item) const {
    if (item.head >= 0) return attend_tile(item);
    const size_t floats = state_floats(shape_);
    if (item.partial >= 0) {
      RowState state = state_in(partials_ + item.partial * floats, shape_);
      attend_row(item.seq, item.row, item.first_key, item.last_key, state);
      return;
    }
    float* memory = scratch(2 * floats);
    RowState total = state_in(memory, shape_), part = state_in(memory + floats, shape_);
    for (int64_t row = item.row; row < item.row + item.rows; ++row) {
      const int64_t last = p_.positions[row] + 1;
      const int64_t first = first_visible(p_, p_.positions[row]);
      const int64_t split = plan_.split;
      const int64_t part_end = (first / split + 1) * split;
      attend_row(item.seq, row, first, std::min(last, part_end), total);
      for (int64_t at = part_end; at < last; at += split) {
        attend_row(item.seq, row, at, std::min(last, at + split), part);
        kernels_.merge_rows(shape_, total, part);
      }
      finish(row, total);
    }
  }

  void merge(const Merge& merge) const {
    const size_t floats = state_floats(shape_);
    RowState total = state_in(partials_ + merge.partial * floats, shape_);
    for (int64_t i = 1; i < merge.count; ++i) {
      const RowState other = state_in(partials_ + (merge.partial + i) * floats, shape_);
      kernels_.merge_rows(shape_, total, other);
    }
    finish(merge.row, total);
  }

  void clear_padding() const {
    const int64_t width = p_.heads * p_.head_dim * (p_.q_bf16 ? 2 : 4);
    const int64_t rows = plan_.rows.size();
    if (rows == p_.tokens) return;
    std::memset(static_cast<char*>(p_.out) + rows * width, 0, (p_.tokens - rows) * width);
  }

  const AttentionProblem& p_;
  const Plan& plan_;
  const AttentionKernels& kernels_;
  AttendTile attend_tile_;
  RowShape shape_;
  int64_t element_, row_, token_, half_, layer_, page_;  // sizes in bytes
  int shift_;  // page_tokens = 1 << shift_; a division for each key would show
  std::vector<char> zeros_;
  float* partials_ = nullptr;
};

}  // namespace

size_t tile_scratch(int64_t rows, int head_dim) {
  constexpr size_t kKeys = 128, kGroup = 32, kState = 256, kSlack = 128;
  const size_t padded = static_cast<size_t>(head_dim) + 31;
  const size_t groups = static_cast<size_t>(rows + 31) / 32;
  return kKeys * kGroup + kKeys * padded + groups * (kState + 2 * padded * kGroup) + kSlack;
}

std::string paged_attention(const AttentionProblem& problem) {
  Plan plan;
  std::string error = make_plan(problem, num_threads(), &plan);
  if (error.empty()) Attention(problem, plan).run();
  return error;
}

}  // namespace aqua
