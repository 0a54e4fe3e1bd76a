// What the kernels use of the device, in one place: 16-byte copies, matrix fragments, number
// formats. With AQUA_EMULATE everything here and in the kernels compiles as plain C++
// and runs on a CPU, thread by thread (ffi/tests/cuda_emulation/), so that the kernels' arithmetic
// and synchronisation are tested where there is no GPU. The PTX below is then all that is not.
#pragma once

#include "../common/spaces.h"
#include "device.h"

#ifndef AQUA_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace aqua {
namespace cuda {

// ---- Number formats. Rounding is to nearest even.

AQUA_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

#ifdef AQUA_EMULATE
inline float widen(Bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
inline float widen(F16 x) { return emulation::half_to_float(x.bits); }
inline void narrow(float x, Bf16* to) { to->bits = emulation::float_to_bf16(x); }
inline void narrow(float x, F16* to) { to->bits = emulation::float_to_half(x); }
template <typename T>
inline uint32_t pack2(float low, float high) {
  T a, b;
  narrow(low, &a);
  narrow(high, &b);
  return a.bits | uint32_t{b.bits} << 16;
}
#else
__device__ __forceinline__ float widen(Bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void narrow(float x, Bf16* to) {
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(float x, F16* to) {
  to->bits = __half_as_ushort(__float2half_rn(x));
}
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<Bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, 4);
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack2<F16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, 4);
  return bits;
}
#endif
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }

// Four elements from index `at`, a multiple of 4; the array is aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void load4(const void* array, int64_t at, float out[4]) {
  if constexpr (sizeof(T) == 4) {
    const Vec16 raw = *reinterpret_cast<const Vec16*>(static_cast<const float*>(array) + at);
    out[0] = bits_to_float(raw.x), out[1] = bits_to_float(raw.y);
    out[2] = bits_to_float(raw.z), out[3] = bits_to_float(raw.w);
  } else {
    const Vec8 raw = *reinterpret_cast<const Vec8*>(static_cast<const uint16_t*>(array) + at);
    out[0] = widen(T{static_cast<uint16_t>(raw.x)});
    out[1] = widen(T{static_cast<uint16_t>(raw.x >> 16)});
    out[2] = widen(T{static_cast<uint16_t>(raw.y)});
    out[3] = widen(T{static_cast<uint16_t>(raw.y >> 16)});
  }
}

__device__ __forceinline__ void load4(const void* array, Type type, int64_t at, float out[4]) {
  if (type == Type::kF32) {
    load4<float>(array, at, out);
  } else if (type == Type::kBf16) {
    load4<Bf16>(array, at, out);
  } else {
    load4<F16>(array, at, out);
  }
}

__device__ __forceinline__ void store1(void* array, Type type, int64_t at, float x) {
  if (type == Type::kF32) {
    static_cast<float*>(array)[at] = x;
  } else if (type == Type::kBf16) {
    narrow(x, static_cast<Bf16*>(array) + at);
  } else {
    narrow(x, static_cast<F16*>(array) + at);
  }
}

// Two neighbours; `at` is even and the array aligned to 8 bytes.
__device__ __forceinline__ void store2(void* array, Type type, int64_t at, float x, float y) {
  if (type == Type::kF32) {
    uint32_t a, b;
    std::memcpy(&a, &x, 4);
    std::memcpy(&b, &y, 4);
    *reinterpret_cast<Vec8*>(static_cast<float*>(array) + at) = Vec8{a, b};
  } else {
    const uint32_t both = type == Type::kBf16 ? pack2<Bf16>(x, y) : pack2<F16>(x, y);
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(array) + at) = both;
  }
}

// ---- Asynchronous copies to shared memory, 16 bytes each; zeros instead of what isn't valid.
// Every thread waits for its own copies only: a barrier makes them visible to the block.

