// One row of logits that was looked at: which tokens are the likeliest, and which one a number falls on.
//
// A row is looked at in blocks, of which every lane keeps its largest value: as many of those as
// candidates are wanted tell where the candidates begin, and nothing is ever sorted but candidates.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>

#include "memory.h"
#include "vectors.h"

namespace enginehouse {

constexpr int kDeep = 64, kBlock = kDeep * kLanes;
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Look {
  const float* x;  // [blocks][64][lanes]; behind the vocabulary stands kNever
  int vocab;
  float by;                   // what differences are divided by before they are weighed
  bool weighs;                // whether sums are wanted
  float best;                 // the largest
  int at;                     // the first of the largest, -1 where it is no number
  Array<float> maxima;  // [blocks][lanes]
  Array<double> sums;   // [blocks]: of weights, that of the largest being 1
  int blocks() const { return int(sums.size()); }
  double total() const {
    double all = 0;
    for (double one : sums) all += one;
    return all;
  }
};

// What a logit is told as, which rises with it and says which are equal: for drawing 0 for the largest.
struct Scaled {
  float best, by;
  explicit Scaled(const Look& l) : best(l.best), by(l.by) {}
  template <class T>
  EH_INLINE T operator()(const T& x) const { return (x - best) / by; }
};
struct Logprob {
  float best, log_sum;
  explicit Logprob(const Look& l) : best(l.best), log_sum(float(std::log(l.total()))) {}
  template <class T>
  EH_INLINE T operator()(const T& x) const { return (x - best) - log_sum; }
};

EH_INLINE V weight(const V& scaled) { return select(scaled < -87.f, all(0), exp(scaled)); }

struct Likely {
  float value;
  int id;
  bool operator<(const Likely& other) const { return value != other.value ? value > other.value : id < other.id; }
};

// The `size` largest, falling, equal ones by their ids.
template <class F>
void likeliest(const Look& l, int size, const F& f, Array<Likely>& found) {
  float least = kNever;
  if (size < int(l.maxima.size())) {
    Array<float> maxima(l.maxima.size());
    std::copy(l.maxima.begin(), l.maxima.end(), maxima.begin());
    std::nth_element(maxima.begin(), maxima.begin() + size - 1, maxima.end(), std::greater<float>());
    least = f(maxima[size - 1]);
  }
  found.clear();
  for (int lane = 0; lane < l.blocks() * kLanes; ++lane) {
    if (f(l.maxima[lane]) < least) continue;
    for (int j = 0, id = lane / kLanes * kBlock + lane % kLanes; j < kDeep && id < l.vocab; ++j, id += kLanes)
      if (const float value = f(l.x[id]); value >= least) found.push_back({value, id});
  }
  if (int(found.size()) > size) {
    std::nth_element(found.begin(), found.begin() + size, found.end());
    found.resize(size);
  }
  std::sort(found.begin(), found.end());
}

// The first i whose weight brings the running sum above target, the last that weighs anything where
// none does. running: what came before, and then what came before i.
template <class W>
int find(int n, double target, double& running, W&& weight) {
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

// By their ids, all of them.
inline int draw(const Look& l, double number) {
  const double target = number * l.total();
  double running = 0;
  const int first = find(l.blocks(), target, running, [&](int b) { return l.sums[b]; }) * kBlock;
  float weights[kBlock];
  const Scaled scaled(l);
  for (int i = 0; i < kBlock; i += kLanes) store(weights + i, weight(scaled(load<V>(l.x + first + i))));
  return first + find(kBlock, target, running, [&](int i) { return weights[i]; });
}

// All tokens by how far they are below the largest, in buckets: two are put in order, the one where
// top_p ends and the one where the number falls.
class Buckets {
 public:
  int draw(const Look& l, double number, double min_p, double top_p) {
    fill(l, float(min_p));
    double mass = 0, before;
    for (double one : mass_) mass += one;
    Likely last{kNever, l.vocab};
    if (top_p < 1) {  // the first that brings the sum to it: above what is a little less
      last = reach(std::nextafter(top_p * mass, 0.), before);
      mass = before + weights_[last.id];
    }
    return std::min(reach(number * mass, before), last).id;
  }

 private:
  static constexpr int kFar = 88, kPerUnit = 32;  // nothing weighs anything so far below the largest

  void fill(const Look& l, float min_p) {
    const int n = l.blocks() * kBlock;
    scaled_.resize(n), weights_.resize(n), bucket_.resize(n);
    const Scaled f(l);
    for (int i = 0; i < n; i += kLanes) {
      const V x = f(load<V>(l.x + i)), w = weight(x);
      store(&scaled_[i], x), store(&weights_[i], select(w >= min_p, w, all(0)));
      store(&bucket_[i], converted<I>(-select(x > -float(kFar), x, all(-kFar)) * float(kPerUnit)));
    }
    std::fill(std::begin(mass_), std::end(mass_), 0);
    for (int i = 0; i < n; ++i) mass_[bucket_[i]] += weights_[i];
  }

  // The first, as they fall, whose weight brings the running sum above target, and what came before.
  Likely reach(double target, double& running) {
    running = 0;
    const int b = find(int(std::size(mass_)), target, running, [&](int i) { return mass_[i]; });
    inside_.clear();
    for (size_t i = 0; i < bucket_.size(); ++i)
      if (bucket_[i] == b && weights_[i] > 0) inside_.push_back({scaled_[i], int(i)});
    std::sort(inside_.begin(), inside_.end());
    return inside_[find(int(inside_.size()), target, running, [&](int i) { return weights_[inside_[i].id]; })];
  }

  Array<float> scaled_, weights_;  // of each token; weighs 0 what min_p does not keep
  Array<int> bucket_;
  Array<Likely> inside_;
  double mass_[kFar * kPerUnit + 1];
};

// What a thread draws with.
struct Drawing {
  Buckets buckets;
  Array<Likely> found;
};

// min_p, then top_k, then top_p: on the likeliest few, and where these are not all that may be drawn,
// on the whole vocabulary.
inline int draw_filtered(const Look& l, double number, double min_p, int top_k, double top_p, Drawing& drawing) {
  Array<Likely>& found = drawing.found;
  constexpr int kFirst = 64;
  const bool limited = top_k > 0;
  const int size = std::min(limited ? top_k : kFirst, l.vocab);
  likeliest(l, size, Scaled(l), found);
  Array<float> weights((size + kLanes - 1) / kLanes * kLanes);
  std::fill(weights.begin(), weights.end(), kNever);
  for (int i = 0; i < size; ++i) weights[i] = found[i].value;
  for (int i = 0; i < size; i += kLanes) store(&weights[i], weight(load<V>(&weights[i])));
  Array<double> running(size);
  int kept = 0;  // all where min_p is 0
  double mass = 0;
  for (int i = 0; i < size; ++i) running[i] = mass += weights[i], kept += weights[i] >= min_p;
  kept = std::max(kept, 1);
  bool closed = limited || kept < size || size == l.vocab;
  if (top_p < 1) {
    const double whole = limited || min_p > 0 ? running[kept - 1] : l.total();
    const auto end = std::lower_bound(running.begin(), running.begin() + kept, top_p * whole);
    const int needed = int(end - running.begin()) + 1;
    closed = closed || (needed <= kept && min_p == 0);
    kept = std::min(needed, kept);
  }
  if (!closed) return drawing.buckets.draw(l, number, min_p, top_p);
  double before = 0;
  return found[find(kept, number * running[kept - 1], before, [&](int i) { return weights[i]; })].id;
}

}  // namespace enginehouse
