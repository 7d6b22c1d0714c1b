// From logits to tokens and log probabilities, as runtime/batching/sampling.py says it.
//
// The vocabulary is looked at in blocks, whose results are put together in their order: no bit depends
// on the threads or on another row. Of a block every lane keeps its largest value: so many of those
// as candidates are wanted tell from where on the candidates lie, and nothing is ever sorted but them.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "pool.h"
#include "vectors.h"

namespace enginehouse {

// As runtime/cpu/sampler.py has them. What a row says of a token, and of the likeliest ones.
struct Told {
  int* ids;       // [count]
  float* values;  // [count]: log probabilities
  int token, count, rank;
  float logprob;
};

// How the token of one row is chosen. A pointer's ids are of the vocabulary, each once but in biased.
struct Choice {
  const u32* allowed;  // a bit a token; null: all
  const int* biased;   // [num_biased], as biases
  const float* biases;
  const int* counted;  // [num_counted], as counts: penalised
  const float* counts;
  const int* forbidden;  // unless nothing else is allowed
  double number, min_p, top_p;
  int row, num_biased, num_counted, num_forbidden, top_k;
  int draws, tells;  // whether a token is drawn by `number`; whether `told` is wanted
  float temperature, repetition, frequency, presence;
  int token;  // the chosen one, -1 where the largest logit is no number
  Told told;
};

class Sampler {
 public:
  Sampler(Pool& pool, int vocab)
      : vocab(vocab), blocks((vocab + kBlock - 1) / kBlock), stride(blocks * kBlock), pool_(pool) {}

  const int vocab, blocks, stride;

  float* row(int i) { return &logits_[size_t(i) * stride]; }

  // For so many rows; what lies behind the vocabulary in each is never likely.
  float* room(int rows) {
    const size_t had = logits_.size(), wanted = size_t(rows) * stride;
    if (had < wanted) {
      logits_.resize(wanted);
      for (size_t i = had; i < wanted; i += stride) std::fill(&logits_[i] + vocab, &logits_[i] + stride, kNever);
    }
    return logits_.data();
  }

  // Rows are changed, and none is named twice.
  void sample(Choice* choices, int n) {
    keep_untouched(choices, n);
    pool_.run(n, [&](int i) { shape(choices[i], row(choices[i].row)); });
    begin(n);
    for (int i = 0; i < n; ++i) looks_[i].x = row(choices[i].row);
    look(n);
    std::vector<int> drawn;
    for (int i = 0; i < n; ++i) {
      choices[i].token = looks_[i].at;
      if (choices[i].draws && looks_[i].at >= 0) drawn.push_back(i), looks_[i].by = choices[i].temperature;
    }
    weigh(drawn);
    pool_.run(int(drawn.size()), [&](int i) {
      Choice& c = choices[drawn[i]];
      const bool filtered = c.top_k > 0 || c.top_p < 1 || c.min_p > 0;
      c.token = filtered ? draw_filtered(c, looks_[drawn[i]]) : draw(c, looks_[drawn[i]]);
    });
    told_.clear();
    for (int i = 0; i < n; ++i)
      if (choices[i].tells && choices[i].token >= 0) {
        Choice& c = choices[i];
        c.told.token = c.token;
        looks_[told_.size()].x = is_shaped(c) ? &untouched_[size_t(i) * stride] : row(c.row);
        told_.push_back(&c.told);
      }
    tell();
  }

  // Of the first n rows.
  void score(Told* told, int n) {
    begin(n);
    told_.clear();
    for (int i = 0; i < n; ++i) looks_[i].x = row(i), told_.push_back(told + i);
    tell();
  }

 private:
  static constexpr int kDeep = 64, kBlock = kDeep * kLanes;
  static constexpr int kFirst = 64, kGrowth = 8;  // candidates that are looked at, and how many more next
  static constexpr float kNever = -std::numeric_limits<float>::infinity();

  struct Look {
    const float* x;
    float best, by;             // the largest, and what differences from it are divided by
    int at;                     // the first of the largest, -1 where it is no number
    std::vector<float> maxima;  // [blocks][lanes]
    std::vector<double> sums;   // [blocks]: of weights
    std::vector<int> above;     // [blocks]: tokens that are likelier than the told one
  };
  struct Likely {
    float value;
    int id;
    bool operator<(const Likely& other) const { return value != other.value ? value > other.value : id < other.id; }
  };
  struct Scaled {  // what is weighed: 0 for the largest
    float best, by;
    template <class T>
    EH_INLINE T operator()(const T& x) const { return (x - best) / by; }
  };
  struct Logprob {
    float best, log_sum;
    template <class T>
    EH_INLINE T operator()(const T& x) const { return (x - best) - log_sum; }
  };

