// A decoder: what it is made of, and one step of it over chunks of several sequences.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>

#include "clock.h"
#include "experts.h"
#include "heads.h"
#include "latent_attention.h"
#include "memory.h"
#include "norms.h"
#include "paged_attention.h"
#include "pool.h"
#include "sampling.h"
#include "shape.h"
#include "tiles.h"
#include "vectors.h"

namespace enginehouse {

class Model {
 public:
  explicit Model(const Shape& shape)
      : s(shape), layers(shape.layers), pool_(shape.threads),
        mixture_(shape.routing(), shape.hidden, shape.expert_inner, shape.max_tokens) {
    assert(s.hidden == round_up(s.normed, kLanes) && s.inner % kLanes == 0);
    assert(s.expert_inner % kLanes == 0);
    assert(!(s.layer_norm || s.parallel) || !s.norm_sublayers);
    assert(!s.parallel || (s.layer_norm && !s.experts));
    assert(s.rotary % 2 == 0 && s.rotary <= s.head_size && !(s.gated_attention && (s.norm_all_heads || s.latent_rank)));
    const size_t n = s.max_tokens;
    hidden_.resize(n * s.hidden), branch_.resize(n * s.hidden), normed_.resize(s.layer_norm ? n * s.hidden : 0);
    wide_.resize(n * std::max(width(), states_.z.width())), attended_.resize(n * std::max(attended_stride(), states_.z.read()));
    inner_.resize(n * s.inner), rates_.resize(n * states_.z.wide_rates());
    latents_.resize(s.latent_rank ? n * s.head_size : 0), query_latents_.resize(n * query_stride());
    shared_.resize(s.experts && s.inner ? n * s.hidden : 0);
    for (Layer& layer : layers) {
      layer.experts.fc_gate.resize(s.experts), layer.experts.proj.resize(s.experts);
      if (s.latent_rank) layer.of_keys.resize(s.heads), layer.of_values.resize(s.heads);
    }
    rows_.grow(s.max_tokens, std::max({s.hidden, s.inner, s.heads * s.value_size(), s.query_rank, states_.z.read()}));
  }

  const Shape s;
  Array<Layer> layers;
  NormWeights final_norm;
  Linear head;
  const u16* embedding = nullptr;                // [vocab, hidden]
  Heads heads{s};

  // Of queries, and where heads have keys and values of their own, of these.
  int width() const {
    return s.latent_rank ? s.heads * (s.nope + s.rotary) : s.heads * s.query_size() + 2 * s.kv_heads * s.head_size;
  }

  Clock clock;

  // Whether there was memory for keys and values, and for states.
  bool whole() const { return paged_.whole() && states_.whole(); }

  void run(const Step& step) {
    const Clock::Within own(clock, kLinears);
    const int n = step.tokens;
    assert(n <= s.max_tokens);
    paged_.cut(step);
    rows_.shape(n, s.hidden);
    by_rows(n, [&](int row) {
      const u16* from = embedding + size_t(step.token_ids[row]) * s.hidden;
      for (int i = 0; i < s.hidden; i += kLanes) store(&hidden_[at(row) + i], widened(load<H>(from + i)) * s.embedding_scale);
      enter(row, 0);
    });
    for (int l = 0; l < s.layers; ++l) layer(step, l);
  }

  // Of rows of the last step: the sampler's first n rows.
  void logits(const int* rows, int n) {
    const Clock::Within own(clock, kHead);
    assert(n <= s.max_tokens);
    float* out = sampler_.room(n);
    rows_.shape(n, s.hidden);
    by_rows(n, [&](int i) { put_normed(i, rows[i], final_norm, head); });
    product(pool_, head, rows_, n, {out, sampler_.stride, s.vocab});
    if (s.logits_cap > 0 || s.logits_scale != 1.f) by_rows(n, [&](int i) { end_logits(sampler_.row(i)); });
  }
  Sampler& sampler() { return sampler_; }

