// Linear attention by the gated delta rule: a layer keeps a state of the tokens before, of one size.
//
//   S <- e^g S;  u = b (v - S^T k);  S <- S + k u^T;  out = S^T q
//
// for each value head and token by token, so that chunks and neighbours leave a sequence's bits alone.
// Source: Gated Delta Networks (Yang et al., 2024), equation 10.
#pragma once

#include <cmath>
#include <cstring>

#include "linear.h"
#include "memory.h"
#include "norms.h"
#include "pool.h"
#include "step.h"
#include "vectors.h"

namespace enginehouse {

// key_heads: 0 where no layer has it. group: value heads of a key head. key_size, value_size: whole vectors.
struct DeltaSizes {
  int key_heads, group, key_size, value_size, kernel;

  int values() const { return group * value_size; }        // of a key head
  int mixed() const { return 2 * key_size + values(); }    // of one, what the convolution sees: q, k and values
  int rows() const { return mixed() + values(); }          // of one in in_qkvz: that, and the values' gates
  int width() const { return key_heads * rows(); }
  int read() const { return key_heads * values(); }        // what a token reads, of all heads
  int rates() const { return 2 * key_heads * group; }      // of each key head b of its values, then what g is made of
  int wide_rates() const { return round_up(rates(), kLanes); }
  size_t inputs() const { return size_t(kernel - 1) * mixed(); }
  size_t state() const { return inputs() + size_t(values()) * key_size; }  // numbers that a key head keeps
};

// A layer's. All arrays are the caller's.
struct DeltaWeights {
  Linear in_qkvz, in_ba, dense;
  const float* filter = nullptr;                  // [key_heads][kernel][mixed]
  const float *speed = nullptr, *bias = nullptr;  // [key_heads * group]
  const float* norm = nullptr;                    // [value_size]
};

// A step's rows: in: [rows, width], rates: [rows, wide_rates], out: [rows, read].
struct DeltaRows {
  const float *in, *rates;
  float* out;
};

// What sequences keep, in slots; and how they go on.
class States {
 public:
  States(const DeltaSizes& sizes, float epsilon, int layers, int slots)
      : z(sizes), epsilon_(epsilon), slots_(slots), pages_(sizeof(float) * layers * slots * z.key_heads * z.state()) {
    assert(!z.key_heads || (z.key_size % kLanes == 0 && z.value_size % kLanes == 0 && z.kernel > 0));
  }

  const DeltaSizes z;

  bool whole() const { return pages_.data() != nullptr; }

  // place: of the layer, among those that have states.
  void run(Pool& pool, const Step& step, int place, const DeltaWeights& w, const DeltaRows& rows) {
    first_.clear();
    for (int c = 0, row = 0; c < step.chunks; row += step.count[c++]) first_.push_back(row);
    pool.run(step.chunks * z.key_heads, [&](int item, int thread) {
      const int c = item / z.key_heads;
      float* seen = reinterpret_cast<float*>(pool.room(thread, sizeof(float) * z.mixed()));
      float* kept_here = kept(place, step.slot[c], item % z.key_heads);
      if (step.start[c] == 0) memset(kept_here, 0, sizeof(float) * z.state());
      for (int t = 0; t < step.count[c]; ++t) go_on(w, rows, first_[c] + t, item % z.key_heads, kept_here, seen);
    });
  }

 private:
  float* kept(int place, int slot, int head) const {
    assert(slot >= 0 && slot < slots_);
    const size_t at = (size_t(place) * slots_ + slot) * z.key_heads + head;
    return reinterpret_cast<float*>(pages_.data()) + at * z.state();
  }

