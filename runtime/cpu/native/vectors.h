// Sixteen floats at a time: all that depends on the instruction set stands in this file.
//
// V is a vector of the compiler's own (GCC, Clang), which it splits where registers are narrower;
// only the products of bf16 pairs and the fused multiply-add are written for each set. The compiler
// may fuse nothing by itself (-ffp-contract=off), so that every tile rounds as every other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace enginehouse {

using u16 = uint16_t;
using u32 = uint32_t;

constexpr int kLanes = 16;

using V = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));
using U = uint32_t __attribute__((vector_size(64)));
using H = uint16_t __attribute__((vector_size(32)));  // sixteen bf16
using S = int16_t __attribute__((vector_size(32)));
using B = int8_t __attribute__((vector_size(16)));

#define EH_INLINE inline __attribute__((always_inline))

template <class T>
EH_INLINE T load(const void* from) {
  T x;
  memcpy(&x, from, sizeof x);
  return x;
}
template <class T>
EH_INLINE void store(void* to, const T& x) {
  memcpy(to, &x, sizeof x);
}
EH_INLINE V all(float x) { return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
EH_INLINE V select(const I& mask, const V& yes, const V& no) {
  return (V)(((I)yes & mask) | ((I)no & ~mask));
}
EH_INLINE I lanes() { return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

EH_INLINE V fma(const V& a, const V& b, const V& c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  V out;
  for (int i = 0; i < kLanes; i += 8) {
    const __m256 x = _mm256_loadu_ps((const float*)&a + i), y = _mm256_loadu_ps((const float*)&b + i);
    _mm256_storeu_ps((float*)&out + i, _mm256_fmadd_ps(x, y, _mm256_loadu_ps((const float*)&c + i)));
  }
  return out;
#elif defined(__aarch64__)
  V out;
  for (int i = 0; i < kLanes; i += 4) {
    const float32x4_t x = vld1q_f32((const float*)&a + i), y = vld1q_f32((const float*)&b + i);
    vst1q_f32((float*)&out + i, vfmaq_f32(vld1q_f32((const float*)&c + i), x, y));
  }
  return out;
#else
  return a * b + c;
#endif
}

// f over all lanes: halves, quarters, ... in one order for every set.
template <class F>
EH_INLINE auto folded(const V& x, F&& f) {
  using V8 = float __attribute__((vector_size(32)));
  using V4 = float __attribute__((vector_size(16)));
  const V8 half = f(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
  const V4 four = f(__builtin_shufflevector(half, half, 0, 1, 2, 3), __builtin_shufflevector(half, half, 4, 5, 6, 7));
  const V4 two = f(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return f(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}
EH_INLINE float sum(const V& x) {
  return folded(x, [](const auto& a, const auto& b) { return a + b; });
}
EH_INLINE float largest(const V& x) {
  return folded(x, [](const auto& a, const auto& b) { return a > b ? a : b; });
}
EH_INLINE float smallest(const V& x) { return -largest(-x); }
EH_INLINE V larger(const V& a, const V& b) { return select(a > b, a, b); }
EH_INLINE V smaller(const V& a, const V& b) { return select(a < b, a, b); }

EH_INLINE I nearest(const V& x) { return (I)((U)(x + 12582912.f) - 0x4b400000u); }  // of less than 2^22; halves to the even one

EH_INLINE V floats(const I& x) { return __builtin_convertvector(x, V); }
EH_INLINE V floats(const S& x) {
#if defined(__AVX512F__)
  return floats((I)_mm512_cvtepi16_epi32((__m256i)x));
#else
  return floats(__builtin_convertvector(x, I));
#endif
}
EH_INLINE B low_bytes(const I& x) {
#if defined(__AVX512F__)
  return (B)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector(x, B);
#endif
}

// ---- bf16: the upper half of a float ----

EH_INLINE V widened(const H& x) { return (V)(__builtin_convertvector(x, U) << 16); }
EH_INLINE H to_bf16(const V& x) {  // to the nearest, halves to the even one; NaN stays NaN
  const U bits = (U)x;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((U)select(x != x, (V)(U{} + 0x7fc0u), (V)rounded), H);
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

// ---- products of pairs: a lane holds two bf16, of two inputs that follow each other ----

EH_INLINE u32 pair_at(const u16* p) {
  u32 x;
  memcpy(&x, p, 4);
  return x;
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

using Pairs = __m512bh;
EH_INLINE Pairs pairs(const U& words) { return (Pairs)words; }
EH_INLINE Pairs same_pair(u32 x) { return (Pairs)_mm512_set1_epi32(int(x)); }
EH_INLINE Pairs paired(const V& first, const V& second) { return pairs((U)first >> 16 | (U)second); }  // of what bf16 holds
EH_INLINE V dot(const V& sum, const Pairs& a, const Pairs& b) {
  return (V)_mm512_dpbf16_ps((__m512)sum, a, b);
}
struct Nibbles {  // of 16 outputs: the n-th nibble of each 16 bits, less 8
  __m512i table;
  Nibbles() {
    u16 values[32];
    for (int i = 0; i < 32; ++i) values[i] = to_bf16(float((i & 15) - 8));
    table = _mm512_loadu_si512(values);
  }
  // The table repeats itself, and the permute looks at five bits: nothing needs masking.
  EH_INLINE Pairs operator()(const U& words, int n) const {
    return (Pairs)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, unsigned(4 * n)), table);
  }
};

#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

struct Pairs {
  bfloat16x8_t part[4];  // of four lanes each
};
EH_INLINE Pairs pairs(const U& words) { return load<Pairs>(&words); }
EH_INLINE Pairs paired(const V& first, const V& second) { return pairs((U)first >> 16 | (U)second); }
EH_INLINE Pairs same_pair(u32 x) {
  const bfloat16x8_t p = vreinterpretq_bf16_u32(vdupq_n_u32(x));
  return {{p, p, p, p}};
}
EH_INLINE V dot(const V& sum, const Pairs& a, const Pairs& b) {
  V out;
  for (int i = 0; i < 4; ++i) {
    const float32x4_t from = vld1q_f32((const float*)&sum + 4 * i);
    vst1q_f32((float*)&out + 4 * i, vbfdotq_f32(from, a.part[i], b.part[i]));
  }
  return out;
}
struct Nibbles {
  uint8x16x2_t table;  // the low bytes of -8 to 7 in bf16, and the high ones
  Nibbles() {
    uint8_t values[32];
    for (int i = 0; i < 16; ++i) {
      const u16 value = to_bf16(float(i - 8));
      values[i] = uint8_t(value), values[i + 16] = uint8_t(value >> 8);
    }
    table = {{vld1q_u8(values), vld1q_u8(values + 16)}};
  }
  EH_INLINE Pairs operator()(const U& words, int n) const {
    Pairs out;
    for (int i = 0; i < 4; ++i) {
      const uint16x8_t nibble = (vld1q_u16((const u16*)&words + 8 * i) >> u16(4 * n)) & u16(15);
      const uint8x16_t at = vreinterpretq_u8_u16(nibble * u16(0x101) + u16(0x1000));
      out.part[i] = vreinterpretq_bf16_u8(vqtbl2q_u8(table, at));
    }
    return out;
  }
};

#else

struct Pairs {
  V first, second;
};
EH_INLINE Pairs pairs(const U& words) { return {(V)(words << 16), (V)(words & 0xffff0000u)}; }
EH_INLINE Pairs same_pair(u32 x) { return {all(widened(u16(x))), all(widened(u16(x >> 16)))}; }
EH_INLINE V dot(const V& sum, const Pairs& a, const Pairs& b) {
  return fma(a.first, b.first, fma(a.second, b.second, sum));
}
struct Nibbles {
  EH_INLINE Pairs operator()(const U& words, int n) const {
    const I low = (I)((words >> (4 * n)) & 15u) - 8, high = (I)((words >> (4 * n + 16)) & 15u) - 8;
    return {__builtin_convertvector(low, V), __builtin_convertvector(high, V)};
  }
};
EH_INLINE Pairs paired(const V& first, const V& second) { return {first, second}; }

#endif

// ---- bytes as bf16, which holds them exactly: 32 that follow each other, or every other of 64 ----

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

EH_INLINE Pairs pairs_of_int8(const void* p) {
  const __m512i x = _mm512_cvtepi8_epi32(load<__m128i>(p)), y = _mm512_cvtepi8_epi32(load<__m128i>((const char*)p + 16));
  return (Pairs)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(y), _mm512_cvtepi32_ps(x));
}
// e4m3 in 16 bits, its sign in all upper ones. The exponent is moved to bf16's; what has no leading one
// is looked up.
EH_INLINE Pairs from_e4m3(const __m512i& x) {
  alignas(64) static constexpr u16 kFine[32] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
  const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(0x7f0));
  const __m512i whole = _mm512_add_epi16(moved, _mm512_set1_epi16(120 << 7));
  const __mmask32 is_fine = _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78));
  const __m512i value = _mm512_mask_permutexvar_epi16(whole, is_fine, x, _mm512_load_si512(kFine));
  return (Pairs)_mm512_or_si512(value, _mm512_and_si512(x, _mm512_set1_epi16(-0x8000)));
}
EH_INLINE Pairs pairs_of_e4m3(const void* p) { return from_e4m3(_mm512_cvtepi8_epi16(load<__m256i>(p))); }
EH_INLINE Pairs pairs_of_e4m3(const U& words, bool odd) {  // the even or the odd bytes
  const __m512i upper = odd ? (__m512i)words : _mm512_slli_epi16((__m512i)words, 8);
  return from_e4m3(_mm512_srai_epi16(upper, 8));
}

#else

EH_INLINE Pairs pairs_of_int8(const void* p) {
  const I two = __builtin_convertvector(load<S>(p), I);
  return paired(floats((two << 24) >> 24), floats(two >> 8));
}
EH_INLINE V from_e4m3(const I& byte) {  // of its low 8 bits
  const I magnitude = byte & 127;
  const V value = select(magnitude < 8, floats(magnitude) * 0x1p-9f, (V)((magnitude << 20) + (120 << 23)));
  return (V)((I)value | (byte & 128) << 24);
}
EH_INLINE Pairs pairs_of_e4m3(const void* p) {
  const I two = __builtin_convertvector(load<S>(p), I);
  return paired(from_e4m3(two), from_e4m3(two >> 8));
}
EH_INLINE Pairs pairs_of_e4m3(const U& words, bool odd) {  // the even or the odd bytes
  const I from = (I)(odd ? words >> 8 : words);
  return paired(from_e4m3(from), from_e4m3(from >> 16));
}

#endif

// ---- products of bytes: a lane holds four unsigned ones, times four signed ones that all lanes share ----

EH_INLINE u32 four_at(const int8_t* p) {
  u32 x;
  memcpy(&x, p, 4);
  return x;
}

#if defined(__AVX512VNNI__)

EH_INLINE I dot4(const I& sum, const U& bytes, u32 x) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, _mm512_set1_epi32(int(x)));
}

