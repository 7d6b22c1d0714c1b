// Numbers of one byte, INT8 and FP8 (e4m3): rounded to, and widened to pairs of bf16, which is exact.
//
// Rounding is torch's: to the nearest, halves to the even one, and to the largest what lies beyond
// it. An e4m3 NaN is never made here, nor looked for when one is read.
#pragma once

#include <cstdint>

#include "pairs.h"

namespace enginehouse {

constexpr float kMostE4m3 = 448;

struct Int8 {
  uint8_t byte;
};
struct E4m3 {
  uint8_t byte;
};

// Sixteen lanes of two numbers that follow each other in memory.
EH_INLINE Pairs pairs_at(const u16* p) { return pairs(load<U>(p)); }
EH_INLINE Pairs pairs_at(const Int8* p) { return pairs_of_int8(p); }
EH_INLINE Pairs pairs_at(const E4m3* p) { return pairs_of_e4m3(p); }

// Sixteen lanes of four numbers that follow each other: the first and the third, or second and fourth.
template <class T>
EH_INLINE Pairs pairs_of(const U& words, bool odd);
template <>
EH_INLINE Pairs pairs_of<Int8>(const U& words, bool odd) {  // 128 more, without a sign
  const U from = odd ? words >> 8 : words;
  const I first = (I)(from & 255u) - 128, second = (I)(from >> 16 & 255u) - 128;
  return paired(floats(first), floats(second));
}
template <>
EH_INLINE Pairs pairs_of<E4m3>(const U& words, bool odd) { return pairs_of_e4m3(words, odd); }

// The nearest e4m3 as a float: three bits behind the leading one, no finer than 2^-9, at most 448.
EH_INLINE V to_e4m3(const V& x) {
  const V above = select(x < -kMostE4m3, all(-kMostE4m3), x), bound = select(above > kMostE4m3, all(kMostE4m3), above);
  const U bits = (U)bound;
  const V whole = (V)((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
  const V fine = (bound + 0x1.8p14f) - 0x1.8p14f;
  const I is_fine = (bound < 0x1p-6f) & (bound > -0x1p-6f);
  return select(is_fine, fine, whole);
}

// Sixteen numbers, rounded, to where they are kept.
EH_INLINE void put(u16* to, const V& x) { store(to, to_bf16(x)); }
EH_INLINE void put(Int8* to, const V& x) {
  const V above = select(x < -128.f, all(-128.f), x), bound = select(above > 127.f, all(127.f), above);
  store(to, low_bytes(nearest(bound)));
}
EH_INLINE void put(E4m3* to, const V& x) {
  const V rounded = to_e4m3(x);
  const I bits = (I)rounded, magnitude = bits & 0x7fffffff;
  const I fine = converted<I>((V)magnitude * 0x1p9f);
  const I code = (I)select(magnitude < 0x3c800000, (V)fine, (V)((magnitude >> 20) - (120 << 3)));
  store(to, low_bytes(code | ((bits >> 24) & 128)));
}

}  // namespace enginehouse