  // Of rows of the last step, behind the last norm: out [n, normed].
  void hidden_states(const int* rows, int n, float* out) {
    by_rows(n, [&](int i) {
      const float* x = &hidden_[at(rows[i])];
      float* y = out + size_t(i) * s.normed;
      if (s.layer_norm) return layer_norm(x, final_norm, s.normed, s.epsilon, y);
      const float by = scale_of(x, s.normed);
      for (int j = 0; j < s.normed; ++j) y[j] = x[j] * by * final_norm.weight[j];
    });
  }

 private:
  size_t at(int row) const { return size_t(row) * s.hidden; }
  int attended_stride() const { return s.heads * round_up(s.value_size(), kLanes); }
  int query_stride() const { return round_up(s.query_rank, kLanes); }

  template <class F>
  void by_rows(int n, F&& f) {
    const Clock::Within own(clock, kRowWork);
    enginehouse::by_rows(pool_, n, f);
  }

  float scale_of(const float* x, int n) const { return rms_scale(x, n, s.epsilon); }

  // The norm of hidden's row, or the row where there is none, as a row of the next product's input.
  void put_normed(int to, int row, const NormWeights& norm, const Linear& next) {
    const float* x = &hidden_[at(row)];
    if (s.layer_norm) {
      float* y = &normed_[at(to)];
      layer_norm(x, norm, s.normed, s.epsilon, y);
      return rows_.put(to, y, nullptr, next.factor, 1.f, s.hidden, next.input);
    }
    rows_.put(to, x, norm.weight, next.factor, norm.weight ? scale_of(x, s.normed) : 1.f, s.hidden, next.input);
  }

  // hidden += what the branch gave, normed first where the family does so, and scaled.
  void add_branch(int row, const float* norm) {
    float* x = &hidden_[at(row)];
    const float* y = &branch_[at(row)];
    const float by = norm ? scale_of(y, s.normed) : 1.f;
    for (int i = 0; i < s.hidden; i += kLanes) {
      const V added = norm ? load<V>(y + i) * by * load<V>(norm + i) : load<V>(y + i);
      store(x + i, load<V>(x + i) + added * s.residual_scale);
    }
  }

  void layer(const Step& step, int index) {
    const Layer& layer = layers[index];
    const int n = step.tokens;
    const bool sub = s.norm_sublayers;
    if (layer.attends()) {
      attend(step, layer);
      rows_.shape(n, s.hidden);
      by_rows(n, [&](int row) {
        if (s.parallel) put_normed(row, row, norm_of_mlp(layer), layer.fc_gate);
        add_branch(row, sub ? layer.norms[kPost].weight : nullptr);
        if (!s.parallel) layer.has_mlp() ? enter_mlp(row, layer) : enter(row, index + 1);
      });
    }
    if (!layer.has_mlp()) return;
    layer.is_mixture() ? mixture(n, layer) : feed_forward(n, layer, branch_.data());
    rows_.shape(n, s.hidden);
    by_rows(n, [&](int row) {
      add_branch(row, sub ? layer.norms[kPostFeedForward].weight : nullptr);
      enter(row, index + 1);
    });
  }

  // A row as what the first product from a layer on reads.
  void enter(int row, int index) {
    for (; index < s.layers; ++index) {
      const Layer& layer = layers[index];
      if (layer.attends()) return put_normed(row, row, layer.norms[kInput], layer.entry());
      if (layer.has_mlp()) return enter_mlp(row, layer);
    }
  }

  const NormWeights& norm_of_mlp(const Layer& layer) const {
    const bool shares = s.parallel && !layer.norms[kPost].weight;  // attention's
    return layer.norms[s.norm_sublayers ? kPreFeedForward : shares ? kInput : kPost];
  }

