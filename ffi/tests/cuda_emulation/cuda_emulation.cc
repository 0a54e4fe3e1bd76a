#include "cuda_emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStack = 96 << 10;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  int index = 0;
  bool done = true;
  uint64_t warp_operations = 0;
  std::vector<Copy> open;                // not committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  int arrived[2] = {0, 0};
  uint64_t finished[2] = {0, 0};
  alignas(16) unsigned char in[2][32 * kLaneBytes];
  alignas(16) unsigned char out[2][32 * kLaneBytes];
};

std::mutex one_at_a_time;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared;
const std::function<void()>* body_now = nullptr;
Fiber* current = nullptr;
void* scheduler_stack = nullptr;
#if !defined(__x86_64__)
ucontext_t scheduler_context;
#endif
int live = 0, at_barrier = 0;
uint64_t barriers = 0, progress = 0;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: %s\n", what);
  std::abort();
}

#if defined(__x86_64__)
extern "C" void aqua_emulation_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.local aqua_emulation_switch
aqua_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

void leave() {  // to the scheduler
#if defined(__x86_64__)
  aqua_emulation_switch(&current->stack_pointer, scheduler_stack);
#else
  swapcontext(&current->context, &scheduler_context);
#endif
}

void fiber_main() {
  (*body_now)();
  if (!current->open.empty() || !current->groups.empty()) fail("a thread ended with copies pending");
  current->done = true;
  --live;
  ++progress;
  leave();
  fail("a finished thread was resumed");
}

void start(Fiber* fiber) {
  if (!fiber->stack) fiber->stack.reset(new unsigned char[kStack]);
  fiber->done = false;
  fiber->warp_operations = 0;
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber->stack.get() + kStack) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<void**>(top);
  *--frame = nullptr;  // keeps the alignment that a call would leave
  *--frame = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
  fiber->stack_pointer = frame;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
#endif
}

void resume(Fiber* fiber) {
  current = fiber;
  threadIdx = dim3(fiber->index, 0, 0);
#if defined(__x86_64__)
  aqua_emulation_switch(&scheduler_stack, fiber->stack_pointer);
#else
  swapcontext(&scheduler_context, &fiber->context);
#endif
}

void perform(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

}  // namespace

void launch(int blocks, int threads, size_t shared_bytes, const std::function<void()>& body) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads % 32 != 0) fail("blocks must be whole warps");
  static std::mt19937 random([] {
    const char* seed = std::getenv("AQUA_EMULATE_SEED");
    return seed ? static_cast<unsigned>(std::atoi(seed)) : 1u;
  }());
  while (fibers.size() < static_cast<size_t>(threads)) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->index = static_cast<int>(fibers.size()) - 1;
  }
  body_now = &body;
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  for (int block = 0; block < blocks; ++block) {
    blockIdx = dim3(block);
    // Shared memory holds garbage at first: not-a-numbers, whatever the type.
    shared.assign(shared_bytes + 16, 0xff);
    warps.assign(threads / 32, Warp());
    live = threads;
    at_barrier = 0;
    for (int i = 0; i < threads; ++i) start(fibers[i].get());
    std::vector<int> order(threads / 32);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    while (live > 0) {
      std::shuffle(order.begin(), order.end(), random);
      const uint64_t before = progress;
      for (const int warp : order) {
        // A warp runs on for a while: barriers that are missing show when warps drift apart.
        for (unsigned rounds = random() % 8 + 1; rounds > 0; --rounds) {
          const bool forward = random() & 1;
          for (int i = 0; i < 32; ++i) {
            Fiber* fiber = fibers[warp * 32 + (forward ? i : 31 - i)].get();
            if (!fiber->done) resume(fiber);
          }
        }
      }
      if (progress == before) fail("no thread can go on: a barrier that not all threads reach?");
    }
  }
}

unsigned char* shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(shared.data());
  return reinterpret_cast<unsigned char*>((address + 15) & ~uintptr_t{15});
}

void block_barrier() {
  const uint64_t mine = barriers;
  ++progress;
  if (++at_barrier == live) {
    at_barrier = 0;
    ++barriers;
    return;
  }
  while (barriers == mine) leave();
}

int lane() { return static_cast<int>(threadIdx.x & 31); }

void warp_wide(const void* in, size_t in_bytes, void* out, size_t out_bytes, Combine combine,
               const void* extra) {
  if (in_bytes > kLaneBytes || out_bytes > kLaneBytes) fail("too much for one lane");
  Warp& warp = warps[threadIdx.x / 32];
  const int me = lane();
  const uint64_t number = current->warp_operations++;
  const int side = number & 1;
  std::memcpy(warp.in[side] + me * kLaneBytes, in, in_bytes);
  ++progress;
  if (++warp.arrived[side] == 32) {
    combine(warp.in[side], warp.out[side], extra);
    warp.arrived[side] = 0;
    warp.finished[side] = number + 1;
  } else {
    while (warp.finished[side] < number + 1) leave();
  }
  std::memcpy(out, warp.out[side] + me * kLaneBytes, out_bytes);
}

