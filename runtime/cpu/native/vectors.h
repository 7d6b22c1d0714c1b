// Sixteen floats at a time: all that depends on the instruction set stands in this file and in pairs.h.
//
// V is a vector of the compiler's own (GCC, Clang), which it splits where registers are narrower;
// only products and the fused multiply-add are written for each set. The compiler may fuse nothing by
// itself (-ffp-contract=off), so that every tile rounds as every other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "lanes.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace enginehouse {

using u16 = uint16_t;
using u32 = uint32_t;

#if defined(__AVX512F__)

using V = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));
using U = uint32_t __attribute__((vector_size(64)));
using H = uint16_t __attribute__((vector_size(32)));  // sixteen bf16
using S = int16_t __attribute__((vector_size(32)));
using B = int8_t __attribute__((vector_size(16)));

template <class To, class From>
EH_INLINE To converted(const From& x) { return __builtin_convertvector(x, To); }
template <>
EH_INLINE U converted<U>(const H& x) { return (U)_mm512_cvtepu16_epi32((__m256i)x); }  // in one instruction, with GCC 12 too
EH_INLINE V all(float x) { return (V)_mm512_set1_ps(x); }

#else

using V = Lanes<float>;
using I = Lanes<int32_t>;
using U = Lanes<u32>;
using H = Lanes<u16>;
using S = Lanes<int16_t>;
using B = Lanes<int8_t>;

EH_INLINE V all(float x) { return V(x); }

#endif

template <class T>
EH_INLINE T load(const void* from) {
  if constexpr (requires { T::kParts; }) {
    using Part = typename T::Part;
    return of_parts<T>([&](int i) __attribute__((always_inline)) { return load<Part>(static_cast<const char*>(from) + i * sizeof(Part)); });
  } else {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
  }
}
template <class T>
EH_INLINE void store(void* to, const T& x) {
  if constexpr (requires { T::kParts; })
    for (int i = 0; i < T::kParts; ++i) memcpy(static_cast<char*>(to) + i * sizeof(x.part[0]), &x.part[i], sizeof(x.part[0]));
  else
    memcpy(to, &x, sizeof x);
}
// Past the caches, where the system can; of whole vectors. done_writing: before another thread reads them.
EH_INLINE void store_far(float* to, const V& x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)x);
#else
  store(to, x);
#endif
}
EH_INLINE void done_writing() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
EH_INLINE V select(const I& mask, const V& yes, const V& no) {
#if defined(__AVX512F__)
  return mask ? yes : no;
#else
  return (V)(((I)yes & mask) | ((I)no & ~mask));
#endif
}
EH_INLINE I lanes() {
  static constexpr int32_t kAll[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<I>(kAll);
}

EH_INLINE V fma(const V& a, const V& b, const V& c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return of_parts<V>([&](int i) { return _mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]); });
#elif defined(__aarch64__)
  return of_parts<V>([&](int i) { return vfmaq_f32((float32x4_t)c.part[i], (float32x4_t)a.part[i], (float32x4_t)b.part[i]); });
#else
  return a * b + c;
#endif
}

