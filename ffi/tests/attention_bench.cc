// Times the attention handler without JAX: prompt and decode shapes of a 12-layer model with 12/4
// heads of 64; decodes also with half of the pages in a space behind the pool, in turns with the
// same from one pool. `attention_bench [repetitions]`; AQUA_ISA and AQUA_THREADS apply. Prints the median
// wall time and the least processor time; with AQUA_THREADS=1 the latter means something on a
// busy machine too.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "attention_batch.h"

namespace {

using aqua::test::Batch;
using aqua::test::Shape;

double seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

double processor_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

struct Times {
  double wall_ms, processor_ms;
};

// One call per layer of the pool; the batches take turns.
std::vector<Times> time_steps(const std::vector<Batch*>& batches, int layers, int repetitions) {
  std::vector<std::vector<double>> times(batches.size());
  std::vector<Times> results(batches.size(), {0, 1e30});
  for (int i = 0; i < repetitions; ++i) {
    for (size_t b = 0; b < batches.size(); ++b) {
      const double start = seconds(), used = processor_seconds();
      for (int layer = 0; layer < layers; ++layer) {
        batches[b]->problem.layer = layer;
        const std::string error = aqua::paged_attention(batches[b]->problem);
        if (!error.empty()) {
          std::fprintf(stderr, "%s\n", error.c_str());
          std::exit(1);
        }
      }
      times[b].push_back((seconds() - start) * 1e3);
      results[b].processor_ms =
          std::min(results[b].processor_ms, (processor_seconds() - used) * 1e3);
    }
  }
  for (size_t b = 0; b < batches.size(); ++b) {
    std::nth_element(times[b].begin(), times[b].begin() + times[b].size() / 2, times[b].end());
    results[b].wall_ms = times[b][times[b].size() / 2];
  }
  return results;
}

double read_bandwidth(int repetitions) {
  std::vector<char> from(256 << 20, 1), to(256 << 20);
  double best = 0;
  for (int i = 0; i < repetitions; ++i) {
    const double start = seconds();
    aqua::parallel_for(256, [&](int64_t task, int) {
      const volatile int64_t* p = reinterpret_cast<int64_t*>(&from[task << 20]);
      int64_t sum = 0;
      for (int64_t j = 0; j < (1 << 17); j += 8) sum += p[j];
      to[task] = static_cast<char>(sum);
    });
    best = std::max(best, from.size() / (seconds() - start) * 1e-9);
  }
  return best;
}

void report(const char* name, const Shape& shape, bool deterministic, int repetitions) {
  Batch batch(shape), parts(shape);
  parts.split({parts.problem.pages / 2});
  std::vector<Batch*> batches = {&batch};
  if (shape.counts[0] == 1) batches.push_back(&parts);
  for (Batch* b : batches) {
    b->problem.isa = aqua::current_isa();
    b->problem.deterministic = deterministic;
  }
  const auto all = time_steps(batches, static_cast<int>(shape.layers), repetitions);
  const Times times = all[0];
  int64_t keys = 0;
  for (size_t s = 0; s < shape.counts.size(); ++s) keys += shape.lens[s];
  const double bytes = 2.0 * keys * shape.kv_heads * shape.head_dim * (shape.kv_bf16 ? 2 : 4);
  std::printf("%-32s wall %8.3f ms, processor %8.3f ms; keys and values read once: %.1f GB/s",
              name, times.wall_ms, times.processor_ms,
              bytes * static_cast<double>(shape.layers) / times.processor_ms * 1e-6);
  if (all.size() > 1) {
    std::printf("; half in a space: x%.3f", all[1].processor_ms / times.processor_ms);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const int repetitions = argc > 1 ? std::atoi(argv[1]) : 9;
  std::printf("%s, %d threads, memory read %.1f GB/s\n", aqua::isa_name(aqua::current_isa()),
              aqua::num_threads(), read_bandwidth(5));
  for (const bool bf16 : {true, false}) {
    std::printf("pool in %s\n", bf16 ? "bf16" : "f32");
    Shape shape;
    shape.layers = 12;
    shape.heads = 12;
    shape.kv_heads = 4;
    shape.head_dim = 64;
    shape.page_tokens = 16;
    shape.kv_bf16 = bf16;
    auto run = [&](const char* name, int seqs, int count, int len, bool deterministic) {
      shape.counts.assign(seqs, count);
      shape.lens.assign(seqs, len);
      report(name, shape, deterministic, repetitions);
    };
    run("prefill 1 x 1024", 1, 1024, 1024, false);
    run("prefill 1 x 1024 deterministic", 1, 1024, 1024, true);
    run("prefill 8 x 128", 8, 128, 128, false);
    run("chunk of 64 at 4096", 1, 64, 4096, false);
    run("decode 64 x 256", 64, 1, 256, false);
    run("decode 64 x 256 deterministic", 64, 1, 256, true);
    run("decode 8 x 1024", 8, 1, 1024, false);
    run("decode 1 x 256", 1, 1, 256, false);
    run("decode 1 x 8192", 1, 1, 8192, false);
  }
}
