#include "attention_plan.h"

#include <cmath>
#include <limits>

namespace aqua {
namespace {

// Deterministic mode: a part is worth a task of its own, and long sequences have several.
constexpr int64_t kFixedSplit = 512;
// Otherwise a decode is split until every thread has work, but no finer than this many keys: the
// merge and the task cost about as much as reading 16 of them.
constexpr int64_t kLeastSplit = 64;
constexpr int64_t kRowsPerItem = 8;
// Query rows (tokens times group) of one prompt tile: enough that packing a block of keys and
// values for it is a few percent of the work, and that its operands stay in a 1 MiB cache.
constexpr int64_t kTileRows = 192;

std::string wrong(const std::string& what, int64_t got, const std::string& allowed) {
  return what + ": got " + std::to_string(got) + "; allowed: " + allowed;
}

std::string check_shapes(const AttentionProblem& p) {
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0) {
    return wrong("query heads", p.heads, "a multiple of kv heads (" + std::to_string(p.kv_heads) +
                                             ")");
  }
  if (p.head_dim < 1) return wrong("head_dim", p.head_dim, ">= 1");
  if (p.page_tokens < 1 || (p.page_tokens & (p.page_tokens - 1)) != 0) {
    return wrong("page_tokens", p.page_tokens, "a power of two");
  }
  if (p.layer < 0 || p.layer >= p.layers) {
    return wrong("layer", p.layer, "0 to " + std::to_string(p.layers - 1));
  }
  if (p.window < 0) return wrong("window", p.window, ">= 1, or 0 for none");
  if (!std::isfinite(p.scale) || p.scale <= 0.0f) return "scale: allowed: finite and > 0";
  if (p.num_seqs < 0 || p.num_seqs > p.seqs) {
    return wrong("num_seqs", p.num_seqs, "0 to " + std::to_string(p.seqs));
  }
  return "";
}

std::string check_sequence(const AttentionProblem& p, int64_t s) {
  const std::string where = " of sequence " + std::to_string(s);
  const int64_t start = p.query_starts[s], count = p.query_starts[s + 1] - start;
  if (count < 0 || start + count > p.tokens) {
    return wrong("query_starts" + where, p.query_starts[s + 1],
                 std::to_string(start) + " to " + std::to_string(p.tokens));
  }
  const int64_t len = p.kv_lens[s];
  if (len < count || len > p.max_pages * p.page_tokens) {
    return wrong("kv_lens" + where, len,
                 std::to_string(count) + " to " + std::to_string(p.max_pages * p.page_tokens));
  }
  if (count == 0) return "";
  for (int64_t i = 0; i < count; ++i) {
    if (p.positions[start + i] != len - count + i) {
      return wrong("positions of row " + std::to_string(start + i), p.positions[start + i],
                   std::to_string(len - count + i) + ", from kv_lens and query_starts");
    }
  }
  const int32_t* table = p.page_table + s * p.max_pages;
  const int64_t first = first_visible(p, len - count) / p.page_tokens;
  for (int64_t i = first; i <= (len - 1) / p.page_tokens; ++i) {
    if (table[i] >= p.pages && p.spaces.find(table[i]) == nullptr) {
      return wrong("page_table" + where + ", entry " + std::to_string(i), table[i],
                   "less than " + std::to_string(p.pages) + " pages, or one of " +
                       std::to_string(p.spaces.count) + " spaces");
    }
  }
  return "";
}

int64_t keys_of(const AttentionProblem& p, int64_t row) {
  return p.positions[row] + 1 - first_visible(p, p.positions[row]);
}

// Whether a prompt chunk goes through tiles, 32 query rows at a time. Below that lanes stay empty;
// the matrix units are worth it even mostly empty.
bool worth_tiles(const AttentionProblem& p, int64_t count) {
  if (p.deterministic || count < 2) return false;
  const bool matrix = p.kv_bf16 && p.isa >= Isa::kAvx512Bf16;
  return count * (p.heads / p.kv_heads) >= (matrix ? 8 : 24);
}

void tile_rows(const AttentionProblem& p, int64_t seq, int threads, Plan* plan) {
  const int64_t start = p.query_starts[seq], end = p.query_starts[seq + 1];
  const int64_t group = p.heads / p.kv_heads;
  int64_t tokens = std::max<int64_t>(1, kTileRows / group);
  const int64_t least = std::max<int64_t>(1, 32 / group);
  while (tokens / 2 >= least && (end - start + tokens - 1) / tokens * p.kv_heads < 4 * threads) {
    tokens /= 2;
  }
  for (int64_t row = start; row < end; row += tokens) {
    Item item{seq, row, std::min(tokens, end - row)};
    for (int64_t i = 0; i < item.rows; ++i) item.cost += keys_of(p, row + i);
    for (item.head = 0; item.head < p.kv_heads; ++item.head) plan->items.push_back(item);
  }
}

// Appends the parts of one row as tasks with partial results.
void split_row(const AttentionProblem& p, int64_t seq, int64_t row, int64_t split, Plan* plan) {
  const int64_t first = first_visible(p, p.positions[row]), last = p.positions[row] + 1;
  Merge merge{row, plan->num_partials, 0};
  for (int64_t at = first; at < last;) {
    const int64_t end = std::min(last, (at / split + 1) * split);
    Item item{seq, row, 1};
    item.first_key = at;
    item.last_key = end;
    item.partial = plan->num_partials++;
    item.cost = (end - at) * p.kv_heads;
    plan->items.push_back(item);
    ++merge.count;
    at = end;
  }
  plan->merges.push_back(merge);
}

}  // namespace

std::string make_plan(const AttentionProblem& p, int threads, Plan* plan) {
  std::string error = check_shapes(p);
  if (!error.empty()) return error;
  if (p.num_seqs > 0 && p.query_starts[0] != 0) {
    return wrong("query_starts[0]", p.query_starts[0], "0");
  }
  int64_t work = 0;
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    error = check_sequence(p, s);
    if (!error.empty()) return error;
    for (int64_t row = p.query_starts[s]; row < p.query_starts[s + 1]; ++row) {
      plan->rows.push_back(static_cast<int32_t>(s));
      work += keys_of(p, row);
    }
  }
  // What one task of a split row should read so that the threads end together.
  const int64_t share = std::max(kLeastSplit, (work / (2 * threads) + 15) / 16 * 16);
  const int64_t task_split = p.deterministic ? kFixedSplit : share;
  plan->split = p.deterministic ? kFixedSplit : std::numeric_limits<int32_t>::max();
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    const int64_t start = p.query_starts[s], count = p.query_starts[s + 1] - start;
    if (count == 1 && threads > 1 && keys_of(p, start) > task_split + task_split / 2) {
      split_row(p, s, start, task_split, plan);
      continue;
    }
    if (worth_tiles(p, count)) {
      tile_rows(p, s, threads, plan);
      continue;
    }
    for (int64_t row = start; row < start + count; row += kRowsPerItem) {
      Item item{s, row, std::min(kRowsPerItem, start + count - row)};
      for (int64_t i = 0; i < item.rows; ++i) item.cost += keys_of(p, row + i) * p.kv_heads;
      plan->items.push_back(item);
    }
  }
  std::stable_sort(plan->items.begin(), plan->items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return "";
}

}  // namespace aqua
