// Checks a step's metadata and cuts its attention into tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"

namespace aqua {

// A piece of work for one thread: rows [row, row + rows) of the step, all of sequence `seq`,
// against all they see. With head >= 0, only that kv head, as one tile. With partial >= 0, one row
// against keys [first_key, last_key), whose running softmax goes to that partial result.
struct Item {
  int64_t seq, row, rows;
  int64_t head = -1;
  int64_t first_key = 0, last_key = 0;
  int64_t partial = -1;
  int64_t cost = 0;  // keys times rows times kv heads
};

// Partial results [partial, partial + count) of one row, in order of their keys.
struct Merge {
  int64_t row, partial, count;
};

struct Plan {
  std::vector<int32_t> rows;  // sequence of each valid row
  std::vector<Item> items;    // expensive ones first
  std::vector<Merge> merges;
  int64_t num_partials = 0;
  // A row's keys are taken in parts of so many, by absolute position, each with its own running
  // softmax; the parts are merged in order.
  int64_t split = 0;
};

// First key that a query at `position` sees.
inline int64_t first_visible(const AttentionProblem& p, int64_t position) {
  return p.window > 0 ? std::max<int64_t>(0, position + 1 - p.window) : 0;
}

// Returns an empty string, or what is wrong with the problem.
std::string make_plan(const AttentionProblem& problem, int threads, Plan* plan);

}  // namespace aqua