#elif defined(__ARM_FEATURE_DOTPROD)

EH_INLINE I dot4(const I& sum, const U& bytes, u32 x) {
  const int8x16_t four = vreinterpretq_s8_u32(vdupq_n_u32(x));
  I out;
  for (int i = 0; i < kLanes; i += 4) {
    const int32x4_t from = vld1q_s32((const int32_t*)&sum + i);
    const uint8x16_t w = vreinterpretq_u8_u32(vld1q_u32((const u32*)&bytes + i));
#if defined(__ARM_FEATURE_MATMUL_INT8)
    vst1q_s32((int32_t*)&out + i, vusdotq_s32(from, w, four));
#else  // both signed: the bytes less 128, and 128 times the four, as twice 64
    const int8x16_t half = vdupq_n_s8(64), less = vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(128)));
    const int32x4_t of_128 = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, four), half, four);
    vst1q_s32((int32_t*)&out + i, vaddq_s32(vdotq_s32(from, less, four), of_128));
#endif
  }
  return out;
}

#else

#if defined(__AVXVNNI__)

EH_INLINE I dot4(const I& sum, const U& bytes, u32 x) {
  I out;
  for (int i = 0; i < kLanes; i += 8) {
    const __m256i s = _mm256_loadu_si256((const __m256i*)((const int32_t*)&sum + i));
    const __m256i w = _mm256_loadu_si256((const __m256i*)((const u32*)&bytes + i));
    _mm256_storeu_si256((__m256i*)((int32_t*)&out + i), _mm256_dpbusd_avx_epi32(s, w, _mm256_set1_epi32(int(x))));
  }
  return out;
}

