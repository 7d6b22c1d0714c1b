// A residual of low rank: what enters attention, and two products of it, are added to what attention gives.
//
// Source: LAuReL (Menghani et al., 2024), in the form of transformers' Gemma 3n.
#pragma once

#include <cmath>

#include "linear.h"
#include "memory.h"
#include "pool.h"
#include "residual.h"
#include "shape.h"
#include "tiles.h"

namespace enginehouse {

class LearnedResidual {
 public:
  LearnedResidual(const Shape& shape, Pool& pool, Residual& residual)
      : s(shape), pool_(pool), residual_(residual), wide_(round_up(s.low_rank, kLanes)) {
    low_.resize(size_t(s.max_tokens) * wide_), learned_.resize(s.low_rank ? residual_.hidden.size() : 0);
  }

  // Of n rows of hidden, as they entered attention.
  void run(int n, const Layer& layer) {
    const NormWeights& entering = layer.norms[kInput];
    residual_.rows.shape(n, s.hidden);
    residual_.by_rows(n, [&](int row) { residual_.put_normed(row, row, entering, layer.low_left); });
    product(pool_, layer.low_left, residual_.rows, n, {low_.data(), wide_, s.low_rank});
    residual_.put_all(n, low_.data(), wide_, s.low_rank, layer.low_right);
    product(pool_, layer.low_right, residual_.rows, n, {learned_.data(), s.hidden, s.hidden});
    residual_.by_rows(n, [&](int row) {
      const float *x = &residual_.hidden[residual_.at(row)], *norm = layer.norms[kLowRank].weight;
      float* y = &learned_[residual_.at(row)];
      const float by_x = residual_.scale_of(x), by_y = residual_.scale_of(y);
      for (int i = 0; i < s.hidden; i += kLanes)
        store(y + i, load<V>(x + i) * by_x * load<V>(entering.weight + i) + load<V>(y + i) * by_y * load<V>(norm + i));
    });
  }

  // hidden, to which attention has been added: it and the residual, over the root of two.
  void add(int row) {
    float* x = &residual_.hidden[residual_.at(row)];
    const float* y = &learned_[residual_.at(row)];
    const float half = std::sqrt(0.5f);
    for (int i = 0; i < s.hidden; i += kLanes) store(x + i, (load<V>(x + i) + load<V>(y + i)) * half);
  }

 private:
  const Shape& s;
  Pool& pool_;
  Residual& residual_;
  const int wide_;
  Array<float> low_, learned_;  // [tokens, low_rank in whole vectors], [tokens, hidden]
};

}  // namespace enginehouse