// f over all lanes: halves, quarters, ... in one order for every set.
template <class F>
EH_INLINE float folded(const V& x, F&& f) {
  using V4 = float __attribute__((vector_size(16)));
#if defined(__AVX512F__) || defined(__AVX2__)
  using V8 = float __attribute__((vector_size(32)));
#if defined(__AVX512F__)
  const V8 half = f(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const V8 half = f(x.part[0], x.part[1]);
#endif
  const V4 four = f(__builtin_shufflevector(half, half, 0, 1, 2, 3), __builtin_shufflevector(half, half, 4, 5, 6, 7));
#else
  const V4 four = f(f(x.part[0], x.part[2]), f(x.part[1], x.part[3]));
#endif
  const V4 two = f(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return f(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}
#if defined(__AVX512F__)  // of NaN and of equal ones b, as below
EH_INLINE V larger(const V& a, const V& b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
EH_INLINE V smaller(const V& a, const V& b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
#else
EH_INLINE V larger(const V& a, const V& b) { return select(a > b, a, b); }
EH_INLINE V smaller(const V& a, const V& b) { return select(a < b, a, b); }
#endif

// Of vectors and of parts of one.
struct Add {
  template <class T>
  EH_INLINE T operator()(const T& a, const T& b) const { return a + b; }
};
struct Larger {
  EH_INLINE V operator()(const V& a, const V& b) const { return larger(a, b); }
  template <class T>
  EH_INLINE T operator()(const T& a, const T& b) const { return a > b ? a : b; }
};
struct Smaller {
  EH_INLINE V operator()(const V& a, const V& b) const { return smaller(a, b); }
  template <class T>
  EH_INLINE T operator()(const T& a, const T& b) const { return a < b ? a : b; }
};

EH_INLINE float sum(const V& x) { return folded(x, Add()); }
EH_INLINE float largest(const V& x) { return folded(x, Larger()); }

// Lane i: f over all lanes of x[i], for an f that gives the same in any order.
template <class F>
EH_INLINE V across(const V (&x)[kLanes], F&& f) {
#if defined(__AVX512F__)
  const auto* from = reinterpret_cast<const __m512*>(x);
  auto both = [&](const __m512& a, const __m512& b) __attribute__((always_inline)) { return (__m512)f((V)a, (V)b); };
  __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    two[i] = both(_mm512_unpacklo_ps(from[2 * i], from[2 * i + 1]), _mm512_unpackhi_ps(from[2 * i], from[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    four[i] = both(_mm512_shuffle_ps(two[2 * i], two[2 * i + 1], 0x44), _mm512_shuffle_ps(two[2 * i], two[2 * i + 1], 0xee));
  auto halves = [&](const __m512& a, const __m512& b) __attribute__((always_inline)) {
    return both(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  eight[0] = halves(four[0], four[1]), eight[1] = halves(four[2], four[3]);
  return (V)halves(eight[0], eight[1]);
#else
  float found[kLanes];
  for (int i = 0; i < kLanes; ++i) found[i] = folded(x[i], f);
  return load<V>(found);
#endif
}

EH_INLINE I nearest(const V& x) { return (I)((U)(x + 12582912.f) - 0x4b400000u); }  // of less than 2^22; halves to the even one

EH_INLINE V floats(const I& x) { return converted<V>(x); }
EH_INLINE V floats(const S& x) {
#if defined(__AVX512F__)
  return floats((I)_mm512_cvtepi16_epi32((__m256i)x));
#else
  return floats(converted<I>(x));
#endif
}
EH_INLINE B low_bytes(const I& x) {
#if defined(__AVX512F__)
  return (B)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return converted<B>(x);
#endif
}

// ---- bf16: the upper half of a float ----

EH_INLINE V widened(const H& x) { return (V)(converted<U>(x) << 16); }
EH_INLINE H to_bf16(const V& x) {  // to the nearest, halves to the even one; NaN stays NaN
#if defined(__AVX512BF16__)
  return (H)_mm512_cvtneps_pbh((__m512)x);
#endif
  const U bits = (U)x;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return converted<H>((U)select(x != x, (V)(U{} + 0x7fc0u), (V)rounded));
}
EH_INLINE float widened(u16 x) {
  const u32 bits = u32(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
EH_INLINE u16 to_bf16(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- products of bytes: a lane holds four unsigned ones, times four signed ones that all lanes share ----

EH_INLINE u32 four_at(const int8_t* p) {
  u32 x;
  memcpy(&x, p, 4);
  return x;
}

EH_INLINE I dot2(const U& w, u32 x) {  // a lane's two numbers of 16 bits, signed, times two that all share
#if defined(__AVX512BW__)
  return (I)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(int(x)));
#elif defined(__AVX2__)
  const __m256i two = _mm256_set1_epi32(int(x));
  return of_parts<I>([&](int i) { return _mm256_madd_epi16((__m256i)w.part[i], two); });
#else
  return ((I)(w << 16) >> 16) * int16_t(x) + ((I)w >> 16) * int16_t(x >> 16);
#endif
}

#if defined(__AVX512VNNI__)

EH_INLINE I dot4(const I& sum, const U& bytes, u32 x) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, _mm512_set1_epi32(int(x)));
}

#elif defined(__ARM_FEATURE_DOTPROD)

EH_INLINE I dot4(const I& sum, const U& bytes, u32 x) {
  const int8x16_t four = vreinterpretq_s8_u32(vdupq_n_u32(x));
  return of_parts<I>([&](int i) {
    const int32x4_t from = (int32x4_t)sum.part[i];
    const uint8x16_t w = (uint8x16_t)bytes.part[i];
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(from, w, four);
#else  // both signed: the bytes less 128, and 128 times the four, as twice 64
    const int8x16_t half = vdupq_n_s8(64), less = vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(128)));
    const int32x4_t of_128 = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, four), half, four);
    return vaddq_s32(vdotq_s32(from, less, four), of_128);
#endif
  });
}

#else

#if defined(__AVXVNNI__)

EH_INLINE I dot4(const I& sum, const U& bytes, u32 x) {
  const __m256i four = _mm256_set1_epi32(int(x));
  return of_parts<I>([&](int i) { return _mm256_dpbusd_avx_epi32((__m256i)sum.part[i], (__m256i)bytes.part[i], four); });
}

#else

// Keeps whole numbers added one after another: GCC would add products in pairs first, for which there are no registers.
EH_INLINE I in_order(I sum) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (auto& part : sum.part) asm("" : "+x"(part));
#endif
  return sum;
}

EH_INLINE u32 widened_pair(u32 x) {  // its bytes 0 and 2, signed, in 16 bits each
  return u32(u16(int8_t(x))) | u32(u16(int8_t(x >> 16))) << 16;
}
// In 16 bits, as a byte times a byte twice would not fit them.
EH_INLINE I dot4(const I& sum, const U& bytes, u32 x) {
  const I low = in_order(sum + dot2(bytes & 0x00ff00ffu, widened_pair(x)));
  return in_order(low + dot2((bytes >> 8) & 0x00ff00ffu, widened_pair(x >> 8)));
}

#endif
#endif

// The same, of unsigned ones below 16. Without an instruction for it their products are added in 16 bits, of which a lane
// of 32 has two sums: of eight dots at most, as each is two products of 15 times 128.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr int kNarrowDots = 8;

EH_INLINE I dot4_of_nibbles(const I& narrow, const U& nibbles, u32 x) {
#if defined(__AVX512BW__)
  return (I)_mm512_add_epi16((__m512i)narrow, _mm512_maddubs_epi16((__m512i)nibbles, _mm512_set1_epi32(int(x))));
#else
  const __m256i four = _mm256_set1_epi32(int(x));
  return in_order(of_parts<I>([&](int i) {
    return _mm256_add_epi16((__m256i)narrow.part[i], _mm256_maddubs_epi16((__m256i)nibbles.part[i], four));
  }));
#endif
}
EH_INLINE I widened_sums(const I& narrow) { return dot2((U)narrow, 0x00010001u); }

#else
constexpr int kNarrowDots = 0;  // none: sums have 32 bits all along

EH_INLINE I dot4_of_nibbles(const I& sum, const U& nibbles, u32 x) { return dot4(sum, nibbles, x); }
EH_INLINE I widened_sums(const I& sum) { return sum; }

#endif

// ---- functions ----

EH_INLINE V exp(const V& x) {  // relative error below 1e-6; NaN stays NaN
  const V bound = smaller(all(88.f), larger(all(-87.f), x));
  const V t = bound * 1.44269504f;
  const V n = (t + 12582912.f) - 12582912.f;  // to the nearest whole number
  const V f = t - n;
  V p = all(1.33336e-3f);
  for (float c : {9.618129e-3f, 5.550411e-2f, 2.402265e-1f, 6.931472e-1f, 1.f}) p = fma(p, f, all(c));
  const V shifted = n + 12583039.f;  // n + 127 in the low bits of the mantissa
  return p * (V)((U)shifted << 23);
}
EH_INLINE V tanh(const V& x) { return 1.f - 2.f / (exp(x * 2.f) + 1.f); }
EH_INLINE V silu(const V& x) { return x / (1.f + exp(-x)); }
EH_INLINE V gelu(const V& x) {  // the tanh form
  return 0.5f * x * (1.f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}
EH_INLINE V gelu_erf(const V& x) {  // x / 2 * erfc(-x / sqrt 2); Abramowitz and Stegun, 7.1.26: within 1e-7 * |x|
  const V z = select(x < 0.f, -x, x) * 0.7071067812f, t = 1.f / (1.f + 0.3275911f * z);
  V p = all(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = fma(p, t, all(c));
  const V tail = p * t * exp(-(z * z));
  return 0.5f * x * select(x < 0.f, tail, 2.f - tail);
}
EH_INLINE V soft_cap(const V& x, float cap) { return cap > 0 ? tanh(x / cap) * cap : x; }

}  // namespace enginehouse
