// A layer's MLP: plain, or a mixture of experts with one that every token sees.
#pragma once

#include <cmath>

#include "experts.h"
#include "linear.h"
#include "memory.h"
#include "pool.h"
#include "residual.h"
#include "shape.h"
#include "tiles.h"

namespace enginehouse {

class FeedForward {
 public:
  // inner: of the largest plain MLP, or shared expert.
  FeedForward(const Shape& shape, Pool& pool, Residual& residual, int inner)
      : s(shape), pool_(pool), residual_(residual), mixture_(s.routing(), s.hidden, s.expert_inner, s.max_tokens) {
    inner_.resize(size_t(s.max_tokens) * inner);
    shared_.resize(s.experts && inner ? size_t(s.max_tokens) * s.hidden : 0);
  }

  // A row as what a plain MLP's first product reads.
  void enter(Rows& rows, int to, int row, const Layer& layer) { residual_.put_normed(rows, to, row, norm_of(layer), layer.fc_gate); }
  // A row as what any MLP's first products read: experts read branch, and where they have norms of their own they are
  // chosen by normed.
  void enter(int row, const Layer& layer) {
    const bool is_mixture = layer.is_mixture();
    if (!is_mixture || s.norm_experts) residual_.put_normed(row, row, norm_of(layer), layer.fc_gate);
    if (!is_mixture) return;
    residual_.norm_to_branch(row, s.norm_experts ? layer.norms[kPreExperts] : norm_of(layer));
    if (s.norm_experts) residual_.norm_plainly(row);
  }

  // Whether it is one gated product and one behind it: rows may be entered as others, and some taken through all of it.
  bool is_plain(const Layer& layer) const { return s.gated && !layer.is_mixture() && layer.fc_gate.weights && !layer.gate.weights; }
  // enter and run of a plain one, of `count` rows from `row` on, kPanel at most, on the thread that calls; own: its rows.
  void run(int row, int count, const Layer& layer, int thread, Rows& own) {
    const int inner = layer.inner();
    float* y = reinterpret_cast<float*>(pool_.room(thread, size_t(kPanel) * inner * sizeof(float)));
    own.shape(count, s.hidden);
    for (int i = 0; i < count; ++i) enter(own, i, row + i, layer);
    product(layer.fc_gate, own, count, gated(y, inner));
    own.put_all(count, y, inner, inner, layer.proj.factor, layer.proj.input);
    product(layer.proj, own, count, {&residual_.branch[residual_.at(row)], s.hidden, s.hidden});
  }

  // branch: what the MLP gives.
  void run(int n, const Layer& layer) { layer.is_mixture() ? mixture(n, layer) : plain(n, layer, residual_.branch.data()); }

 private:
  const NormWeights& norm_of(const Layer& layer) const {
    const bool shares = s.parallel && !layer.norms[kPost].weight;  // attention's
    return layer.norms[s.norm_sublayers ? kPreFeedForward : shares ? kInput : kPost];
  }

  // Where gated products go: [rows, inner].
  Target gated(float* y, int inner) const {
    constexpr End ends[] = {End::silu, End::gelu, End::silu, End::gelu_erf};  // of Activation
    return {y, inner, inner, s.swiglu_limit > 0 ? End::clamped : ends[s.activation], s.swiglu_limit, s.swiglu_alpha};
  }

  // branch: what enters the experts, and what they and the shared one give.
  void mixture(int n, const Layer& layer) {
    const bool shares = layer.fc_gate.weights;
    float* x = residual_.branch.data();
    if (shares) {
      if (!s.norm_experts) residual_.put_all(n, x, s.hidden, s.hidden, layer.fc_gate);
      plain(n, layer, shared_.data());
      if (layer.shared_gate) residual_.by_rows(n, [&](int row) { gate_shared(row, layer.shared_gate); });
    }
    const float* judged = s.norm_experts ? residual_.normed.data() : x;
    mixture_.run(pool_, layer.experts, n, x, judged, gated(nullptr, s.expert_inner));
    if (shares) residual_.by_rows(n, [&](int row) { add_shared(row, layer); });
  }

