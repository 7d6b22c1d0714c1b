// The residual stream of a step's tokens: what the next product reads of it, and what is added to it.
#pragma once

#include "clock.h"
#include "linear.h"
#include "memory.h"
#include "norms.h"
#include "pool.h"
#include "rows.h"
#include "shape.h"
#include "vectors.h"

namespace enginehouse {

class Residual {
 public:
  Residual(const Shape& shape, Pool& pool, Clock& clock) : s(shape), pool_(pool), clock_(clock) {
    const size_t numbers = size_t(s.max_tokens) * s.hidden;
    hidden.resize(numbers), branch.resize(numbers);
    normed.resize(s.layer_norm || s.norm_experts ? numbers : 0);
  }

  // [tokens, hidden]: the stream; what a branch of it gives; and what a LayerNorm, or a norm without weights, makes
  // of it.
  Array<float> hidden, branch, normed;
  Rows rows;  // what the next product reads

  size_t at(int row) const { return size_t(row) * s.hidden; }

  template <class F>
  void by_rows(int n, F&& f) {
    const Clock::Within own(clock_, kRowWork);
    enginehouse::by_rows(pool_, n, f);
  }

  float scale_of(const float* x) const { return rms_scale(x, s.normed, s.epsilon); }

  // The norm of hidden's row, or the row where there is none, as a row of the next product's input.
  void put_normed(int to, int row, const NormWeights& norm, const Linear& next) { put_normed(rows, to, row, norm, next); }
  void put_normed(Rows& rows, int to, int row, const NormWeights& norm, const Linear& next) {
    const float* x = &hidden[at(row)];
    if (s.layer_norm) {
      float* y = &normed[at(row)];
      layer_norm(x, norm, s.normed, s.epsilon, y);
      return rows.put(to, y, nullptr, next.factor, 1.f, s.hidden, next.input);
    }
    rows.put(to, x, norm.weight, next.factor, norm.weight ? scale_of(x) : 1.f, s.hidden, next.input);
  }

  // n rows of `in` numbers as the next product's input.
  void put_all(int n, const float* x, int x_stride, int in, const Linear& next) {
    rows.shape(n, in);
    by_rows(n, [&](int row) { rows.put(row, x + size_t(row) * x_stride, nullptr, next.factor, 1.f, in, next.input); });
  }

  // The norm of hidden's row, or the row where there is none, in branch.
  void norm_to_branch(int row, const NormWeights& norm) {
    const float* x = &hidden[at(row)];
    float* y = &branch[at(row)];
    if (s.layer_norm) return layer_norm(x, norm, s.normed, s.epsilon, y);
    const float by = norm.weight ? scale_of(x) : 1.f;
    for (int i = 0; i < s.hidden; i += kLanes)
      store(y + i, norm.weight ? load<V>(x + i) * by * load<V>(norm.weight + i) : load<V>(x + i));
  }

  // By a norm without weights, in normed.
  void norm_plainly(int row) {
    const float* x = &hidden[at(row)];
    const float by = scale_of(x);
    for (int i = 0; i < s.hidden; i += kLanes) store(&normed[at(row) + i], load<V>(x + i) * by);
  }

  // hidden += what the branch gave, normed first where the family does so, and scaled. from: its row of branch.
  void add_branch(int row, const float* norm) { add_branch(row, row, norm); }
  void add_branch(int row, int from, const float* norm) {
    float* x = &hidden[at(row)];
    const float* y = &branch[at(from)];
    const float by = norm ? scale_of(y) : 1.f;
    for (int i = 0; i < s.hidden; i += kLanes) {
      const V added = norm ? load<V>(y + i) * by * load<V>(norm + i) : load<V>(y + i);
      store(x + i, load<V>(x + i) + added * s.residual_scale);
    }
  }

  void multiply(int row, float by) {
    float* x = &hidden[at(row)];
    for (int i = 0; i < s.hidden; i += kLanes) store(x + i, load<V>(x + i) * by);
  }

 private:
  const Shape& s;
  Pool& pool_;
  Clock& clock_;
};

}  // namespace enginehouse
