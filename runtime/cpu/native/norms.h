// Norms of a row of numbers: by its root mean square, or less its mean and by its deviation (LayerNorm).
#pragma once

#include <cmath>

#include "vectors.h"

namespace enginehouse {

// weight: null where the model has no such norm; bias: null where a LayerNorm has none, as all others.
struct NormWeights {
  const float *weight = nullptr, *bias = nullptr;
};

// What an RMS norm multiplies by: of n numbers, with zeros behind them up to a whole vector.
inline float rms_scale(const float* x, int n, float epsilon) {
  V total = all(0);
  for (int i = 0; i < n; i += kLanes) total = fma(load<V>(x + i), load<V>(x + i), total);
  return 1.f / std::sqrt(sum(total) / float(n) + epsilon);
}

// The sum of f of each of n numbers that need not be whole vectors: f(V) of vectors, f(float) of the rest.
template <class F>
float sum_of(const float* x, int n, F&& f) {
  const int whole = n / kLanes * kLanes;
  V total = all(0);
  for (int i = 0; i < whole; i += kLanes) total = total + f(load<V>(x + i));
  float found = sum(total);
  for (int i = whole; i < n; ++i) found += f(x[i]);
  return found;
}

// In their place, of n numbers that need not be whole vectors.
inline void rms_norm(float* x, const float* weight, int n, float epsilon) {
  const float by = 1.f / std::sqrt(sum_of(x, n, [](auto v) { return v * v; }) / float(n) + epsilon);
  for (int i = 0; i < n; ++i) x[i] = x[i] * by * weight[i];
}

// Of n numbers that need not be whole vectors; what is behind them in y stays.
inline void layer_norm(const float* x, const NormWeights& norm, int n, float epsilon, float* y) {
  const float mean = sum_of(x, n, [](auto v) { return v; }) / float(n);
  const float variance = sum_of(x, n, [&](auto v) { return (v - mean) * (v - mean); }) / float(n);
  const float by = 1.f / std::sqrt(variance + epsilon);
  for (int i = 0; i < n; ++i) y[i] = (x[i] - mean) * by * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.f);
}

}  // namespace enginehouse
