// Vectors of floats at the width of the translation unit's instruction set, for kernels that are
// compiled once per set (CMakeLists.txt gives each its flags).
//
// Everything is `static inline` in an anonymous namespace and uses no standard library templates:
// a shared inline function compiled with AVX-512 flags could otherwise be the copy the linker
// keeps for everybody, and fault on an older processor.
//
// bf16 rows are handled in blocks of 2 * kLanes elements, split into the even and the odd ones:
// the 32-bit word w holds two of them, and (w << 16) and (w & 0xffff0000) are their f32 values.
// That costs one operation per vector where a widening load costs two and the shuffle port.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef uint16_t bf16_t;

static inline float to_float(bf16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline float to_float(float x) { return x; }

// Rounds to nearest even, as XLA does; NaN stays NaN.
static inline bf16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16_t>((bits >> 16) | 0x40u);
  return static_cast<bf16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
typedef __m512 vf;
static inline vf vzero() { return _mm512_setzero_ps(); }
static inline vf vset(float x) { return _mm512_set1_ps(x); }
static inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
static inline void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vfms(vf a, vf b, vf c) { return _mm512_fmsub_ps(a, b, c); }
static inline bool vany_above(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
// x where low <= at <= high, otherwise `other`
static inline vf vselect_between(vf low, vf at, vf high, vf x, vf other) {
  const __mmask16 above = _mm512_cmp_ps_mask(low, at, _CMP_LE_OQ);
  return _mm512_mask_blend_ps(_mm512_mask_cmp_ps_mask(above, at, high, _CMP_LE_OQ), other, x);
}
static inline void vload_pairs(const bf16_t* p, vf* even, vf* odd) {
  const __m512i w = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000)));
}
static inline float vmax_across(vf a) { return _mm512_reduce_max_ps(a); }
static inline float vsum_across(vf a) { return _mm512_reduce_add_ps(a); }
// Sums of four vectors, in one fixed order of additions.
static inline void vsum4(vf a, vf b, vf c, vf d, float* out) {
  const vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const vf cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const vf s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 h = _mm256_add_ps(
      _mm512_castps512_ps256(s),
      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
typedef __m256 vf;
static inline vf vzero() { return _mm256_setzero_ps(); }
static inline vf vset(float x) { return _mm256_set1_ps(x); }
static inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
static inline void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vfms(vf a, vf b, vf c) { return _mm256_fmsub_ps(a, b, c); }
static inline bool vany_above(vf a, vf b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
static inline vf vselect_between(vf low, vf at, vf high, vf x, vf other) {
  const vf in = _mm256_and_ps(_mm256_cmp_ps(low, at, _CMP_LE_OQ),
                              _mm256_cmp_ps(at, high, _CMP_LE_OQ));
  return _mm256_blendv_ps(other, x, in);
}
static inline vf vround(vf a) { return _mm256_round_ps(a, 8); }
// a * 2^n for whole n in [-126, 0]; 0 for n = -127
static inline vf vscale2(vf a, vf n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), bias), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(e));
}
static inline void vload_pairs(const bf16_t* p, vf* even, vf* odd) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(0xffff0000)));
}
static inline float vmax_across(vf a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
static inline float vsum_across(vf a) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_shuffle_ps(m, m, 1)));
}
static inline void vsum4(vf a, vf b, vf c, vf d, float* out) {
  const vf ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const vf cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const vf s = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

#else  // any processor: the compiler maps four lanes onto SSE2, NEON or plain code

constexpr int kLanes = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
static inline vf vset(float x) { return vf{x, x, x, x}; }
static inline vf vzero() { return vset(0.0f); }
static inline vf vload(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
static inline void vstore(float* p, vf x) { memcpy(p, &x, sizeof x); }
static inline vf vadd(vf a, vf b) { return a + b; }
static inline vf vsub(vf a, vf b) { return a - b; }
static inline vf vmul(vf a, vf b) { return a * b; }
static inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline vf vfms(vf a, vf b, vf c) { return a * b - c; }
static inline bool vany_above(vf a, vf b) {
  const vi above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
}
static inline vf vselect_between(vf low, vf at, vf high, vf x, vf other) {
  return (low <= at) & (at <= high) ? x : other;
}
static inline vf vround(vf a) {  // |a| < 2^22: adding 1.5 * 2^23 rounds to nearest even
  const vf magic = vset(12582912.0f);
  return (a + magic) - magic;
}
static inline vf vscale2(vf a, vf n) {
  const vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  vf s;
  memcpy(&s, &e, sizeof s);
  return a * s;
}
static inline void vload_pairs(const bf16_t* p, vf* even, vf* odd) {
  float e[kLanes], o[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    e[i] = to_float(p[2 * i]);
    o[i] = to_float(p[2 * i + 1]);
  }
  *even = vload(e);
  *odd = vload(o);
}
static inline float vmax_across(vf a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
static inline float vsum_across(vf a) { return (a[0] + a[1]) + (a[2] + a[3]); }
static inline void vsum4(vf a, vf b, vf c, vf d, float* out) {
  out[0] = vsum_across(a);
  out[1] = vsum_across(b);
  out[2] = vsum_across(c);
  out[3] = vsum_across(d);
}

#endif

constexpr float kMinusInfinity = -__builtin_inff();

#if defined(__AVX512F__)

constexpr int kAccumulators = 16;  // of 32 registers; the rest hold operands

// 2^x for x <= 0, relative error 8e-8; 0 for -inf; NaN stays NaN.
static inline vf vexp2(vf x) {
  const vf f = _mm512_reduce_ps(x, 1);  // x - floor(x); 0 for -inf
  vf p = vset(0.00021865784947294742f);
  p = vfma(p, f, vset(0.0012391331838443875f));
  p = vfma(p, f, vset(0.009684186428785324f));
  p = vfma(p, f, vset(0.055480629205703735f));
  p = vfma(p, f, vset(0.24023045599460602f));
  p = vfma(p, f, vset(0.6931469440460205f));
  p = vfma(p, f, vset(1.0f));
  return _mm512_scalef_ps(p, x);  // times 2^floor(x)
}

// Transposes 16 rows of 16 dwords.
static inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#else

constexpr int kAccumulators = 8;  // of 16 registers; the rest hold operands

// 2^x for x <= 0, relative error 1.1e-7; 0 for -inf; NaN stays NaN.
static inline vf vexp2(vf x) {
  x = vmax(vset(-127.0f), x);
  const vf n = vround(x);
  const vf f = vsub(x, n);
  vf p = vset(0.00015461444854736328f);
  p = vfma(p, f, vset(0.0013400427997112274f));
  p = vfma(p, f, vset(0.009618056938052177f));
  p = vfma(p, f, vset(0.05550327152013779f));
  p = vfma(p, f, vset(0.24022650718688965f));
  p = vfma(p, f, vset(0.6931471824645996f));
  p = vfma(p, f, vset(1.0f));
  return vscale2(p, n);
}

#endif

}  // namespace
