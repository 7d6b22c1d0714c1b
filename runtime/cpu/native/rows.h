// The input of a product: rows of activations, in bf16 or rounded to bytes.
//
// What is rounded to e4m3 is kept in bf16, which holds it exactly. Both kinds are kept in whole steps of
// 64 inputs, padded with zeros. Each eight bf16 stand in the order in which a word of nibbles yields
// them, by pairs: see packed_linear.py.
#pragma once

#include <cmath>

#include "bytes.h"
#include "memory.h"
#include "pairs.h"

namespace enginehouse {

constexpr int kStep = 64;  // inputs are padded to whole ones
constexpr int kChain = kTall ? 32 : kStep;  // pairs of so many inputs are summed from zero, and then added
constexpr int kTallRows = 16;

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

EH_INLINE H in_pairs(const H& x) {
  using Eight = u16 __attribute__((vector_size(16)));
  H out;
  for (int half = 0; half < 2; ++half) {
    const Eight eight = load<Eight>(reinterpret_cast<const Eight*>(&x) + half);
    store(reinterpret_cast<Eight*>(&out) + half, __builtin_shufflevector(eight, eight, 0, 2, 4, 6, 1, 3, 5, 7));
  }
  return out;
}

// What activations are rounded to: bytes with a scale and a center for each part of 64 inputs, fine ones for
// each of 32; e4m3 as they are, or after each row was divided by a scale of its own.
enum class Input : int { bf16, bytes, e4m3, e4m3_by_row, fine_bytes };

// Inputs whose bytes share a scale; 0 of what is no bytes.
constexpr int part_of(Input input) {
  return input == Input::bytes ? kStep : input == Input::fine_bytes ? kStep / 2 : 0;
}

struct Rows {
  // Of each step of inputs all rows: [in / 64][height][64].
  Array<Act> values;
  Array<u16> words;     // the same in bf16, for products of kTallRows at once
  Array<int8_t> bytes;  // q of a part stand for scale * (q + center)
  // Of each row, which one thread writes: [height][parts], or [height][in / 64].
  Array<float> scales;
  Array<u32> offsets;       // two numbers of 16 bits: the center, and above it the sum of q
  Array<float> sums;        // of what a step was rounded to, for zero points
  Array<float> row_scales;  // [height]: what a row was divided by
  int in = 0, height = 0;

  // Room for so many rows of so many inputs.
  void grow(int rows, int widest) {
    const size_t wide = round_up(widest, kStep), most = height_of(rows), all = most * wide;
    values.resize(all), bytes.resize(all), words.resize(kTall ? all : 0);
    row_scales.resize(most);
    sums.resize(all / kStep), scales.resize(2 * all / kStep), offsets.resize(2 * all / kStep);
  }
  // From here on there are so many rows, of so many inputs.
  void shape(int rows, int inputs) { in = round_up(inputs, kStep), height = height_of(rows); }
  // Where a row's step is in the arrays that have one number of it.
  size_t of_step(int step, int row) const { return size_t(row) * (in / kStep) + step; }
  template <int Part>
  size_t of_part(int part, int row) const { return size_t(row) * (in / Part) + part; }
  // A row's part, of bytes, and its chain: the next row's is kStep further on.
  template <int Part>
  const int8_t* part(int n, int row) const { return bytes.data() + at(n * Part / kStep, row) + n * Part % kStep; }
  const Act* chain(int n, int row) const { return values.data() + at_chain(n, row); }
  const u16* words_of(int chain, int row) const { return words.data() + at_chain(chain, row); }

  // x: [inputs] times factor (may be null) times weight (may be null) times `by`. inputs: of kLanes.
  void put(int row, const float* x, const float* weight, const float* factor, float by, int inputs, Input input) {
    auto value = [&](int from) {
      V v = load<V>(x + from) * by;
      if (weight) v = v * load<V>(weight + from);
      if (factor) v = v * load<V>(factor + from);
      return v;
    };
    float scale = 1;
    if (input == Input::e4m3_by_row) {
      V most = all(kLeastOfRow);
      for (int from = 0; from < inputs; from += kLanes) most = larger(larger(value(from), -value(from)), most);
      scale = largest(most) / kMostE4m3;
    }
    row_scales[row] = scale;
    for (int step = 0; step < in / kStep; ++step) {
      V v[kStep / kLanes];
      for (int i = 0; i < kStep / kLanes; ++i) {
        const int from = step * kStep + i * kLanes;
        v[i] = from < inputs ? value(from) : all(0);
        if (input == Input::e4m3_by_row) v[i] = v[i] / scale;
        if (input == Input::e4m3 || input == Input::e4m3_by_row) v[i] = to_e4m3(v[i]);
      }
      const size_t place = at(step, row);
      float& total = sums[of_step(step, row)];
      if (input == Input::bytes) total = put_bytes<kStep>(v, place, of_part<kStep>(step, row));
      if (input == Input::fine_bytes) {
        constexpr int kHalf = kStep / 2;
        const size_t part = of_part<kHalf>(2 * step, row);
        total = put_bytes<kHalf>(v, place, part) + put_bytes<kHalf>(v + kHalf / kLanes, place + kHalf, part + 1);
      }
      if (part_of(input)) continue;
      V rounded = all(0);
      for (int i = 0; i < kStep / kLanes; ++i) {
        const H x16 = to_bf16(v[i]);
        const H ordered = in_pairs(x16);
        put_acts(&values[place + i * kLanes], ordered);
        if (kTall) store(&words[place + i * kLanes], ordered);
        rounded = rounded + widened(x16);
      }
      total = sum(rounded);
    }
  }

 private:
  // What a tall product takes from behind the last row becomes nothing. Odd: steps of a row that are a power
  // of two apart would fall on each other in the CPU's caches.
  static int height_of(int rows) { return kTall ? round_up(rows, kTallRows) + kTallRows - 1 : rows | 1; }
  size_t at(int step, int row) const { return (size_t(step) * height + row) * kStep; }
  size_t at_chain(int n, int row) const { return at(n * kChain / kStep, row) + n * kChain % kStep; }

  static constexpr float kLeastOfRow = 1e-12f, kMostCenter = 32000.f;

  // From the least to the largest in 253 even steps, and a center of whole ones; gives the sum of what they
  // stand for. What is not finite spoils the scale, and so the row.
  template <int Part>
  float put_bytes(const V* v, size_t place, size_t part) {
    V low = v[0], high = v[0], all_of = v[0];
    for (int i = 1; i < Part / kLanes; ++i) low = smaller(low, v[i]), high = larger(high, v[i]), all_of = all_of + v[i];
    const float least = smallest(low), most = largest(high), total = sum(all_of);
    const float middle = 0.5f * (least + most);
    const float scale = std::fmax((most - least) / 253.f, std::fabs(middle) / kMostCenter + 1e-30f), inverse = 1.f / scale;
    const I center = nearest(all(middle * inverse));
    I counted = {};
    for (int i = 0; i < Part / kLanes; ++i) {
      const I q = nearest(v[i] * inverse) - center;
      store(&bytes[place + i * kLanes], low_bytes(q));
      counted = counted + ((q << 24) >> 24);  // whatever stood above
    }
    const float spoiled = scale + (total - total);
    const int32_t count = int32_t(sum(floats(counted)));
    scales[part] = spoiled, offsets[part] = u32(u16(center[0])) | u32(count) << 16;
    return spoiled * float(count + Part * center[0]);
  }
};

}  // namespace enginehouse