  // Experts read rows of branch_.
  void enter_mlp(int row, const Layer& layer) {
    if (layer.is_mixture()) return norm_to_branch(row, norm_of_mlp(layer));
    put_normed(row, row, norm_of_mlp(layer), layer.fc_gate);
  }

  // Where gated products go: [rows, inner].
  Target gated(float* y, int inner) const {
    constexpr End ends[] = {End::silu, End::gelu, End::silu, End::gelu_erf};  // of Activation
    return {y, inner, inner, s.swiglu_limit > 0 ? End::clamped : ends[s.activation], s.swiglu_limit, s.swiglu_alpha};
  }

  // branch_: what enters the experts, and what they and the shared one give.
  void mixture(int n, const Layer& layer) {
    const bool shares = layer.fc_gate.weights;
    if (shares) {
      put_all(n, branch_.data(), s.hidden, s.hidden, layer.fc_gate);
      feed_forward(n, layer, shared_.data());
      if (layer.shared_gate) by_rows(n, [&](int row) { gate_shared(row, layer.shared_gate); });
    }
    mixture_.run(pool_, layer.experts, n, branch_.data(), gated(nullptr, s.expert_inner));
    if (shares) by_rows(n, [&](int row) { add_shared(row); });
  }

  void gate_shared(int row, const float* gate) {
    float *x = &branch_[at(row)], *y = &shared_[at(row)];
    V total = all(0);
    for (int i = 0; i < s.hidden; i += kLanes) total = fma(load<V>(x + i), load<V>(gate + i), total);
    const float by = 1.f / (1.f + std::exp(-sum(total)));
    for (int i = 0; i < s.hidden; i += kLanes) store(y + i, load<V>(y + i) * by);
  }

  void add_shared(int row) {
    float *x = &branch_[at(row)], *y = &shared_[at(row)];
    for (int i = 0; i < s.hidden; i += kLanes) store(x + i, load<V>(x + i) + load<V>(y + i));
  }

  V activated(const V& x) const {
    if (s.activation == kRelu2) {
      const V above = larger(x, all(0));
      return above * above;
    }
    return s.activation == kGelu ? gelu(x) : s.activation == kGeluErf ? gelu_erf(x) : silu(x);
  }

  void norm_to_branch(int row, const NormWeights& norm) {
    const float* x = &hidden_[at(row)];
    float* y = &branch_[at(row)];
    if (s.layer_norm) return layer_norm(x, norm, s.normed, s.epsilon, y);
    const float by = norm.weight ? scale_of(x, s.normed) : 1.f;
    for (int i = 0; i < s.hidden; i += kLanes)
      store(y + i, norm.weight ? load<V>(x + i) * by * load<V>(norm.weight + i) : load<V>(x + i));
  }

  // to: [n, hidden], what the MLP gives.
  void feed_forward(int n, const Layer& layer, float* to) {
    if (!s.gated)
      ungated(n, layer);
    else if (layer.gate.weights)
      apart(n, layer);
    else
      product(pool_, layer.fc_gate, rows_, n, gated(inner_.data(), layer.inner));
    put_all(n, inner_.data(), layer.inner, layer.inner, layer.proj);
    product(pool_, layer.proj, rows_, n, {to, s.hidden, s.hidden});
  }

  void ungated(int n, const Layer& layer) {
    const int inner = layer.inner;
    product(pool_, layer.fc_gate, rows_, n, {inner_.data(), inner, inner});
    by_rows(n, [&](int row) {
      float* y = &inner_[size_t(row) * inner];
      for (int i = 0; i < inner; i += kLanes) store(y + i, activated(load<V>(y + i)));
    });
  }

