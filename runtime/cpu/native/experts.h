// A mixture of experts: the router's choice for each row, and each expert's rows through one product.
//
// A row's result is the sum over its experts in the order of their numbers: whatever other rows chose.
#pragma once

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "memory.h"
#include "tiles.h"

namespace enginehouse {

// One layer's. router: float32 [experts, hidden], the caller's, as bias, which is added to its logits, and
// correction, to scores where experts are chosen, and scale, of the shares of each: [experts], or null. fc_gate in
// turns of 16 outputs.
struct Experts {
  const float *router = nullptr, *bias = nullptr, *correction = nullptr, *scale = nullptr;
  Array<Linear> fc_gate, proj;
};

// How experts are chosen: checkpoint/routing.py's Routing.
struct Routing {
  int experts, chosen, renormalize, sigmoid, groups, chosen_groups, group_best, scales_inputs;
  float scale, mixer_epsilon;
};

class Mixture {
 public:
  // rows: at once, at most.
  Mixture(const Routing& routing, int hidden, int inner, int rows)
      : r_(routing), hidden_(hidden), inner_(inner), rows_at_once_(std::max(1, rows / std::max(1, r_.chosen))) {
    assert(r_.chosen <= r_.experts && r_.experts <= kMost);
    assert(!r_.experts || (r_.experts % r_.groups == 0 && r_.group_best <= r_.experts / r_.groups));
    assert(!r_.experts || (r_.chosen_groups <= r_.groups && r_.chosen <= r_.experts / r_.groups * r_.chosen_groups));
    const size_t entries = size_t(rows_at_once_) * r_.chosen;
    choices_.resize(entries), places_.resize(entries);
    activated_.resize(entries * inner), given_.resize(entries * hidden);
    if (entries) rows_.grow(int(entries), std::max(hidden, inner));
  }

  // x: [n, hidden], normed; becomes what the experts give. judged: what they are chosen by, x or as large. gates:
  // where their gated products go, but for y.
  void run(Pool& pool, const Experts& experts, int n, float* x, const float* judged, const Target& gates) {
    for (int first = 0; first < n; first += rows_at_once_) {
      const size_t from = size_t(first) * hidden_;
      some(pool, experts, std::min(rows_at_once_, n - first), x + from, judged + from, gates);
    }
  }

 private:
  static constexpr int kMost = 1024;
  struct Choice {
    int expert;
    float share;
  };

  void some(Pool& pool, const Experts& experts, int n, float* x, const float* judged, const Target& gates) {
    const int entries = n * r_.chosen;
    by_rows(pool, n, [&](int row) { choose(experts, judged + size_t(row) * hidden_, &choices_[size_t(row) * r_.chosen]); });
    sort(entries);
    rows_.shape(entries, hidden_);
    by_rows(pool, entries, [&](int i) {
      const Linear& l = experts.fc_gate[choices_[i].expert];
      const float by = r_.scales_inputs ? choices_[i].share : 1;
      rows_.put(places_[i], x + size_t(i / r_.chosen) * hidden_, nullptr, l.factor, by, hidden_, l.input);
    });
    Target to = gates;
    to.y = activated_.data();
    multiply(pool, experts.fc_gate, to);
    rows_.shape(entries, inner_);
    by_rows(pool, entries, [&](int i) {
      const Linear& l = experts.proj[choices_[i].expert];
      rows_.put(places_[i], &activated_[size_t(places_[i]) * inner_], nullptr, l.factor, 1, inner_, l.input);
    });
    multiply(pool, experts.proj, {given_.data(), hidden_, hidden_});
    by_rows(pool, n, [&](int row) {
      for (int d = 0; d < hidden_; d += kLanes) {
        V total = all(0);
        for (int i = row * r_.chosen; i < (row + 1) * r_.chosen; ++i)
          total = fma(load<V>(&given_[size_t(places_[i]) * hidden_ + d]), all(r_.scales_inputs ? 1 : choices_[i].share), total);
        store(x + size_t(row) * hidden_ + d, total);
      }
    });
  }

  // The largest scores of router @ x, of equals the first, in the order of their numbers.
  void choose(const Experts& experts, const float* x, Choice* to) const {
    float p[kMost], judged[kMost];
    logits(experts, x, p);
    if (r_.mixer_epsilon > 0) return mix(p, to);
    scores(p);
    for (int e = 0; e < r_.experts; ++e) judged[e] = experts.correction ? p[e] + experts.correction[e] : p[e];
    if (r_.chosen_groups < r_.groups) leave_out_groups(judged);
    float kept = 0;
    for (int i = 0; i < r_.chosen; ++i) {
      const int best = take_best(judged, r_.experts);
      to[i] = {best, p[best]};
      kept += p[best];
    }
    for (int i = 0; i < r_.chosen; ++i) {
      if (r_.renormalize) to[i].share /= kept;
      to[i].share *= experts.scale ? r_.scale * experts.scale[to[i].expert] : r_.scale;
    }
    order(to);
  }