void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("an asynchronous copy is not aligned");
  }
  // Until it is waited for, the destination holds neither the old nor the new.
  std::memset(to, 0xfe, bytes);
  current->open.push_back({to, from, bytes});
}

void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait_copies(int pending) {
  while (current->groups.size() > static_cast<size_t>(pending)) {
    perform(current->groups.front());
    current->groups.pop_front();
  }
}

void load_matrices(uint32_t out[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row is not aligned");
  warp_wide(&row, sizeof(row), out, 16,
            [](const unsigned char* in, unsigned char* results, const void* extra) {
              const bool flip = *static_cast<const bool*>(extra);
              uint16_t elements[4][8][8];
              for (int lane = 0; lane < 32; ++lane) {
                const void* address;
                std::memcpy(&address, in + lane * kLaneBytes, sizeof(address));
                std::memcpy(elements[lane / 8][lane % 8], address, 16);
              }
              for (int lane = 0; lane < 32; ++lane) {
                uint32_t packed[4];
                for (int m = 0; m < 4; ++m) {
                  const int i = lane / 4, j = 2 * (lane % 4);
                  const auto& e = elements[m];
                  packed[m] = flip ? e[j][i] | uint32_t{e[j + 1][i]} << 16
                                   : e[i][j] | uint32_t{e[i][j + 1]} << 16;
                }
                std::memcpy(results + lane * kLaneBytes, packed, 16);
              }
            },
            &transposed);
}

void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Widen widen) {
  struct In {
    float c[4];
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.c, c, 16);
  std::memcpy(mine.a, a, 16);
  mine.b[0] = b0, mine.b[1] = b1;
  warp_wide(&mine, sizeof(mine), c, 16,
            [](const unsigned char* in, unsigned char* results, const void* extra) {
              const Widen number = *static_cast<const Widen*>(extra);
              float left[16][16], right[16][8], sum[16][8];
              for (int lane = 0; lane < 32; ++lane) {
                In x;
                std::memcpy(&x, in + lane * kLaneBytes, sizeof(x));
                const int r = lane / 4, t = lane % 4;
                for (int half = 0; half < 2; ++half) {
                  for (int k = 0; k < 2; ++k) {  // k: columns 0-7 or 8-15 of a
                    const uint32_t word = x.a[half + 2 * k];
                    left[r + 8 * half][2 * t + 8 * k] = number(word & 0xffff);
                    left[r + 8 * half][2 * t + 8 * k + 1] = number(word >> 16);
                  }
                  right[2 * t + 8 * half][r] = number(x.b[half] & 0xffff);
                  right[2 * t + 8 * half + 1][r] = number(x.b[half] >> 16);
                  sum[r + 8 * half][2 * t] = x.c[2 * half];
                  sum[r + 8 * half][2 * t + 1] = x.c[2 * half + 1];
                }
              }
              for (int i = 0; i < 16; ++i) {
                for (int j = 0; j < 8; ++j) {
                  for (int k = 0; k < 16; ++k) sum[i][j] += left[i][k] * right[k][j];
                }
              }
              for (int lane = 0; lane < 32; ++lane) {
                const int r = lane / 4, t = lane % 4;
                const float out[4] = {sum[r][2 * t], sum[r][2 * t + 1], sum[r + 8][2 * t],
                                      sum[r + 8][2 * t + 1]};
                std::memcpy(results + lane * kLaneBytes, out, 16);
              }
            },
            &widen);
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, part = bits & 1023;
  float x;
  if (exponent == 31) {
    const uint32_t word = sign | 0x7f800000 | part << 13;
    std::memcpy(&x, &word, 4);
    return x;
  }
  x = exponent == 0 ? std::ldexp(static_cast<float>(part), -24)
                    : std::ldexp(static_cast<float>(part | 1024), static_cast<int>(exponent) - 25);
  return sign ? -x : x;
}

uint16_t float_to_half(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const auto sign = static_cast<uint16_t>(word >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < std::ldexp(1.0f, -14)) {
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  }
  int exponent;
  const float part = std::frexp(size, &exponent);  // in [0.5, 1)
  const auto rounded = static_cast<int>(std::nearbyint(std::ldexp(part, 11)));  // 1024 to 2048
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + rounded - 1024);
}

uint16_t float_to_bf16(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if (std::isnan(x)) return static_cast<uint16_t>(word >> 16 | 64);
  word += 0x7fff + (word >> 16 & 1);
  return static_cast<uint16_t>(word >> 16);
}

}  // namespace emulation

unsigned __ballot_sync(unsigned, bool value) {
  unsigned out;
  const uint32_t in = value;
  emulation::warp_wide(&in, 4, &out, 4,
                       [](const unsigned char* all, unsigned char* results, const void*) {
                         unsigned bits = 0;
                         for (int lane = 0; lane < 32; ++lane) {
                           uint32_t x;
                           std::memcpy(&x, all + lane * emulation::kLaneBytes, 4);
                           bits |= (x & 1) << lane;
                         }
                         for (int lane = 0; lane < 32; ++lane) {
                           std::memcpy(results + lane * emulation::kLaneBytes, &bits, 4);
                         }
                       },
                       nullptr);
  return out;
}