  EH_INLINE static V weight(const V& scaled) { return select(scaled < -87.f, all(0), exp(scaled)); }
  EH_INLINE static float or_nan(float a, float b) { return a >= b || a != a ? a : b; }
  EH_INLINE static V or_nan(const V& a, const V& b) { return select((a >= b) | (a != a), a, b); }

  static bool is_shaped(const Choice& c) { return c.allowed || c.num_biased || c.num_counted || c.num_forbidden; }

  void begin(int n) {
    if (int(looks_.size()) < n) looks_.resize(n);
    for (int i = 0; i < n; ++i) looks_[i].maxima.resize(blocks * kLanes), looks_[i].sums.resize(blocks), looks_[i].above.resize(blocks);
  }

  // f(row, block) for all blocks of n rows, in pieces that keep every thread busy.
  template <class F>
  void by_blocks(int n, F&& f) {
    const int pieces = std::min(blocks, std::max(1, 4 * pool_.size() / std::max(n, 1)));
    pool_.run(n * pieces, [&](int item) {
      const int row = item / pieces, piece = item % pieces;
      for (int b = blocks * piece / pieces; b < blocks * (piece + 1) / pieces; ++b) f(row, b);
    });
  }

  // ---- what comes before temperature ----

  void keep_untouched(const Choice* choices, int n) {
    const auto kept = [&](int i) { return choices[i].tells && is_shaped(choices[i]); };
    for (int i = 0; i < n; ++i)
      if (kept(i)) untouched_.resize(std::max(untouched_.size(), size_t(i + 1) * stride));
    pool_.run(n, [&](int i) {
      if (kept(i)) std::copy_n(row(choices[i].row), stride, &untouched_[size_t(i) * stride]);
    });
  }

  void shape(const Choice& c, float* x) const {
    for (int i = 0; c.allowed && i < vocab; i += kLanes) {
      const U bits = ((U{} + (c.allowed[i / 32] >> (i % 32))) >> (U)lanes()) & 1u;
      store(x + i, select(bits != 0u, load<V>(x + i), all(kNever)));
    }
    for (int i = 0; i < c.num_biased; ++i) x[c.biased[i]] += c.biases[i];
    for (int i = 0; i < c.num_counted; ++i) {
      float& y = x[c.counted[i]];
      y = y > 0 ? y / c.repetition : y * c.repetition;
      y -= c.counts[i] * c.frequency;
      if (c.counts[i] > 0) y -= c.presence;
    }
    std::vector<float> kept(c.num_forbidden);
    for (int i = 0; i < c.num_forbidden; ++i) kept[i] = x[c.forbidden[i]], x[c.forbidden[i]] = kNever;
    if (c.allowed && c.num_forbidden && std::all_of(x, x + vocab, [](float y) { return y == kNever; }))
      for (int i = 0; i < c.num_forbidden; ++i) x[c.forbidden[i]] = kept[i];
  }

  // ---- over the whole vocabulary ----

  // Every row's largest, the first of it, and what each lane of each block has.
  void look(int n) {
    by_blocks(n, [&](int i, int b) {
      const float* x = looks_[i].x + size_t(b) * kBlock;
      V most = load<V>(x);
      for (int j = 1; j < kDeep; ++j) most = or_nan(most, load<V>(x + j * kLanes));
      store(&looks_[i].maxima[b * kLanes], most);
    });
    pool_.run(n, [&](int i) {
      Look& l = looks_[i];
      V most = load<V>(l.maxima.data());
      for (int b = 1; b < blocks; ++b) most = or_nan(most, load<V>(&l.maxima[b * kLanes]));
      float best = most[0];
      for (int j = 1; j < kLanes; ++j) best = or_nan(best, most[j]);
      l.best = best, l.by = 1, l.at = -1;
      if (!std::isfinite(best)) return;
      const auto lane = std::find(l.maxima.begin(), l.maxima.end(), best) - l.maxima.begin();
      l.at = int(std::find(l.x + lane / kLanes * kBlock, l.x + stride, best) - l.x);
    });
  }

  // The sum of every block's weights.
  void weigh(const std::vector<int>& which) {
    by_blocks(int(which.size()), [&](int i, int b) {
      Look& l = looks_[which[i]];
      const Scaled scaled{l.best, l.by};
      V total = all(0);
      for (int j = 0; j < kDeep; ++j) total += weight(scaled(load<V>(l.x + size_t(b) * kBlock + j * kLanes)));
      l.sums[b] = sum(total);
    });
  }

  static double total_of(const Look& l) {
    double total = 0;
    for (double one : l.sums) total += one;
    return total;
  }