  // SparseMixer, p: the largest logit, then the largest of the others; a share is the softmax over those left that
  // are near it.
  void mix(const float* p, Choice* to) const {
    float left[kMost];
    std::copy_n(p, r_.experts, left);
    for (int i = 0; i < r_.chosen; ++i) {
      const int best = int(std::max_element(left, left + r_.experts) - left);
      const float top = left[best];
      float total = 0;
      for (int e = 0; e < r_.experts; ++e) {
        const bool far = (top - p[e]) / std::max(std::abs(p[e]), top) > 2 * r_.mixer_epsilon;
        if (!far) total += std::exp(left[e] - top);
      }
      to[i] = {best, 1 / total};
      left[best] = -INFINITY;
    }
    order(to);
  }

  void order(Choice* choices) const {
    std::sort(choices, choices + r_.chosen, [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
  }

  // The place of the largest, which is not found again.
  static int take_best(float* values, int n) {
    const int best = int(std::max_element(values, values + n) - values);
    values[best] = -INFINITY;
    return best;
  }

  // p: [experts, in whole vectors], router @ x + bias, and minus infinity behind them.
  void logits(const Experts& experts, const float* x, float* p) const {
    const int wide = (r_.experts + kLanes - 1) / kLanes * kLanes;
    for (int e = 0; e < wide; ++e) {
      V total = all(0);
      for (int d = 0; e < r_.experts && d < hidden_; d += kLanes)
        total = fma(load<V>(x + d), load<V>(experts.router + size_t(e) * hidden_ + d), total);
      p[e] = e < r_.experts ? sum(total) + (experts.bias ? experts.bias[e] : 0.f) : -INFINITY;
    }
  }

  // p, logits: becomes their softmax, or each one's sigmoid.
  void scores(float* p) const {
    if (r_.sigmoid) {
      for (int e = 0; e < r_.experts; ++e) p[e] = 1.f / (1.f + std::exp(-p[e]));
      return;
    }
    const int wide = (r_.experts + kLanes - 1) / kLanes * kLanes;
    V most = all(-INFINITY), total = all(0);
    for (int e = 0; e < wide; e += kLanes) most = larger(load<V>(p + e), most);
    const float top = largest(most);
    for (int e = 0; e < wide; e += kLanes) {
      const V share = select(lanes() + e < r_.experts, exp(load<V>(p + e) - top), all(0));
      store(p + e, share), total = total + share;
    }
    const float by = sum(total);
    for (int e = 0; e < wide; e += kLanes) store(p + e, load<V>(p + e) / by);
  }

  // Of the groups that are not among the best no expert is chosen.
  void leave_out_groups(float* judged) const {
    const int size = r_.experts / r_.groups;
    float of_group[kMost];
    for (int g = 0; g < r_.groups; ++g) {
      float copy[kMost];
      std::copy_n(judged + g * size, size, copy);
      of_group[g] = 0;
      for (int i = 0; i < r_.group_best; ++i) of_group[g] += judged[g * size + take_best(copy, size)];
    }
    bool taken[kMost] = {};
    for (int i = 0; i < r_.chosen_groups; ++i) taken[take_best(of_group, r_.groups)] = true;
    for (int g = 0; g < r_.groups; ++g)
      if (!taken[g]) std::fill_n(judged + g * size, size, -INFINITY);
  }

  // places_: where each entry's row stands when those of one expert follow each other; jobs_: these runs.
  void sort(int entries) {
    Array<int> next(r_.experts + 1);
    for (int i = 0; i < entries; ++i) ++next[choices_[i].expert + 1];
    jobs_.clear();
    for (int e = 0; e < r_.experts; ++e) {
      if (next[e + 1]) jobs_.push_back({e, next[e], next[e + 1]});
      next[e + 1] += next[e];
    }
    for (int i = 0; i < entries; ++i) places_[i] = next[choices_[i].expert]++;
  }

  void multiply(Pool& pool, const Array<Linear>& linears, const Target& t) const {
    product(pool, int(jobs_.size()), rows_, t, [&](int i) {
      return Run{&linears[jobs_[i].expert], jobs_[i].row, jobs_[i].count};
    });
  }

  struct Job {
    int expert, row, count;
  };
  const Routing r_;
  const int hidden_, inner_, rows_at_once_;
  Array<Choice> choices_;  // [rows, chosen]
  Array<int> places_;
  Array<Job> jobs_;
  Array<float> activated_, given_;
  Rows rows_;
};

}  // namespace enginehouse
