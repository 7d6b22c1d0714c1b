// From logits to tokens and log probabilities, as runtime/batching/sampling.py says it.
//
// All rows at once, in blocks whose results are put together in their order: no bit depends on the
// threads or on another row.
#pragma once

#include <algorithm>
#include <cmath>

#include "candidates.h"
#include "memory.h"
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
      : vocab(vocab), blocks((vocab + kBlock - 1) / kBlock), stride(blocks * kBlock + kLanes), pool_(pool), drawing_(pool.size()) {}

  const int vocab, blocks;
  const int stride;  // no multiple of a page: what is written of several rows would fall on each other in the caches

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
    each(n, [&](int i) { shape(choices[i], row(choices[i].row)); });
    looks_.resize(std::max(looks_.size(), size_t(2 * n)));  // of all, and again of those that are told
    Array<Look*> looked;
    for (int i = 0; i < n; ++i) {
      const Choice& c = choices[i];
      looked.push_back(begin(i, row(c.row), c.draws ? c.temperature : 1, c.draws || c.tells));
    }
    look(looked);
    Array<int> drawn;
    for (int i = 0; i < n; ++i) {
      choices[i].token = looks_[i].at;
      if (choices[i].draws && looks_[i].at >= 0) drawn.push_back(i);
    }
    pool_.run(int(drawn.size()), [&](int i, int thread) {
      Choice& c = choices[drawn[i]];
      const Look& l = looks_[drawn[i]];
      const bool filtered = c.top_k > 0 || c.top_p < 1 || c.min_p > 0;
      c.token = filtered ? draw_filtered(l, c.number, c.min_p, c.top_k, c.top_p, drawing_[thread]) : draw(l, c.number);
    });
    Array<Telling> telling;
    looked.clear();
    for (int i = 0; i < n; ++i) {
      Choice& c = choices[i];
      if (!c.tells || c.token < 0) continue;
      c.told.token = c.token;
      Look* l = &looks_[i];
      if (is_shaped(c) || l->by != 1)
        looked.push_back(l = begin(n + i, is_shaped(c) ? &untouched_[size_t(i) * stride] : l->x, 1, true));
      telling.push_back({&c.told, l});
    }
    look(looked);
    tell(telling);
  }

  // Of the first n rows.
  void score(Told* told, int n) {
    looks_.resize(std::max(looks_.size(), size_t(n)));
    Array<Look*> looked;
    Array<Telling> telling;
    for (int i = 0; i < n; ++i) {
      looked.push_back(begin(i, row(i), 1, true));
      telling.push_back({told + i, looked[i]});
    }
    look(looked);
    tell(telling);
  }

 private:
  struct Telling {
    Told* told;
    const Look* look;
  };
  EH_INLINE static float or_nan(float a, float b) { return a >= b || a != a ? a : b; }
  EH_INLINE static V or_nan(const V& a, const V& b) { return select((a >= b) | (a != a), a, b); }

  static bool is_shaped(const Choice& c) { return c.allowed || c.num_biased || c.num_counted || c.num_forbidden; }

  Look* begin(int i, const float* x, float by, bool weighs) {
    Look& l = looks_[i];
    l.x = x, l.vocab = vocab, l.by = by, l.weighs = weighs;
    l.maxima.resize(blocks * kLanes), l.sums.resize(blocks);
    return &l;
  }

  // f(i) for little work each: not worth another thread where they are few.
  template <class F>
  void each(int n, F&& f) {
    const int items = n < 8 ? 1 : n;
    pool_.run(items, [&](int item) {
      for (int i = item; i < n; i += items) f(i);
    });
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
    each(n, [&](int i) {
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
    Array<float> kept(c.num_forbidden);
    for (int i = 0; i < c.num_forbidden; ++i) kept[i] = x[c.forbidden[i]], x[c.forbidden[i]] = kNever;
    if (c.allowed && c.num_forbidden && std::all_of(x, x + vocab, [](float y) { return y == kNever; }))
      for (int i = 0; i < c.num_forbidden; ++i) x[c.forbidden[i]] = kept[i];
  }

  // ---- over the whole vocabulary ----

  // Every row's largest, the first of it, what each lane of each block has, and the blocks' weights.
  void look(const Array<Look*>& looks) {
    const int n = int(looks.size());
    by_blocks(n, [&](int i, int b) {
      Look& l = *looks[i];
      const float* x = l.x + size_t(b) * kBlock;
      V most = load<V>(x);
      for (int j = 1; j < kDeep; ++j) most = or_nan(most, load<V>(x + j * kLanes));
      store(&l.maxima[b * kLanes], most);
      l.sums[b] = l.weighs ? block_sum(x, largest(most), l.by) : 0;
    });
    each(n, [&](int i) {
      Look& l = *looks[i];
      V most = load<V>(l.maxima.data());
      for (int b = 1; b < blocks; ++b) most = or_nan(most, load<V>(&l.maxima[b * kLanes]));
      l.best = most[0], l.at = -1;
      for (int j = 1; j < kLanes; ++j) l.best = or_nan(l.best, most[j]);
      if (!std::isfinite(l.best)) return;
      const auto lane = std::find(l.maxima.begin(), l.maxima.end(), l.best) - l.maxima.begin();
      l.at = int(std::find(l.x + lane / kLanes * kBlock, l.x + stride, l.best) - l.x);
      for (int b = 0; b < blocks && l.weighs; ++b)
        l.sums[b] *= std::exp(double((largest(load<V>(&l.maxima[b * kLanes])) - l.best) / l.by));
    });
  }

  // Of a block, while it is at hand: what its tokens weigh beside its own largest.
  static double block_sum(const float* x, float most, float by) {
    if (!std::isfinite(most)) return 0;
    V total = all(0);
    for (int j = 0; j < kDeep; ++j) total = total + weight((load<V>(x + j * kLanes) - most) / by);
    return sum(total);
  }

  // ---- log probabilities ----

  void tell(const Array<Telling>& telling) {
    const int n = int(telling.size());
    Array<Logprob> logprob;
    for (const Telling& t : telling) {
      logprob.push_back(Logprob(*t.look));
      t.told->logprob = t.look->at < 0 ? std::nanf("") : logprob.back()(t.look->x[t.told->token]);
    }
    Array<int> above(size_t(n) * blocks);  // tokens that are likelier
    by_blocks(n, [&](int i, int b) {
      const Look& l = *telling[i].look;
      const float own = telling[i].told->logprob;
      if (!(logprob[i](largest(load<V>(&l.maxima[b * kLanes]))) > own)) return;
      I count{};
      for (int j = 0; j < kDeep; ++j) count = count - (logprob[i](load<V>(l.x + size_t(b) * kBlock + j * kLanes)) > own);
      for (int j = 0; j < kLanes; ++j) above[size_t(i) * blocks + b] += count[j];
    });
    pool_.run(n, [&](int i) {
      Told& told = *telling[i].told;
      told.rank = 1;
      for (int b = 0; b < blocks; ++b) told.rank += above[size_t(i) * blocks + b];
      if (telling[i].look->at < 0) told.count = 0;
      if (!told.count) return;
      Array<Likely> found;
      likeliest(*telling[i].look, told.count, logprob[i], found);
      for (int j = 0; j < told.count; ++j) told.ids[j] = found[j].id, told.values[j] = found[j].value;
    });
  }

  Pool& pool_;
  Array<float> logits_, untouched_;  // [rows][stride]
  Array<Look> looks_;
  Array<Drawing> drawing_;  // each thread's
};

}  // namespace enginehouse
