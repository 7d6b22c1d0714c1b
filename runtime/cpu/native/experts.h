// A mixture of experts: the router's choice for each row, and each expert's rows through one product.
//
// A row's result is the sum over its experts in the order of their numbers: whatever other rows chose.
#pragma once

#include <algorithm>

#include "linear.h"
#include "memory.h"
#include "tiles.h"

namespace enginehouse {

// One layer's. router: float32 [experts, hidden], the caller's. fc_gate in turns of 16 outputs.
struct Experts {
  const float* router = nullptr;
  Array<Linear> fc_gate, proj;
};

class Mixture {
 public:
  // renormalize: whether the shares of the `chosen` are scaled to sum to 1. rows: at once, at most.
  Mixture(int experts, int chosen, bool renormalize, int hidden, int inner, int rows)
      : experts_(experts), chosen_(chosen), renormalize_(renormalize), hidden_(hidden), inner_(inner),
        rows_at_once_(std::max(1, rows / std::max(1, chosen))) {
    assert(chosen <= experts && experts <= kMost);
    const size_t entries = size_t(rows_at_once_) * chosen;
    choices_.resize(entries), places_.resize(entries);
    activated_.resize(entries * inner), given_.resize(entries * hidden);
    if (entries) rows_.grow(int(entries), std::max(hidden, inner));
  }

  // x: [n, hidden], normed; becomes what the experts give.
  void run(Pool& pool, const Experts& experts, int n, float* x, End end) {
    for (int first = 0; first < n; first += rows_at_once_)
      some(pool, experts, std::min(rows_at_once_, n - first), x + size_t(first) * hidden_, end);
  }

 private:
  static constexpr int kMost = 1024;
  struct Choice {
    int expert;
    float share;
  };

  void some(Pool& pool, const Experts& experts, int n, float* x, End end) {
    const int entries = n * chosen_;
    by_rows(pool, n, [&](int row) { choose(experts.router, x + size_t(row) * hidden_, &choices_[size_t(row) * chosen_]); });
    sort(entries);
    rows_.shape(entries, hidden_);
    by_rows(pool, entries, [&](int i) {
      const Linear& l = experts.fc_gate[choices_[i].expert];
      rows_.put(places_[i], x + size_t(i / chosen_) * hidden_, nullptr, l.factor, 1, hidden_, l.input);
    });
    multiply(pool, experts.fc_gate, {activated_.data(), inner_, inner_, end});
    rows_.shape(entries, inner_);
    by_rows(pool, entries, [&](int i) {
      const Linear& l = experts.proj[choices_[i].expert];
      rows_.put(places_[i], &activated_[size_t(places_[i]) * inner_], nullptr, l.factor, 1, inner_, l.input);
    });
    multiply(pool, experts.proj, {given_.data(), hidden_, hidden_});
    by_rows(pool, n, [&](int row) {
      for (int d = 0; d < hidden_; d += kLanes) {
        V total = all(0);
        for (int i = row * chosen_; i < (row + 1) * chosen_; ++i)
          total = fma(load<V>(&given_[size_t(places_[i]) * hidden_ + d]), all(choices_[i].share), total);
        store(x + size_t(row) * hidden_ + d, total);
      }
    });
  }

  // The largest of softmax(router @ x), of equals the first, in the order of their numbers.
  void choose(const float* router, const float* x, Choice* to) const {
    float p[kMost];
    const int wide = (experts_ + kLanes - 1) / kLanes * kLanes;
    for (int e = 0; e < wide; ++e) {
      V total = all(0);
      for (int d = 0; e < experts_ && d < hidden_; d += kLanes)
        total = fma(load<V>(x + d), load<V>(router + size_t(e) * hidden_ + d), total);
      p[e] = e < experts_ ? sum(total) : -INFINITY;
    }
    V most = all(-INFINITY), total = all(0);
    for (int e = 0; e < wide; e += kLanes) most = larger(load<V>(p + e), most);
    const float top = largest(most);
    for (int e = 0; e < wide; e += kLanes) {
      const V share = select(lanes() + e < experts_, exp(load<V>(p + e) - top), all(0));
      store(p + e, share), total = total + share;
    }
    const float by = sum(total);
    bool taken[kMost] = {};
    float kept = 0;
    for (int i = 0; i < chosen_; ++i) {
      int best = -1;
      for (int e = 0; e < experts_; ++e)
        if (!taken[e] && (best < 0 || p[e] > p[best])) best = e;
      taken[best] = true;
      to[i] = {best, p[best] / by};
      kept += to[i].share;
    }
    for (int i = 0; renormalize_ && i < chosen_; ++i) to[i].share /= kept;
    std::sort(to, to + chosen_, [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
  }

  // places_: where each entry's row stands when those of one expert follow each other; jobs_: these runs.
  void sort(int entries) {
    Array<int> next(experts_ + 1);
    for (int i = 0; i < entries; ++i) ++next[choices_[i].expert + 1];
    jobs_.clear();
    for (int e = 0; e < experts_; ++e) {
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
  const int experts_, chosen_;
  const bool renormalize_;
  const int hidden_, inner_, rows_at_once_;
  Array<Choice> choices_;  // [rows, chosen]
  Array<int> places_;
  Array<Job> jobs_;
  Array<float> activated_, given_;
  Rows rows_;
};

}  // namespace enginehouse
