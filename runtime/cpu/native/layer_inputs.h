// What each layer gets of a token besides, of a table and of the token's embedding; and how a layer takes it up.
//
// Source: transformers' Gemma 3n and Gemma 4 (per-layer embeddings).
#pragma once

#include <cmath>

#include "linear.h"
#include "memory.h"
#include "pool.h"
#include "residual.h"
#include "shape.h"
#include "step.h"
#include "tiles.h"

namespace enginehouse {

class LayerInputs {
 public:
  LayerInputs(const Shape& shape, Pool& pool, Residual& residual)
      : s(shape), pool_(pool), residual_(residual), wide_(s.wide_inputs()), all_of_(s.layers * wide_) {
    own_.resize(size_t(s.max_tokens) * all_of_), gated_.resize(size_t(s.max_tokens) * wide_);
  }

  Linear projection;             // [layers * wide_inputs, hidden]
  const u16* table = nullptr;    // [inputs_vocab, layers, wide_inputs]; others have the first token's
  const float* norm = nullptr;   // [wide_inputs]

  // Those of a step's tokens, whose embeddings hidden holds: the table's and the normed projection's sum, over the
  // root of two.
  void begin(const Step& step) {
    const int n = step.tokens;
    residual_.put_all(n, residual_.hidden.data(), s.hidden, s.hidden, projection);
    product(pool_, projection, residual_.rows, n, {own_.data(), all_of_, all_of_});
    const float of_table = std::sqrt(float(s.inputs)), of_projection = 1.f / std::sqrt(float(s.normed)), half = std::sqrt(0.5f);
    residual_.by_rows(n, [&](int row) {
      const int id = step.token_ids[row] < s.inputs_vocab ? step.token_ids[row] : 0;
      for (int l = 0; l < s.layers; ++l) {
        float* x = &own_[size_t(row) * all_of_ + size_t(l) * wide_];
        const u16* known = table + size_t(id) * all_of_ + size_t(l) * wide_;
        for (int i = 0; i < wide_; i += kLanes) store(x + i, load<V>(x + i) * of_projection);
        const float by = rms_scale(x, s.inputs, s.epsilon);
        for (int i = 0; i < wide_; i += kLanes)
          store(x + i, (load<V>(x + i) * by * load<V>(norm + i) + widened(load<H>(known + i)) * of_table) * half);
      }
    });
  }

  // The residual's rows hold what input_gate reads. branch: what the layer makes of what it gets, not normed.
  void run(int n, const Layer& layer, int index) {
    product(pool_, layer.input_gate, residual_.rows, n, {gated_.data(), wide_, wide_});
    residual_.by_rows(n, [&](int row) {
      float* y = &gated_[size_t(row) * wide_];
      const float* own = &own_[size_t(row) * all_of_ + size_t(index) * wide_];
      for (int i = 0; i < wide_; i += kLanes) store(y + i, activated(load<V>(y + i), s.activation) * load<V>(own + i));
    });
    residual_.put_all(n, gated_.data(), wide_, wide_, layer.input_proj);
    product(pool_, layer.input_proj, residual_.rows, n, {residual_.branch.data(), s.hidden, s.hidden});
  }

 private:
  const Shape& s;
  Pool& pool_;
  Residual& residual_;
  const int wide_, all_of_;  // of a layer, of all
  Array<float> own_, gated_;  // [tokens, layers, wide_inputs], [tokens, wide_inputs]
};

}  // namespace enginehouse