  // The `size` largest, falling, equal ones by their ids; f rises, and says which are equal.
  template <class F>
  void likeliest(const Look& l, int size, const F& f, std::vector<Likely>& found) const {
    float least = kNever;
    if (size < int(l.maxima.size())) {
      std::vector<float> maxima = l.maxima;
      std::nth_element(maxima.begin(), maxima.begin() + size - 1, maxima.end(), std::greater<float>());
      least = f(maxima[size - 1]);
    }
    found.clear();
    for (int lane = 0; lane < blocks * kLanes; ++lane) {
      if (f(l.maxima[lane]) < least) continue;
      for (int j = 0, id = lane / kLanes * kBlock + lane % kLanes; j < kDeep && id < vocab; ++j, id += kLanes)
        if (const float value = f(l.x[id]); value >= least) found.push_back({value, id});
    }
    if (int(found.size()) > size) {
      std::nth_element(found.begin(), found.begin() + size, found.end());
      found.resize(size);
    }
    std::sort(found.begin(), found.end());
  }

  // ---- drawing ----

  // The first i whose weight brings the running sum above target, the last that weighs anything where
  // none does. running: what came before, and then what came before i.
  template <class W>
  static int find(int n, double target, double& running, W&& weight) {
    int last = 0;
    double before = running;
    for (int i = 0; i < n; ++i) {
      const double w = weight(i);
      if (w > 0) {
        last = i, before = running;
        if (running + w > target) break;
      }
      running += w;
    }
    running = before;
    return last;
  }

  int draw(const Choice& c, const Look& l) const {
    const double target = c.number * total_of(l);
    double running = 0;
    const int first = find(blocks, target, running, [&](int b) { return l.sums[b]; }) * kBlock;
    float weights[kBlock];
    const Scaled scaled{l.best, l.by};
    for (int i = 0; i < kBlock; i += kLanes) store(weights + i, weight(scaled(load<V>(l.x + first + i))));
    return first + find(kBlock, target, running, [&](int i) { return weights[i]; });
  }

  // min_p, then top_k, then top_p, on so many candidates as it takes.
  int draw_filtered(const Choice& c, const Look& l) const {
    std::vector<Likely> found;
    std::vector<float> weights;
    std::vector<double> running;
    const bool limited = c.top_k > 0;
    for (int size = limited ? c.top_k : kFirst;; size *= kGrowth) {
      size = std::min(size, vocab);
      likeliest(l, size, Scaled{l.best, l.by}, found);
      weights.assign((size + kLanes - 1) / kLanes * kLanes, kNever);
      for (int i = 0; i < size; ++i) weights[i] = found[i].value;
      for (int i = 0; i < size; i += kLanes) store(&weights[i], weight(load<V>(&weights[i])));
      running.resize(size);
      int kept = 0;  // all where min_p is 0
      double mass = 0;
      for (int i = 0; i < size; ++i) running[i] = mass += weights[i], kept += weights[i] >= c.min_p;
      kept = std::max(kept, 1);
      bool closed = limited || kept < size || size == vocab;
      if (c.top_p < 1) {
        const double whole = limited || c.min_p > 0 ? running[kept - 1] : total_of(l);
        const int needed = int(std::lower_bound(running.begin(), running.begin() + kept, c.top_p * whole) - running.begin()) + 1;
        closed = closed || (needed <= kept && c.min_p == 0);
        kept = std::min(needed, kept);
      }
      if (!closed) continue;
      double before = 0;
      return found[find(kept, c.number * running[kept - 1], before, [&](int i) { return weights[i]; })].id;
    }
  }

  // ---- log probabilities ----

  // Of the first looks, whose x is set, what told_ asks.
  void tell() {
    const int n = int(told_.size());
    look(n);
    std::vector<int> all_of(n);
    for (int i = 0; i < n; ++i) all_of[i] = i;
    weigh(all_of);
    std::vector<Logprob> logprob(n);
    for (int i = 0; i < n; ++i) {
      logprob[i] = {looks_[i].best, float(std::log(total_of(looks_[i])))};
      told_[i]->logprob = looks_[i].at < 0 ? std::nanf("") : logprob[i](looks_[i].x[told_[i]->token]);
    }
    by_blocks(n, [&](int i, int b) {
      I count{};
      for (int j = 0; j < kDeep; ++j)
        count -= logprob[i](load<V>(looks_[i].x + size_t(b) * kBlock + j * kLanes)) > told_[i]->logprob;
      looks_[i].above[b] = 0;
      for (int j = 0; j < kLanes; ++j) looks_[i].above[b] += count[j];
    });
    pool_.run(n, [&](int i) {
      Told& told = *told_[i];
      told.rank = 1;
      for (int above : looks_[i].above) told.rank += above;
      if (looks_[i].at < 0) told.count = 0;
      if (!told.count) return;
      std::vector<Likely> found;
      likeliest(looks_[i], told.count, logprob[i], found);
      for (int j = 0; j < told.count; ++j) told.ids[j] = found[j].id, told.values[j] = found[j].value;
    });
  }

  Pool& pool_;
  std::vector<float> logits_, untouched_;  // [rows][stride]
  std::vector<Look> looks_;
  std::vector<Told*> told_;
};

}  // namespace enginehouse
