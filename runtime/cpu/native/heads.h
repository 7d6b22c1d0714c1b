// One head of queries or keys on its way from a product into attention: its norm, and its rotation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "norms.h"
#include "shape.h"

namespace enginehouse {

// n numbers, and zeros behind them up to `wide`.
inline void widen(const float* x, int n, int wide, float* y) {
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) store(y + i, load<V>(x + i));
  for (int i = whole; i < wide; ++i) y[i] = i < n ? x[i] : 0.f;
}

struct Heads {
  const Shape& s;
  // Global, local, short: [positions, half], of the pairs that each turns.
  const float *cos[3] = {}, *sin[3] = {};
  int half[3] = {};

  // One head's norm, where it has one of its own, and its rotation, the one before the other: [wide_head].
  void turn(const float* x, const LayerShape& of, const float* norm, int rope, int position, float* y) const {
    const int size = of.head_size;
    widen(x, size, of.wide_head(), y);
    if (s.norm_all_heads) norm = nullptr;
    if (!s.norm_turned_heads) norm_head(norm, size, y);
    if (rope >= 0) rotate(rope, position, y);
    if (s.l2_norm_heads && rope >= 0) scale_head(size, y);
    if (s.norm_turned_heads) norm_head(norm, size, y);
  }

  // A head's value, normed where values are: [wide_head].
  void value(const float* x, const LayerShape& of, float* y) const {
    widen(x, of.head_size, of.wide_head(), y);
    if (s.norm_values) scale_head(of.head_size, y);
  }

  void scale_head(int size, float* y) const {
    const float by = rms_scale(y, size, s.epsilon);
    for (int i = 0; i < size; ++i) y[i] *= by;
  }

  void norm_head(const float* norm, int size, float* y) const {
    const float by = norm ? rms_scale(y, size, s.epsilon) : 1.f;
    for (int i = 0; norm && i < size; ++i) y[i] = y[i] * by * norm[i];
  }

  void rotate(int rope, int position, float* y) const {
    const int half = this->half[rope];
    const float *c = cos[rope] + size_t(position) * half, *d = sin[rope] + size_t(position) * half;
    auto turn = [&](float& a, float& b, int i) {
      const float turned = a * c[i] - b * d[i];
      b = b * c[i] + a * d[i];
      a = turned;
    };
    if (s.rope_interleaved) {
      for (int i = 0; i < half; ++i) turn(y[2 * i], y[2 * i + 1], i);
      return;
    }
    const int whole = half / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes) {
      const V a = load<V>(y + i), b = load<V>(y + half + i), by = load<V>(c + i), other = load<V>(d + i);
      store(y + i, a * by - b * other), store(y + half + i, b * by + a * other);
    }
    for (int i = whole; i < half; ++i) turn(y[i], y[half + i], i);
  }

  // What a query at a position is multiplied by.
  float growth(int rope, int position) const {
    if (!s.growth_length || s.grows_unturned != (rope < 0)) return 1.f;
    return 1.f + s.growth_beta * std::log1p(float((position + s.growth_first) / s.growth_length));
  }
};

}  // namespace enginehouse