#else

EH_INLINE I dot2(const U& w, u32 x) {  // of 16 bits, signed, which are too few for a byte times a byte twice
#if defined(__AVX512BW__)
  return (I)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(int(x)));
#elif defined(__AVX2__)
  I out;
  for (int i = 0; i < kLanes; i += 8) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)((const u32*)&w + i));
    _mm256_storeu_si256((__m256i*)((int32_t*)&out + i), _mm256_madd_epi16(a, _mm256_set1_epi32(int(x))));
  }
  return out;
#else
  return (I)(w & 0xffffu) * int16_t(x) + (I)(w >> 16) * int16_t(x >> 16);
#endif
}
EH_INLINE u32 widened_pair(u32 x) {  // its bytes 0 and 2, signed, in 16 bits each
  return u32(u16(int8_t(x))) | u32(u16(int8_t(x >> 16))) << 16;
}
EH_INLINE I dot4(const I& sum, const U& bytes, u32 x) {
  return sum + dot2(bytes & 0x00ff00ffu, widened_pair(x)) + dot2((bytes >> 8) & 0x00ff00ffu, widened_pair(x >> 8));
}

#endif
#endif

// ---- functions ----

EH_INLINE V exp(const V& x) {  // relative error below 1e-6; NaN stays NaN
  const V low = select(x < -87.f, all(-87.f), x), bound = select(low > 88.f, all(88.f), low);
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
EH_INLINE V soft_cap(const V& x, float cap) { return cap > 0 ? tanh(x / cap) * cap : x; }

}  // namespace enginehouse