#ifdef AQUA_EMULATE
inline void copy_async16(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, valid ? global : nullptr, 16);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
inline void wait_copies() {
  emulation::wait_copies(kPending);
}
inline void load_matrices(uint32_t out[4], const void* row) {
  emulation::load_matrices(out, row, false);
}
inline void load_matrices_transposed(uint32_t out[4], const void* row) {
  emulation::load_matrices(out, row, true);
}
template <typename T>
inline void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  emulation::multiply(c, a, b0, b1, [](uint16_t bits) { return widen(T{bits}); });
}
inline float exp2_of(float x) { return std::exp2(x); }
inline unsigned char* shared_memory() { return emulation::shared_memory(); }
#else
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}
// Four 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8, and
// gets elements (i / 4, 2 (i % 4)) and its right neighbour of each, packed.
__device__ __forceinline__ void load_matrices(uint32_t out[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// As above, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t out[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// c[16, 8] += a[16, 16] b[16, 8], in the fragments of mma.m16n8k16. With r = lane / 4 and
// t = lane % 4: c is (r, 2t), (r, 2t+1), (r+8, 2t), (r+8, 2t+1).
template <typename T>
__device__ __forceinline__ void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<Bf16>(float c[4], const uint32_t a[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<F16>(float c[4], const uint32_t a[4], uint32_t b0,
                                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 2^x; exact for 0, and 0 for minus infinity.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
extern __shared__ uint4 aqua_shared[];
__device__ __forceinline__ unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(aqua_shared);
}
#endif

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Pages of a pool and of the spaces behind it, as kernels look them up: without a branch that
// differs between threads. (With Spaces::page, whose loop ends early, the matrix kernels were nearly
// twice as long.) Ids follow each other from the pool's on, so the last space that begins at or
// before a page has it.

//
// Places are bytes from the pool's start: what is computed from a kernel's argument is known to lie
// in global memory, an address out of a table isn't, and its loads would be of the slower kind.

AQUA_HD int64_t from_pool(const void* pool, const Space& space) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(space.base()) -
                              reinterpret_cast<uintptr_t>(pool));
}

class PageMap {
 public:
  // Bytes of shared memory for `spaces`, and for as many as there can be.
  static AQUA_HD int64_t bytes(const Spaces& spaces) { return int64_t{spaces.count} * sizeof(Row); }
  static constexpr int64_t kMostBytes = kMostSpaces * 16;

  // For all threads of a block; without spaces there is nothing to copy or to wait for.
  __device__ __forceinline__ PageMap(void* pool, int32_t pages, int64_t page_bytes,
                                     const Spaces& spaces, unsigned char* shared)
      : rows_(reinterpret_cast<const Row*>(shared)),
        pool_(static_cast<char*>(pool)),
        count_(spaces.count),
        pages_(pages),
        page_bytes_(page_bytes) {
    if (count_ == 0) return;
    for (int i = threadIdx.x; i < count_; i += blockDim.x) {
      const Space& space = spaces.rows[i];
      reinterpret_cast<Row*>(shared)[i] = {
          space.first, space.pages, from_pool(pool, space) - space.first * page_bytes};
    }
    __syncthreads();
    pages_ = rows_[count_ - 1].first + rows_[count_ - 1].pages;
  }

  // Whether there is such a page.
  __device__ __forceinline__ bool has(int32_t page) const { return page >= 0 && page < pages_; }

  // Its first byte, if there is.
  __device__ __forceinline__ char* at(int32_t page) const {
    int64_t origin = 0;
#pragma unroll 1
    for (int32_t i = 0; i < count_; ++i) {
      const Row row = rows_[i];
      origin = page >= row.first ? row.origin : origin;
    }
    return pool_ + (origin + page * page_bytes_);
  }

 private:
  struct alignas(16) Row {
    int32_t first, pages;
    int64_t origin;  // where page 0 would lie
  };
  static_assert(sizeof(Row) == 16, "kMostBytes counts them");
  const Row* rows_;
  char* pool_;
  int32_t count_, pages_;
  int64_t page_bytes_;
};

}  // namespace cuda
}  // namespace aqua
