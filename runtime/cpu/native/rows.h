// The input of a product: rows of activations, in bf16 or rounded to bytes.
//
// What is rounded to e4m3 is kept in bf16, which holds it exactly. Both kinds are kept in whole steps of
// 64 inputs, padded with zeros. Each eight bf16 stand in the order in which a word of nibbles yields
// them, by pairs: see packed_linear.py.
#pragma once

#include <cmath>
#include <vector>

#include "bytes.h"
#include "vectors.h"

namespace enginehouse {

constexpr int kStep = 64;  // inputs of one partial sum
constexpr int kPart = 32;  // inputs whose bytes share a scale

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

EH_INLINE H in_pairs(const H& x) {
  return __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
}

// What activations are rounded to: bytes with a scale and an offset for each part; e4m3 as they are, or
// after each row was divided by a scale of its own.
enum class Input : int { bf16, bytes, e4m3, e4m3_by_row };

struct Rows {
  std::vector<u16> values;    // [rows, stride]
  std::vector<float> sums;    // [rows, stride / 64]: of what a step was rounded to, for zero points
  std::vector<float> row_scales;  // [rows]: what a row was divided by
  // Bytes q stand for scale * (q + center); counts: the sum of q. A scale for each part: [rows, stride / 32].
  std::vector<int8_t> bytes;
  std::vector<float> scales, centers;
  std::vector<int32_t> counts;
  int stride = 0;

  void grow(int rows, int widest) {
    const size_t wide = round_up(widest, kStep);
    values.resize(rows * wide);
    sums.resize(rows * wide / kStep);
    row_scales.resize(rows);
    bytes.resize(rows * wide);
    scales.resize(rows * wide / kPart);
    centers.resize(rows * wide / kPart);
    counts.resize(rows * wide / kPart);
  }
  // From here on a row has `in` inputs.
  void widen(int in) { stride = round_up(in, kStep); }

  // x: [in] times factor (may be null) times weight (may be null) times `by`. in: of kLanes.
  void put(int row, const float* x, const float* weight, const float* factor, float by, int in, Input input) {
    auto value = [&](int from) {
      V v = load<V>(x + from) * by;
      if (weight) v = v * load<V>(weight + from);
      if (factor) v = v * load<V>(factor + from);
      return v;
    };
    float scale = 1;
    if (input == Input::e4m3_by_row) {
      V most = all(kLeastOfRow);
      for (int from = 0; from < in; from += kLanes) most = larger(larger(value(from), -value(from)), most);
      scale = largest(most) / kMostE4m3;
    }
    row_scales[row] = scale;
    for (int at = 0; at < stride; at += kStep) {
      V v[kStep / kLanes];
      for (int i = 0; i < kStep / kLanes; ++i) {
        const int from = at + i * kLanes;
        v[i] = from < in ? value(from) : all(0);
        if (input == Input::e4m3_by_row) v[i] = v[i] / scale;
        if (input == Input::e4m3 || input == Input::e4m3_by_row) v[i] = to_e4m3(v[i]);
      }
      const size_t place = size_t(row) * stride + at;
      float& total = sums[place / kStep];
      if (input == Input::bytes) {
        total = put_bytes(v, place) + put_bytes(v + kPart / kLanes, place + kPart);
        continue;
      }
      V rounded = all(0);
      for (int i = 0; i < kStep / kLanes; ++i) {
        const H x16 = to_bf16(v[i]);
        store(&values[place + i * kLanes], in_pairs(x16));
        rounded = rounded + widened(x16);
      }
      total = sum(rounded);
    }
  }

 private:
  static constexpr float kLeastOfRow = 1e-12f;

  // From the least to the largest in 255 even steps; gives the sum of what they stand for. What is
  // not finite spoils the scale, and so the row.
  float put_bytes(const V* v, size_t place) {
    const float least = smallest(smaller(v[0], v[1])), most = largest(larger(v[0], v[1])), total = sum(v[0] + v[1]);
    const float middle = 0.5f * (least + most);
    const float scale = std::fmax((most - least) / 255.f, std::fabs(middle) * 1e-6f + 1e-30f), inverse = 1.f / scale;
    I counted = {};
    for (int i = 0; i < kPart / kLanes; ++i) {
      const I q = nearest((v[i] - middle) * inverse - 0.5f);
      store(&bytes[place + i * kLanes], low_bytes(q));
      counted = counted + ((q << 24) >> 24);  // whatever stood above
    }
    const float center = middle * inverse + 0.5f, spoiled = scale + (total - total);
    const int32_t count = int32_t(sum(floats(counted)));
    const size_t part = place / kPart;
    scales[part] = spoiled, centers[part] = center, counts[part] = count;
    return spoiled * (float(count) + float(kPart) * center);
  }
};

}  // namespace enginehouse
