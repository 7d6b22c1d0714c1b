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

  // n rows of x, [n, stride], on the thread that calls.
  void put_all(int n, const float* x, int stride, int inputs, const float* factor, Input input) {
    shape(n, inputs);
    for (int row = 0; row < n; ++row) put(row, x + size_t(row) * stride, nullptr, factor, 1.f, inputs, input);
  }
  // x: [inputs] times factor (may be null) times weight (may be null) times `by`. inputs: of kLanes.
  void put(int row, const float* x, const float* weight, const float* factor, float by, int inputs, Input input) {
    auto value = [&](int from) {
      V v = load<V>(x + from) * by;
      __builtin_prefetch(x + from + kAhead);
      if (weight) v = v * load<V>(weight + from);
      if (factor) v = v * load<V>(factor + from);
      return v;
    };
    if (input == Input::bytes) return put_bytes<kStep>(row, inputs, value);
    if (input == Input::fine_bytes) return put_bytes<kStep / 2>(row, inputs, value);
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
      V rounded = all(0);
      for (int i = 0; i < kStep / kLanes; ++i) {
        const H x16 = to_bf16(v[i]);
        const H ordered = in_pairs(x16);
        put_acts(&values[place + i * kLanes], ordered);
        if (kTall) store(&words[place + i * kLanes], ordered);
        rounded = rounded + widened(x16);
      }
      sums[of_step(step, row)] = sum(rounded);
    }
  }

 private:
  // What a tall product takes from behind the last row becomes nothing. Odd: steps of a row that are a power
  // of two apart would fall on each other in the CPU's caches.
  static int height_of(int rows) { return kTall ? round_up(rows, kTallRows) + kTallRows - 1 : rows | 1; }
  size_t at(int step, int row) const { return (size_t(step) * height + row) * kStep; }
  size_t at_chain(int n, int row) const { return at(n * kChain / kStep, row) + n * kChain % kStep; }

  static constexpr float kLeastOfRow = 1e-12f, kMostCenter = 32000.f;
  static constexpr int kAhead = 512;  // numbers that are fetched early

  // Each part from its least to its largest in 253 even steps, and a center of whole ones; so many parts at once as a vector
  // has lanes. value(i): the numbers from i on, of `inputs`. What is not finite spoils a scale, and so the row.
  template <int Part, class Value>
  void put_bytes(int row, int inputs, Value&& value) {
    constexpr int kVectors = Part / kLanes;
    for (int first = 0, parts = in / Part, some; first < parts; first += some) {
      some = std::min(kLanes, parts - first);
      V v[kLanes][kVectors], low[kLanes], high[kLanes], all_of = all(0);
      V counted[kLanes];
#pragma GCC unroll 16
      for (int p = 0; p < kLanes; ++p) low[p] = high[p] = all(0), counted[p] = all(0);
      for (int p = 0; p < some; ++p) {
        for (int i = 0; i < kVectors; ++i) {
          const int from = ((first + p) * kVectors + i) * kLanes;
          const V x = v[p][i] = from < inputs ? value(from) : all(0);
          low[p] = i ? smaller(low[p], x) : x, high[p] = i ? larger(high[p], x) : x, all_of = all_of + x;
        }
      }
      const V least = across(low, Smaller()), most = across(high, Larger());
      const V middle = 0.5f * (least + most), total = all(sum(all_of));
      const V scale = larger((most - least) / 253.f, larger(middle, -middle) / kMostCenter + 1e-30f), inverse = 1.f / scale;
      const U center = (U)nearest(middle * inverse);
      alignas(64) float inverses[kLanes];
      alignas(64) u32 centers[kLanes];
      store(inverses, inverse), store(centers, center);
      for (int p = 0; p < some; ++p) {
        int8_t* to = bytes.data() + at((first + p) * Part / kStep, row) + (first + p) * Part % kStep;
        U count = {};
        for (int i = 0; i < kVectors; ++i) {
          const U q = (U)nearest(v[p][i] * inverses[p]) - centers[p];
          store(to + i * kLanes, low_bytes((I)q)), count = count + q;
        }
        counted[p] = floats((I)count);
      }
      const U count = (U)nearest(across(counted, Add()));
      const V spoiled = scale + (total - total), whole = spoiled * floats((I)(count + center * u32(Part)));
      const U offset = (center & 0xffffu) | count << 16;
      const size_t place = of_part<Part>(first, row);
      memcpy(&scales[place], &spoiled, size_t(some) * sizeof(float));
      memcpy(&offsets[place], &offset, size_t(some) * sizeof(u32));
      constexpr int kOfStep = kStep / Part;
      for (int p = 0; p < some; p += kOfStep) {
        float step = whole[p];
        for (int other = 1; other < kOfStep; ++other) step += whole[p + other];
        sums[of_step((first + p) / kOfStep, row)] = step;
      }
    }
  }
};

}  // namespace enginehouse