  // fc and gate that differ in form or in what enters them.
  void apart(int n, const Layer& layer) {
    const int inner = layer.inner;
    gate_.resize(inner_.size());
    product(pool_, layer.fc_gate, rows_, n, {inner_.data(), inner, inner});
    by_rows(n, [&](int row) {
      if (layer.is_mixture())
        rows_.put(row, &branch_[at(row)], nullptr, layer.gate.factor, 1.f, s.hidden, layer.gate.input);
      else if (s.layer_norm)  // as it entered fc: of a parallel MLP, before attention was added
        rows_.put(row, &normed_[at(row)], nullptr, layer.gate.factor, 1.f, s.hidden, layer.gate.input);
      else
        put_normed(row, row, norm_of_mlp(layer), layer.gate);
    });
    product(pool_, layer.gate, rows_, n, {gate_.data(), inner, inner});
    by_rows(n, [&](int row) {
      float* y = &inner_[size_t(row) * inner];
      const float* by = &gate_[size_t(row) * inner];
      for (int i = 0; i < inner; i += kLanes) store(y + i, activated(load<V>(y + i)) * load<V>(by + i));
    });
  }

  void put_all(int n, const float* x, int x_stride, int in, const Linear& next) {
    rows_.shape(n, in);
    by_rows(n, [&](int row) { rows_.put(row, x + size_t(row) * x_stride, nullptr, next.factor, 1.f, in, next.input); });
  }

  // ---- attention ----

  // branch_: what attention gives.
  void attend(const Step& step, const Layer& layer) {
    const int n = step.tokens;
    if (layer.is_linear()) return go_on(step, layer);
    s.latent_rank ? attend_latents(n, layer) : attend_heads(n, layer);
    give(n, attended_stride(), s.heads * s.value_size(), layer.dense);
  }

  void give(int n, int stride, int in, const Linear& dense) {
    put_all(n, attended_.data(), stride, in, dense);
    product(pool_, dense, rows_, n, {branch_.data(), s.hidden, s.hidden});
  }

  // Of linear attention.
  void go_on(const Step& step, const Layer& layer) {
    const int n = step.tokens;
    const DeltaSizes& z = states_.z;
    const DeltaWeights& w = layer.linear;
    product(pool_, w.in_qkvz, rows_, n, {wide_.data(), z.width(), z.width()});
    if (!w.in_ba.reads_as(w.in_qkvz)) by_rows(n, [&](int row) { put_normed(row, row, layer.norms[kInput], w.in_ba); });
    product(pool_, w.in_ba, rows_, n, {rates_.data(), z.wide_rates(), z.rates()});
    {
      const Clock::Within own(clock, kAttention);
      states_.run(pool_, step, layer.place, w, {wide_.data(), rates_.data(), attended_.data()});
    }
    give(n, z.read(), z.read(), w.dense);
  }

  // Each KV head has keys and values of its own.
  void attend_heads(int n, const Layer& layer) {
    const int D = s.head_size, wide = s.wide_head();
    product(pool_, layer.qkv, rows_, n, {wide_.data(), width(), width()});
    const Clock::Within own(clock, kAttention);
    if (s.clip > 0) by_rows(n, [&](int row) { clip(row); });
    if (s.norm_all_heads) by_rows(n, [&](int row) { norm_heads(row, layer); });
    paged_.keep(layer.place, layer.rule, [&](const Token& token, int head, float* key, float* value) {
      const float* x = &wide_[size_t(token.row) * width() + size_t(s.heads) * s.query_size() + size_t(head) * D];
      heads.turn(x, layer.norms[kKey].weight, token.rope, token.position, key);
      widen(x + size_t(s.kv_heads) * D, D, wide, value);
    });
    auto query = [&](const Token& token, int head, float* y) {
      heads.turn(&wide_[size_t(token.row) * width() + size_t(head) * s.query_size()], layer.norms[kQuery].weight, token.rope, token.position, y);
      const float grown = heads.growth(token.rope, token.position);
      for (int d = 0; d < D; ++d) y[d] *= grown;
      return &attended_[(size_t(token.row) * s.heads + head) * wide];
    };
    paged_.attend(layer.place, layer.rule, layer.sinks, paged_.all(), s.heads / s.kv_heads, query);
    if (s.gated_attention) by_rows(n, [&](int row) { gate_heads(row); });
    if (wide != D) by_rows(n, [&](int row) { close_gaps(row); });
  }