  void gate_shared(int row, const float* gate) {
    const size_t at = residual_.at(row);
    float *x = &residual_.branch[at], *y = &shared_[at];
    V total = all(0);
    for (int i = 0; i < s.hidden; i += kLanes) total = fma(load<V>(x + i), load<V>(gate + i), total);
    const float by = 1.f / (1.f + std::exp(-sum(total)));
    for (int i = 0; i < s.hidden; i += kLanes) store(y + i, load<V>(y + i) * by);
  }

  // Each by its norm, if it has one.
  void add_shared(int row, const Layer& layer) {
    const size_t at = residual_.at(row);
    float *x = &residual_.branch[at], *y = &shared_[at];
    if (s.norm_experts) {
      rms_norm(x, layer.norms[kPostExperts].weight, s.normed, s.epsilon);
      rms_norm(y, layer.norms[kPostShared].weight, s.normed, s.epsilon);
    }
    for (int i = 0; i < s.hidden; i += kLanes) store(x + i, load<V>(x + i) + load<V>(y + i));
  }

  // to: [n, hidden], what the MLP gives.
  void plain(int n, const Layer& layer, float* to) {
    const int inner = layer.inner();
    if (!s.gated)
      ungated(n, layer);
    else if (layer.gate.weights)
      apart(n, layer);
    else
      product(pool_, layer.fc_gate, residual_.rows, n, gated(inner_.data(), inner));
    residual_.put_all(n, inner_.data(), inner, inner, layer.proj);
    product(pool_, layer.proj, residual_.rows, n, {to, s.hidden, s.hidden});
  }

  void ungated(int n, const Layer& layer) {
    const int inner = layer.inner();
    product(pool_, layer.fc_gate, residual_.rows, n, {inner_.data(), inner, inner});
    residual_.by_rows(n, [&](int row) {
      float* y = &inner_[size_t(row) * inner];
      for (int i = 0; i < inner; i += kLanes) store(y + i, activated(load<V>(y + i), s.activation));
    });
  }

  // fc and gate that differ in form or in what enters them, or whose gates are looked at together.
  void apart(int n, const Layer& layer) {
    const int inner = layer.inner();
    gate_.resize(inner_.size());
    product(pool_, layer.fc_gate, residual_.rows, n, {inner_.data(), inner, inner});
    residual_.by_rows(n, [&](int row) { enter_gate(row, layer); });
    product(pool_, layer.gate, residual_.rows, n, {gate_.data(), inner, inner});
    residual_.by_rows(n, [&](int row) {
      float* y = &inner_[size_t(row) * inner];
      const float* by = &gate_[size_t(row) * inner];
      if (layer.is_sparse()) cut_off(y, layer);
      for (int i = 0; i < inner; i += kLanes) store(y + i, activated(load<V>(y + i), s.activation) * load<V>(by + i));
    });
  }

  // Of a row's gates, what lies above the cutoff, and no more of it.
  static void cut_off(float* y, const LayerShape& of) {
    const float mean = sum_of(y, of.gates, [](auto v) { return v; }) / float(of.gates);
    const float variance = sum_of(y, of.gates, [&](auto v) { return (v - mean) * (v - mean); }) / float(of.gates);
    const float least = mean + std::sqrt(variance) * of.cutoff;
    for (int i = 0; i < of.inner(); i += kLanes) store(y + i, larger(load<V>(y + i) - least, all(0)));
  }

  // A row as it entered fc: of a parallel MLP, before attention was added.
  void enter_gate(int row, const Layer& layer) {
    const Linear& gate = layer.gate;
    const bool as_branch = layer.is_mixture() && !s.norm_experts;
    if (!as_branch && !s.layer_norm) return residual_.put_normed(row, row, norm_of(layer), gate);
    const float* x = &(as_branch ? residual_.branch : residual_.normed)[residual_.at(row)];
    residual_.rows.put(row, x, nullptr, gate.factor, 1.f, s.hidden, gate.input);
  }

  const Shape& s;
  Pool& pool_;
  Residual& residual_;
  Array<float> inner_, gate_, shared_;
  Mixture mixture_;
};

}  // namespace enginehouse
