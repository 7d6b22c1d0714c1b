// Residual streams: of some models several hidden states go from layer to layer, of which a layer reads and corrects
// all, and runs on the first.
//
// Source: Alternating Updates for Efficient Transformers (Baykal et al., 2023), in the form of transformers' Gemma 3n.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>

#include "linear.h"
#include "memory.h"
#include "norms.h"
#include "pool.h"
#include "residual.h"
#include "shape.h"
#include "tiles.h"

namespace enginehouse {

class Streams {
 public:
  Streams(const Shape& shape, Pool& pool, Residual& residual)
      : s(shape), pool_(pool), residual_(residual), stride_(s.streams * s.hidden) {
    assert(s.streams <= kMost);
    if (s.streams < 2) return;
    openings.resize(s.streams - 1), merges.resize(s.streams - 1);
    all_of_.resize(size_t(s.max_tokens) * stride_);
  }

  Array<Linear> openings, merges;  // [streams - 1], [hidden, hidden] each

  // hidden, of n rows, and projections of it that are as large.
  void open(int n) {
    residual_.put_all(n, residual_.hidden.data(), s.hidden, s.hidden, openings[0]);
    for (int i = 1; i < s.streams; ++i)
      product(pool_, openings[i - 1], residual_.rows, n, {all_of_.data() + i * s.hidden, stride_, s.hidden});
    residual_.by_rows(n, [&](int row) {
      const float* first = &residual_.hidden[residual_.at(row)];
      std::copy_n(first, s.hidden, of(row, 0));
      for (int i = 1; i < s.streams; ++i) {
        float* x = of(row, i);
        const float by = as_large(x, first);
        for (int d = 0; d < s.hidden; d += kLanes) store(x + d, load<V>(x + d) * by);
      }
    });
  }

  // Each stream with a mixture of all; hidden: the first.
  void predict(int row, const Layer& layer) {
    float modes[kMost], mixture[kMost * kMost];
    find_modes(of(row, 0), layer, modes);
    for (int i = 0; i < s.streams * s.streams; ++i) mixture[i] = weighed(layer.streams.predictions, i, modes);
    float* hidden = &residual_.hidden[residual_.at(row)];
    for (int d = 0; d < s.hidden; d += kLanes) {
      V x[kMost];
      for (int i = 0; i < s.streams; ++i) x[i] = load<V>(of(row, i) + d);
      for (int i = 0; i < s.streams; ++i) {
        V y = x[i];
        for (int j = 0; j < s.streams; ++j) y = fma(x[j], all(mixture[i * s.streams + j]), y);
        store(of(row, i) + d, y);
        if (!i) store(hidden + d, y);
      }
    }
  }

  // hidden: what the layer made of the first, whose error each is corrected by; becomes the first, scaled.
  void correct(int row, const Layer& layer) {
    float* hidden = &residual_.hidden[residual_.at(row)];
    float modes[kMost], shares[kMost];
    find_modes(hidden, layer, modes);
    for (int i = 0; i < s.streams; ++i) shares[i] = weighed(layer.streams.corrections, i, modes) + 1.f;
    for (int d = 0; d < s.hidden; d += kLanes) {
      const V error = load<V>(hidden + d) - load<V>(of(row, 0) + d);
      for (int i = 0; i < s.streams; ++i) store(of(row, i) + d, fma(error, all(shares[i]), load<V>(of(row, i) + d)));
      store(hidden + d, load<V>(of(row, 0) + d) * load<V>(layer.streams.scale + d));
    }
  }

  // branch, normed, to all but the first.
  void add(int row, const float* norm) {
    const float* y = &residual_.branch[residual_.at(row)];
    const float by = residual_.scale_of(y);
    for (int i = 1; i < s.streams; ++i) {
      float* x = of(row, i);
      for (int d = 0; d < s.hidden; d += kLanes) store(x + d, load<V>(x + d) + load<V>(y + d) * by * load<V>(norm + d));
    }
  }

  // hidden: the mean of the first and of projections of the others that are as large.
  void merge(int n) {
    for (int i = 0; i < s.streams; ++i) {
      if (i) {
        residual_.put_all(n, all_of_.data() + i * s.hidden, stride_, s.hidden, merges[i - 1]);
        product(pool_, merges[i - 1], residual_.rows, n, {residual_.branch.data(), s.hidden, s.hidden});
      }
      residual_.by_rows(n, [&](int row) {
        const float *first = of(row, 0), *y = i ? &residual_.branch[residual_.at(row)] : first;
        const float by = (i ? as_large(y, first) : 1.f) / float(s.streams);
        float* hidden = &residual_.hidden[residual_.at(row)];
        for (int d = 0; d < s.hidden; d += kLanes) store(hidden + d, (i ? load<V>(hidden + d) : all(0)) + load<V>(y + d) * by);
      });
    }
  }

 private:
  static constexpr int kMost = 8;
  static constexpr float kLeast = 1e-5f;  // of a mean square

  float* of(int row, int stream) { return &all_of_[size_t(row) * stride_ + size_t(stream) * s.hidden]; }
  float mean_square(const float* x) const { return sum_of(x, s.hidden, [](auto v) { return v * v; }) / float(s.normed); }
  // What gives y the root mean square of x.
  float as_large(const float* y, const float* x) const { return std::sqrt(mean_square(x) / std::max(mean_square(y), kLeast)); }

  // tanh(router @ norm(x) / hidden): [streams].
  void find_modes(const float* x, const Layer& layer, float* modes) const {
    const float* norm = layer.norms[kStreams].weight;
    const float by = residual_.scale_of(x) / float(s.normed);
    for (int i = 0; i < s.streams; ++i) {
      const float* router = layer.streams.router + size_t(i) * s.hidden;
      V total = all(0);
      for (int d = 0; d < s.hidden; d += kLanes) total = fma(load<V>(x + d) * load<V>(norm + d), load<V>(router + d), total);
      modes[i] = std::tanh(sum(total) * by);
    }
  }

  float weighed(const float* rows, int row, const float* modes) const {
    float total = 0;
    for (int i = 0; i < s.streams; ++i) total += rows[row * s.streams + i] * modes[i];
    return total;
  }

  const Shape& s;
  Pool& pool_;
  Residual& residual_;
  const int stride_;
  Array<float> all_of_;  // [tokens, streams, hidden]
};

}  // namespace enginehouse