  // By one token. kept: of the convolution's last inputs, then states [group, key_size, value_size].
  void go_on(const DeltaWeights& w, const DeltaRows& rows, int row, int head, float* kept, float* seen) const {
    const float* in = rows.in + size_t(row) * z.width() + size_t(head) * z.rows();
    const float* rates = rows.rates + size_t(row) * z.wide_rates() + size_t(head) * 2 * z.group;
    float* out = rows.out + size_t(row) * z.read() + size_t(head) * z.values();
    convolve(w.filter + size_t(head) * z.kernel * z.mixed(), in, kept, seen);
    normalize(seen, 1.f / std::sqrt(float(z.key_size))), normalize(seen + z.key_size, 1.f);
    for (int g = 0; g < z.group; ++g) {
      const int of_head = head * z.group + g, at = g * z.value_size;
      const float fades = std::exp(-w.speed[of_head] * softplus(rates[z.group + g] + w.bias[of_head]));
      const float learns = 1.f / (1.f + std::exp(-rates[g]));
      learn(kept + z.inputs() + size_t(at) * z.key_size, seen, seen + 2 * z.key_size + at, fades, learns, out + at);
      gate(w.norm, in + z.mixed() + at, out + at);
    }
  }

  // seen: SiLU of the convolution over this token's and the last inputs, which move on.
  void convolve(const float* filter, const float* in, float* inputs, float* seen) const {
    const int n = z.mixed(), before = z.kernel - 1;
    for (int c = 0; c < n; c += kLanes) {
      V total = load<V>(in + c) * load<V>(filter + size_t(before) * n + c);
      for (int k = 0; k < before; ++k) total = fma(load<V>(inputs + size_t(k) * n + c), load<V>(filter + size_t(k) * n + c), total);
      store(seen + c, silu(total));
    }
    if (!before) return;
    memmove(inputs, inputs + n, sizeof(float) * size_t(before - 1) * n);
    memcpy(inputs + size_t(before - 1) * n, in, sizeof(float) * n);
  }

  void normalize(float* x, float scale) const {
    V total = all(0);
    for (int i = 0; i < z.key_size; i += kLanes) total = fma(load<V>(x + i), load<V>(x + i), total);
    const float by = scale / std::sqrt(sum(total) + 1e-6f);  // as transformers has it written in
    for (int i = 0; i < z.key_size; i += kLanes) store(x + i, load<V>(x + i) * by);
  }

  static float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

  // state: [key_size, value_size]; qk: q, then k; y: what the token reads.
  void learn(float* state, const float* qk, const float* value, float fades, float learns, float* y) const {
    for (int c = 0, left = z.value_size / kLanes; left > 0; c += kColumns, left -= kColumns)
      with_height<kColumns>(std::min(kColumns, left), [&](auto C) {
        learn_columns<C.value>(state + c * kLanes, qk, value + c * kLanes, fades, learns, y + c * kLanes);
      });
  }

  template <int C>
  void learn_columns(float* state, const float* qk, const float* value, float fades, float learns, float* y) const {
    const int n = z.key_size;
    V found[C] = {}, added[C], read[C] = {};
    for (int i = 0; i < n; ++i)
      for (int c = 0; c < C; ++c) found[c] = fma(load<V>(state + size_t(i) * z.value_size + c * kLanes), all(qk[n + i]), found[c]);
    for (int c = 0; c < C; ++c) added[c] = (load<V>(value + c * kLanes) - found[c] * fades) * learns;
    for (int i = 0; i < n; ++i)
      for (int c = 0; c < C; ++c) {
        float* at = state + size_t(i) * z.value_size + c * kLanes;
        const V now = fma(added[c], all(qk[n + i]), load<V>(at) * fades);
        store(at, now);
        read[c] = fma(now, all(qk[i]), read[c]);
      }
    for (int c = 0; c < C; ++c) store(y + c * kLanes, read[c]);
  }

  void gate(const float* norm, const float* gates, float* y) const {
    const float by = rms_scale(y, z.value_size, epsilon_);
    for (int i = 0; i < z.value_size; i += kLanes) store(y + i, load<V>(y + i) * by * load<V>(norm + i) * silu(load<V>(gates + i)));
  }

  static constexpr int kColumns = 4;  // vectors of values: what registers hold of two sums
  float epsilon_;
  int slots_;
  Pages pages_;
  Array<int> first_;  // each chunk's first row
};

}  // namespace enginehouse