  // Keys and values are kept compressed.
  void attend_latents(int n, const Layer& layer) {
    const Linear& next = layer.q_a.weights ? layer.q_a : layer.q;
    product(pool_, layer.kv_a, rows_, n, {latents_.data(), s.head_size, s.head_size});
    if (!next.reads_as(layer.kv_a)) by_rows(n, [&](int row) { put_normed(row, row, layer.norms[kInput], next); });
    if (layer.q_a.weights) {
      product(pool_, layer.q_a, rows_, n, {query_latents_.data(), query_stride(), s.query_rank});
      by_rows(n, [&](int row) {
        rms_norm(&query_latents_[size_t(row) * query_stride()], layer.norms[kQueryLatents].weight, s.query_rank, kLatentEpsilon);
      });
      put_all(n, query_latents_.data(), query_stride(), s.query_rank, layer.q);
    }
    product(pool_, layer.q, rows_, n, {wide_.data(), width(), width()});
    const Clock::Within own(clock, kAttention);
    latent_.run(layer, wide_.data(), latents_.data(), attended_.data(), attended_stride());
  }

  // What a row's heads give, times the sigmoid of their gates.
  void gate_heads(int row) {
    const int D = s.head_size;
    for (int h = 0; h < s.heads; ++h) {
      float* x = &attended_[size_t(row) * attended_stride() + size_t(h) * s.wide_head()];
      const float* gates = &wide_[size_t(row) * width() + size_t(h) * s.query_size() + D];
      for (int i = 0; i < D; ++i) x[i] /= 1.f + std::exp(-gates[i]);
    }
  }

  // Takes out what stands behind each of a row's heads, and puts zeros up to a whole vector.
  void close_gaps(int row) {
    float* x = &attended_[size_t(row) * attended_stride()];
    for (int h = 1; h < s.heads; ++h) memmove(x + h * s.head_size, x + h * s.wide_head(), size_t(s.head_size) * sizeof(float));
    const int end = s.heads * s.head_size;
    std::fill(x + end, x + round_up(end, kLanes), 0.f);
  }

  // A row's queries and keys, where a norm is over all heads together.
  void norm_heads(int row, const Layer& layer) {
    float* x = &wide_[size_t(row) * width()];
    rms_norm(x, layer.norms[kQuery].weight, s.heads * s.head_size, s.epsilon);
    rms_norm(x + s.heads * s.head_size, layer.norms[kKey].weight, s.kv_heads * s.head_size, s.epsilon);
  }

  // A row's queries, keys and values, bounded.
  void clip(int row) {
    float* x = &wide_[size_t(row) * width()];
    for (int i = 0; i < width(); ++i) x[i] = std::fmax(std::fmin(x[i], s.clip), -s.clip);
  }

  // The logits of a row, scaled and capped.
  void end_logits(float* y) const {
    for (int i = 0; i < s.vocab; i += kLanes) {
      V v = all(0);
      const size_t bytes = size_t(std::min(kLanes, s.vocab - i)) * sizeof(float);
      memcpy(&v, y + i, bytes);
      v = v * s.logits_scale;
      if (s.logits_cap > 0) v = soft_cap(v, s.logits_cap);
      memcpy(y + i, &v, bytes);
    }
  }

  Pool pool_;
  Sampler sampler_{pool_, s.vocab};
  PagedAttention paged_{s, pool_};
  LatentAttention latent_{s, pool_, paged_, heads};
  States states_{s.delta(), s.epsilon, s.delta_layers, s.num_slots};
  Array<float> hidden_, normed_, branch_, wide_, attended_, inner_, gate_, shared_, latents_, query_latents_, rates_;
  Rows rows_;
  Mixture mixture_;
};

}  // namespace enginehouse
