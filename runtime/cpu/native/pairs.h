// Products of pairs: a lane holds two bf16, of two inputs that follow each other.
//
// Act: what an activation is kept as, to be spread over all lanes. Sum: a chain of products that is being
// summed, Pairs by Pairs.
#pragma once

#include "amx.h"
#include "vectors.h"

namespace enginehouse {

#if defined(EH_AMX)
constexpr bool kTall = true;  // whether there are products of 16 rows at once: see amx.h
#else
constexpr bool kTall = false;
#endif

#if defined(__AVX512BF16__) && !defined(EH_AMX)

using Act = u16;
using Pairs = __m512bh;
using Sum = V;
EH_INLINE Pairs pairs(const U& words) { return (Pairs)words; }
EH_INLINE Pairs same_pair(const Act* p) { return (Pairs)_mm512_set1_epi32(load<int>(p)); }
EH_INLINE Pairs paired(const V& first, const V& second) { return pairs((U)first >> 16 | (U)second); }  // of what bf16 holds
EH_INLINE Sum dot(const Sum& sum, const Pairs& a, const Pairs& b) {
  return (V)_mm512_dpbf16_ps((__m512)sum, a, b);
}

#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

using Act = u16;
using Sum = V;
using Pairs = U;
EH_INLINE Pairs pairs(const U& words) { return words; }
EH_INLINE Pairs paired(const V& first, const V& second) { return (U)first >> 16 | (U)second; }
EH_INLINE Pairs same_pair(const Act* at) { return U(load<u32>(at)); }
EH_INLINE Sum dot(const Sum& sum, const Pairs& a, const Pairs& b) {
  return of_parts<V>([&](int i) {
    return vbfdotq_f32((float32x4_t)sum.part[i], (bfloat16x8_t)a.part[i], (bfloat16x8_t)b.part[i]);
  });
}

#else

using Act = float;
struct Pairs {
  V first, second;
};
EH_INLINE Pairs pairs(const U& words) { return {(V)(words << 16), (V)(words & 0xffff0000u)}; }
EH_INLINE Pairs same_pair(const Act* p) { return {all(p[0]), all(p[1])}; }
EH_INLINE Pairs paired(const V& first, const V& second) { return {first, second}; }
#if defined(EH_AMX)
struct Sum {  // as a tile sums: the first of all pairs and the second apart
  V first, second;
};
EH_INLINE Sum dot(const Sum& sum, const Pairs& a, const Pairs& b) {
  return {fma(a.first, b.first, sum.first), fma(a.second, b.second, sum.second)};
}
EH_INLINE V total(const Sum& sum) { return sum.first + sum.second; }
EH_INLINE U words(const Pairs& x) { return (U)x.first >> 16 | (U)x.second; }  // of what bf16 holds
#else
using Sum = V;
EH_INLINE Sum dot(const Sum& sum, const Pairs& a, const Pairs& b) {
  return fma(a.first, b.first, fma(a.second, b.second, sum));
}
#endif

#endif

#if !defined(EH_AMX)
EH_INLINE V total(const Sum& sum) { return sum; }
#endif
EH_INLINE void put_acts(u16* to, const H& x) { store(to, x); }
EH_INLINE void put_acts(float* to, const H& x) { store(to, widened(x)); }

// ---- four bits: of 16 outputs the n-th nibble of each 16 bits, less 8 ----

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

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
    return of_parts<Pairs>([&](int i) {
      const uint16x8_t nibble = ((uint16x8_t)words.part[i] >> u16(4 * n)) & u16(15);
      return vqtbl2q_u8(table, vreinterpretq_u8_u16(nibble * u16(0x101) + u16(0x1000)));
    });
  }
};

#elif defined(__AVX512BW__)

struct Nibbles {
  __m512i table;
  Nibbles() {
    u16 values[32];
    for (int i = 0; i < 32; ++i) values[i] = to_bf16(float((i & 15) - 8));
    table = _mm512_loadu_si512(values);
  }
  // The table repeats itself, and the permute looks at five bits: nothing needs masking.
  EH_INLINE Pairs operator()(const U& words, int n) const {
    return pairs((U)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, unsigned(4 * n)), table));
  }
};

#else

struct Nibbles {
  EH_INLINE Pairs operator()(const U& words, int n) const {
    const I low = (I)((words >> (4 * n)) & 15u) - 8, high = (I)((words >> (4 * n + 16)) & 15u) - 8;
    return {floats(low), floats(high)};
  }
};

#endif

// ---- bytes as bf16, which holds them exactly: 32 that follow each other, or every other of 64 ----

#if defined(__AVX512BF16__)

EH_INLINE Pairs pairs_of_int8(const void* p) {
  const __m512i x = _mm512_cvtepi8_epi32(load<__m128i>(p)), y = _mm512_cvtepi8_epi32(load<__m128i>((const char*)p + 16));
  return pairs((U)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(y), _mm512_cvtepi32_ps(x)));
}
// e4m3 in 16 bits, its sign in all upper ones. The exponent is moved to bf16's; what has no leading one
// is looked up.
EH_INLINE Pairs from_e4m3(const __m512i& x) {
  alignas(64) static constexpr u16 kFine[32] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
  const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(0x7f0));
  const __m512i whole = _mm512_add_epi16(moved, _mm512_set1_epi16(120 << 7));
  const __mmask32 is_fine = _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78));
  const __m512i value = _mm512_mask_permutexvar_epi16(whole, is_fine, x, _mm512_load_si512(kFine));
  return pairs((U)_mm512_or_si512(value, _mm512_and_si512(x, _mm512_set1_epi16(-0x8000))));
}
EH_INLINE Pairs pairs_of_e4m3(const void* p) { return from_e4m3(_mm512_cvtepi8_epi16(load<__m256i>(p))); }
EH_INLINE Pairs pairs_of_e4m3(const U& words, bool odd) {  // the even or the odd bytes
  const __m512i upper = odd ? (__m512i)words : _mm512_slli_epi16((__m512i)words, 8);
  return from_e4m3(_mm512_srai_epi16(upper, 8));
}

#else

EH_INLINE Pairs pairs_of_int8(const void* p) {
  const I two = converted<I>(load<S>(p));
  return paired(floats((two << 24) >> 24), floats(two >> 8));
}
EH_INLINE V from_e4m3(const I& byte) {  // of its low 8 bits
  const I magnitude = byte & 127;
  const V value = select(magnitude < 8, floats(magnitude) * 0x1p-9f, (V)((magnitude << 20) + (120 << 23)));
  return (V)((I)value | (byte & 128) << 24);
}
EH_INLINE Pairs pairs_of_e4m3(const void* p) {
  const I two = converted<I>(load<S>(p));
  return paired(from_e4m3(two), from_e4m3(two >> 8));
}
EH_INLINE Pairs pairs_of_e4m3(const U& words, bool odd) {  // the even or the odd bytes
  const I from = (I)(odd ? words >> 8 : words);
  return paired(from_e4m3(from), from_e4m3(from >> 16));
}

#endif

}  // namespace enginehouse
