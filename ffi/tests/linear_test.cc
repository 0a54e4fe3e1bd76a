// Packed matrix products against double precision for every instruction set this processor has, on
// arrays of exactly the size they need (the address sanitizer sees a read beyond), and the pool.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../common/isa.h"
#include "../common/thread_pool.h"
#include "../cpu/linear.h"

namespace {

using aqua::linear::Element;
using aqua::linear::Input;
using aqua::linear::Slot;
using aqua::linear::Weights;

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

float upper_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Values that a bf16 holds exactly, so that one model serves both types.
std::vector<float> values(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& x : out) x = upper_half(normal(random));
  return out;
}

std::vector<char> pack(const std::vector<float>& w, int64_t k, int64_t n, Element element) {
  const int64_t step_k = aqua::linear::k_per_step(element), pair = element == Element::kBf16 ? 2 : 1;
  const int64_t steps = (k + step_k - 1) / step_k, panels = (n + 63) / 64;
  std::vector<char> out(panels * steps * aqua::linear::kStepBytes, 0);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t line = (j / 64 * steps + i / step_k) * 16 + i % step_k / pair;
      const int64_t at = (line * 64 + j % 64) * 4 + i % pair * 2;
      const char* from = reinterpret_cast<const char*>(&w[i * n + j]);
      std::memcpy(out.data() + at, pair == 2 ? from + 2 : from, pair == 2 ? 2 : 4);
    }
  }
  return out;
}

void check_product(int64_t rows, int64_t spare, int64_t k, int64_t n, Element element,
                   std::mt19937& random) {
  const std::vector<float> x = values((rows + spare) * k, random), w = values(k * n, random);
  const std::vector<float> bias = values(n, random), residual = values((rows + spare) * n, random);
  const std::vector<char> packed = pack(w, k, n, element);
  const int64_t step_k = aqua::linear::k_per_step(element);
  const Weights weights{packed.data(), element, (n + 63) / 64, (k + step_k - 1) / step_k};
  std::vector<float> out((rows + spare) * n, NAN);
  const Input input{x.data(), Element::kF32, rows, k};
  const char* tiles = aqua::linear::pack_rows(input, element, weights.steps, Slot::kInput);
  aqua::linear::multiply_to(tiles, rows, rows + spare, weights, n, bias.data(), residual.data(),
                            out.data());
  double worst = 0;
  for (int64_t r = 0; r < rows + spare; ++r) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 1e-30;
      if (r < rows) {
        sum = static_cast<double>(bias[j]) + residual[r * n + j];
        size = std::abs(sum);
        for (int64_t i = 0; i < k; ++i) {
          const double term = static_cast<double>(x[r * k + i]) * w[i * n + j];
          sum += term;
          size += std::abs(term);
        }
      }
      const double error = std::abs(out[r * n + j] - sum) / size;
      worst = error <= worst ? worst : error;  // a NaN becomes the worst
    }
  }
  const std::string what = std::string(aqua::isa_name(aqua::current_isa())) + " rows " +
                           std::to_string(rows) + "+" + std::to_string(spare) + " k " +
                           std::to_string(k) + " n " + std::to_string(n) +
                           (element == Element::kBf16 ? " bf16" : " f32");
  expect(worst < 1e-7 * static_cast<double>(k + 4), what + ": off by " + std::to_string(worst));
}

void check_products() {
  std::mt19937 random(1);
  for (int isa = 0; isa <= static_cast<int>(aqua::detected_isa()); ++isa) {
    setenv("AQUA_ISA", aqua::isa_name(static_cast<aqua::Isa>(isa)), 1);
    for (const Element element : {Element::kBf16, Element::kF32}) {
      check_product(0, 3, 5, 7, element, random);
      check_product(1, 0, 1, 1, element, random);
      check_product(7, 2, 33, 65, element, random);
      check_product(16, 0, 64, 64, element, random);
      check_product(33, 1, 300, 130, element, random);
      check_product(150, 0, 290, 70, element, random);
    }
  }
  unsetenv("AQUA_ISA");
}

void check_rows() {
  std::mt19937 random(2);
  for (int isa = 0; isa <= static_cast<int>(aqua::detected_isa()); ++isa) {
    setenv("AQUA_ISA", aqua::isa_name(static_cast<aqua::Isa>(isa)), 1);
    const aqua::RowKernels& kernels = aqua::row_kernels();
    for (const int64_t count : {1, 15, 16, 65, 200}) {
      const std::vector<float> gate = values(count, random), up = values(count, random);
      std::vector<float> out(count), back(count);
      std::vector<uint16_t> halves(count);
      kernels.swiglu(gate.data(), up.data(), out.data(), count);
      kernels.to_bf16(gate.data(), halves.data(), count);
      kernels.from_bf16(halves.data(), back.data(), count);
      for (int64_t i = 0; i < count; ++i) {
        const double exact = gate[i] / (1 + std::exp(-static_cast<double>(gate[i]))) * up[i];
        expect(std::abs(out[i] - exact) <= 1e-6 * std::abs(exact) + 1e-9, "swiglu");
        expect(back[i] == gate[i], "bf16 and back");
      }
      kernels.rms_norm(gate.data(), up.data(), 1e-5f, out.data(), count);
      double square = 0;
      for (const float x : gate) square += static_cast<double>(x) * x;
      const double root = std::sqrt(square / static_cast<double>(count) + 1e-5);
      for (int64_t i = 0; i < count; ++i) {
        const double exact = gate[i] / root * up[i];
        expect(std::abs(out[i] - exact) <= 1e-6 * std::abs(exact) + 1e-9, "rms_norm");
      }
    }
  }
  unsetenv("AQUA_ISA");
}

void check_pool() {
  std::atomic<int> wrong{0}, nested{0};
  const auto calls = [&] {
    for (int call = 0; call < 300; ++call) {
      std::vector<int> seen(37, 0);
      aqua::parallel_for(37, [&](int64_t task, int worker) {
        ++seen[task];
        if (worker < 0 || worker >= aqua::num_threads()) ++wrong;
        if (task == 5) aqua::parallel_for(3, [&](int64_t, int) { ++nested; });
      });
      wrong += static_cast<int>(std::count_if(seen.begin(), seen.end(), [](int n) { return n != 1; }));
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(calls);
  for (std::thread& thread : threads) thread.join();
  expect(wrong == 0, "every task runs once, on a worker of the pool");
  expect(nested == 4 * 300 * 3, "a task may start tasks");
  aqua::stop_thread_pool();
  std::atomic<int> after{0};
  aqua::parallel_for(10, [&](int64_t, int) { ++after; });
  expect(after == 10, "calls after the pool has stopped run on their own thread");
}

}  // namespace

int main() {
  setenv("AQUA_THREADS", "3", 1);
  check_products();
  check_rows();
  check_pool();
  if (failures == 0) std::printf("linear_test: all passed\n");
  return failures == 0 ? 0 : 1;
}
