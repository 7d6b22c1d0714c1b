// A decoder: what it is made of, and one step of it over chunks of several sequences.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>

#include "clock.h"
#include "feed_forward.h"
#include "heads.h"
#include "latent_attention.h"
#include "layer_inputs.h"
#include "learned_residual.h"
#include "memory.h"
#include "norms.h"
#include "paged_attention.h"
#include "pool.h"
#include "residual.h"
#include "sampling.h"
#include "shape.h"
#include "streams.h"
#include "tiles.h"
#include "vectors.h"

namespace enginehouse {

class Model {
 public:
  // shapes: [layers].
  Model(const Shape& shape, const LayerShape* shapes) : s(shape), layers(made(shape, shapes)), pool_(shape.threads) {
    assert(s.hidden == round_up(s.normed, kLanes) && s.expert_inner % kLanes == 0);
    assert(!(s.layer_norm || s.parallel) || !(s.norm_sublayers || s.norm_experts));
    assert(!s.parallel || (s.layer_norm && !s.experts));
    assert(s.rotary % 2 == 0 && !(s.gated_attention && (s.norm_all_heads || s.latent_rank)));
    const size_t n = s.max_tokens;
    wide_.resize(n * std::max(widest_.width, states_.z.width()));
    attended_.resize(n * std::max(widest_.attended, states_.z.read()));
    rates_.resize(n * states_.z.wide_rates());
    latents_.resize(s.latent_rank ? n * s.latent_size() : 0), query_latents_.resize(n * query_stride());
    const int most = std::max({s.hidden, widest_.inner, widest_.attended, s.query_rank, states_.z.read(), s.wide_inputs(), s.low_rank});
    residual_.rows.grow(s.max_tokens, most);
    for (Rows& own : own_) own.grow(kPanel, most);
    unfinished_.resize(s.max_tokens);
  }

  const Shape s;
  Array<Layer> layers;
  NormWeights final_norm;
  Linear head;
  const u16* embedding = nullptr;                // [vocab, hidden]
  Heads heads{s};

  // Of a layer's queries, with their gates behind each; and with its keys and values, where heads have their own.
  int queries(const LayerShape& of) const { return s.heads * query_size(of); }
  int width(const LayerShape& of) const { return queries(of) + (s.latent_rank ? 0 : 2 * of.kv_heads * of.head_size); }
  // Of what attention gives.
  int given(const LayerShape& of) const { return s.heads * (s.latent_rank ? s.value : of.head_size); }

  Clock clock;
  LayerInputs& inputs() { return inputs_; }
  Streams& streams() { return streams_; }

  // Whether there was memory for keys and values, and for states.
  bool whole() const { return paged_.whole() && states_.whole(); }

  void run(const Step& step) {
    const Clock::Within own(clock, kLinears);
    const int n = step.tokens;
    const bool more = s.inputs || s.streams > 1;  // is made of embeddings
    assert(n <= s.max_tokens);
    paged_.cut(step);
    residual_.rows.shape(n, s.hidden);
    by_rows(n, [&](int row) {
      const u16* from = embedding + size_t(step.token_ids[row]) * s.hidden;
      float* to = &residual_.hidden[residual_.at(row)];
      for (int i = 0; i < s.hidden; i += kLanes) store(to + i, widened(load<H>(from + i)) * s.embedding_scale);
      if (!more) enter(row, 0);
    });
    if (s.inputs) inputs_.begin(step);
    if (s.streams > 1) streams_.open(n);
    if (more) {
      residual_.rows.shape(n, s.hidden);
      by_rows(n, [&](int row) { enter(row, 0); });
    }
    for (int l = 0; l < s.layers; ++l) layer(step, l);
    if (s.streams > 1) streams_.merge(n);
  }

  // Of rows of the last step: the sampler's first n rows.
  void logits(const int* rows, int n) {
    const Clock::Within own(clock, kHead);
    assert(n <= s.max_tokens);
    finish(rows, n);
    float* out = sampler_.room(n);
    residual_.rows.shape(n, s.hidden);
    by_rows(n, [&](int i) { residual_.put_normed(i, rows[i], final_norm, head); });
    product(pool_, head, residual_.rows, n, {.y = out, .stride = sampler_.stride, .width = s.vocab, .far = size_t(n) * sampler_.stride > kNear});
    if (s.logits_cap > 0 || s.logits_scale != 1.f) by_rows(n, [&](int i) { end_logits(sampler_.row(i)); });
  }
  Sampler& sampler() { return sampler_; }

  // Of rows of the last step, behind the last norm: out [n, normed].
  void hidden_states(const int* rows, int n, float* out) {
    finish(rows, n);
    by_rows(n, [&](int i) {
      const float* x = &residual_.hidden[residual_.at(rows[i])];
      float* y = out + size_t(i) * s.normed;
      if (s.layer_norm) return layer_norm(x, final_norm, s.normed, s.epsilon, y);
      const float by = residual_.scale_of(x);
      for (int j = 0; j < s.normed; ++j) y[j] = x[j] * by * final_norm.weight[j];
    });
  }

 private:
  static constexpr int kPanelsEach = 4;  // that a thread has at least, where rows go by panels
  static constexpr size_t kNear = 1 << 18;  // logits that stay in a cache until they are looked at

  static Array<Layer> made(const Shape& s, const LayerShape* shapes) {
    Array<Layer> layers(s.layers);
    for (Layer& layer : layers) {
      static_cast<LayerShape&>(layer) = *shapes++;
      layer.experts.fc_gate.resize(s.experts), layer.experts.proj.resize(s.experts);
      if (s.latent_rank) layer.of_keys.resize(s.heads), layer.of_values.resize(s.heads);
    }
    return layers;
  }

  // The largest of all layers.
  struct Widest {
    int width = 0, attended = 0, inner = 0;
  };
  Widest widest() const {
    Widest found;
    for (const Layer& layer : layers) {
      found.width = std::max(found.width, width(layer)), found.attended = std::max(found.attended, attended_stride(layer));
      found.inner = std::max(found.inner, layer.inner());
    }
    return found;
  }
  int query_size(const LayerShape& of) const {
    return s.latent_rank ? s.nope + s.rotary : s.gated_attention ? 2 * of.head_size : of.head_size;
  }
  int attended_stride(const LayerShape& of) const { return s.heads * round_up(s.latent_rank ? s.value : of.head_size, kLanes); }
  int query_stride() const { return round_up(s.query_rank, kLanes); }

  template <class F>
  void by_rows(int n, F&& f) {
    residual_.by_rows(n, f);
  }

  void layer(const Step& step, int index) {
    const Layer& layer = layers[index];
    const int n = step.tokens;
    if (layer.attends()) {
      attend(step, layer);
      if (index == s.layers - 1 && is_plain(layer)) return void(std::fill_n(unfinished_.data(), n, 1));
      if (goes_by_panels(n, layer)) return by_panels(n, index);
      give(n, layer);
      if (s.low_rank) learned_.run(n, layer);
      residual_.rows.shape(n, s.hidden);
      by_rows(n, [&](int row) {
        if (s.parallel) feed_forward_.enter(row, layer);
        residual_.add_branch(row, post_norm(layer, kPost));
        if (s.low_rank) learned_.add(row);
        if (!s.parallel) layer.has_mlp() ? feed_forward_.enter(row, layer) : enter(row, index + 1);
      });
    }
    if (!layer.has_mlp()) return;
    feed_forward_.run(n, layer);
    residual_.rows.shape(n, s.hidden);
    const bool gets = layer.input_gate.weights;
    by_rows(n, [&](int row) {
      residual_.add_branch(row, post_norm(layer, kPostFeedForward));
      if (s.streams > 1) streams_.correct(row, layer);
      gets ? residual_.put_normed(row, row, {}, layer.input_gate) : leave(row, index);
    });
    if (!gets) return;
    inputs_.run(n, layer, index);
    residual_.rows.shape(n, s.hidden);
    by_rows(n, [&](int row) {
      const float* norm = layer.norms[kPostInputs].weight;
      s.streams > 1 ? streams_.add(row, norm) : residual_.add_branch(row, norm);
      leave(row, index);
    });
  }

  // Whether what follows attention is of each row alone: one product, and a plain MLP.
  bool is_plain(const Layer& layer) const {
    const bool more = s.parallel || s.streams > 1 || s.low_rank || layer.input_gate.weights;
    return !more && layer.attends() && feed_forward_.is_plain(layer);
  }
  const float* post_norm(const Layer& layer, Norm which) const { return s.norm_sublayers ? layer.norms[which].weight : nullptr; }

  // Many rows go through it some at a time, on one thread, whose cache holds them.
  bool goes_by_panels(int n, const Layer& layer) const {
    const bool tall = is_tall(dense_of(layer)) || is_tall(layer.fc_gate) || is_tall(layer.proj);
    return n >= kPanelsEach * kPanel * pool_.size() && !tall && is_plain(layer);
  }
  void by_panels(int n, int index) {
    const Layer& layer = layers[index];
    residual_.rows.shape(n, s.hidden);
    const int tiles = (n + kByteRows - 1) / kByteRows, panels = round_up((n + kPanel - 1) / kPanel, pool_.size());
    const auto before = [&](int panel) { return std::min(n, int(int64_t(tiles) * panel / panels) * kByteRows); };
    pool_.run(panels, [&](int panel, int thread) {
      const int from = before(panel), to = before(panel + 1), count = to - from;
      Rows& own = own_[thread];
      const Linear& dense = dense_of(layer);
      own.put_all(count, &attended_[size_t(from) * given_stride(layer)], given_stride(layer), num_attended(layer), dense.factor, dense.input);
      product(dense, own, count, {&residual_.branch[residual_.at(from)], s.hidden, s.hidden});
      for (int row = from; row < to; ++row) residual_.add_branch(row, post_norm(layer, kPost));
      feed_forward_.run(from, count, layer, thread, own);
      for (int row = from; row < to; ++row) residual_.add_branch(row, post_norm(layer, kPostFeedForward)), leave(row, index);
    });
  }

  // What follows the last layer's attention, of those of the rows that have not gone through it: nobody may ask for the others.
  void finish(const int* rows, int n) {
    missing_.clear();
    for (int i = 0; i < n; ++i)
      if (unfinished_[rows[i]]) unfinished_[rows[i]] = 0, missing_.push_back(rows[i]);
    if (missing_.empty()) return;
    const Clock::Within own(clock, kLinears);
    const Layer& layer = layers.back();
    const int count = int(missing_.size());
    give(count, layer, missing_.data());
    residual_.rows.shape(count, s.hidden);
    by_rows(count, [&](int i) {
      residual_.add_branch(missing_[i], i, post_norm(layer, kPost));
      feed_forward_.enter(residual_.rows, i, missing_[i], layer);
    });
    feed_forward_.run(count, layer);
    by_rows(count, [&](int i) {
      residual_.add_branch(missing_[i], i, post_norm(layer, kPostFeedForward));
      leave(missing_[i], s.layers - 1);
    });
  }

  void leave(int row, int index) {
    if (const float* by = layers[index].multiplier) residual_.multiply(row, *by);
    enter(row, index + 1);
  }

  // A row as what the first product from a layer on reads.
  void enter(int row, int index) {
    if (s.streams > 1 && index < s.layers) streams_.predict(row, layers[index]);
    for (; index < s.layers; ++index) {
      const Layer& layer = layers[index];
      if (layer.attends()) return residual_.put_normed(row, row, layer.norms[kInput], layer.entry());
      if (layer.has_mlp()) return feed_forward_.enter(row, layer);
    }
  }

  // ---- attention ----

  // attended_: what attention gives.
  void attend(const Step& step, const Layer& layer) {
    const int n = step.tokens;
    if (layer.is_linear()) return go_on(step, layer);
    s.latent_rank ? attend_latents(n, layer) : attend_heads(n, layer);
  }

  static const Linear& dense_of(const Layer& layer) { return layer.is_linear() ? layer.linear.dense : layer.dense; }
  // Of attended_: its numbers of a row, and how far rows are apart.
  int num_attended(const Layer& layer) const { return layer.is_linear() ? states_.z.read() : given(layer); }
  int given_stride(const Layer& layer) const { return layer.is_linear() ? states_.z.read() : attended_stride(layer); }

  // branch: what attention gives, behind its last product. rows: null for the first n.
  void give(int n, const Layer& layer, const int* rows = nullptr) {
    const Linear& dense = dense_of(layer);
    const int in = num_attended(layer);
    residual_.rows.shape(n, in);
    by_rows(n, [&](int i) {
      const float* x = &attended_[size_t(rows ? rows[i] : i) * given_stride(layer)];
      residual_.rows.put(i, x, nullptr, dense.factor, 1.f, in, dense.input);
    });
    product(pool_, dense, residual_.rows, n, {residual_.branch.data(), s.hidden, s.hidden});
  }

  // Of linear attention.
  void go_on(const Step& step, const Layer& layer) {
    const int n = step.tokens;
    const DeltaSizes& z = states_.z;
    const DeltaWeights& w = layer.linear;
    product(pool_, w.in_qkvz, residual_.rows, n, {wide_.data(), z.width(), z.width()});
    if (!w.in_ba.reads_as(w.in_qkvz)) by_rows(n, [&](int row) { residual_.put_normed(row, row, layer.norms[kInput], w.in_ba); });
    product(pool_, w.in_ba, residual_.rows, n, {rates_.data(), z.wide_rates(), z.rates()});
    const Clock::Within own(clock, kAttention);
    states_.run(pool_, step, layer.place, w, {wide_.data(), rates_.data(), attended_.data()});
  }

  // Each KV head has keys and values of its own, or those that another layer has kept.
  void attend_heads(int n, const Layer& layer) {
    const int D = layer.head_size, wide = layer.wide_head(), query = query_size(layer), all_of = width(layer);
    const bool has_keys = layer.qkv.weights;
    product(pool_, layer.entry(), residual_.rows, n, {wide_.data(), all_of, has_keys ? all_of : queries(layer)});
    const Clock::Within own(clock, kAttention);
    if (s.clip > 0) by_rows(n, [&](int row) { clip(row, all_of); });
    if (s.norm_all_heads) by_rows(n, [&](int row) { norm_heads(row, layer); });
    if (has_keys)
      paged_.keep(layer, [&](const Token& token, int head, float* key, float* value) {
        const float* x = &wide_[size_t(token.row) * all_of + queries(layer) + size_t(head) * D];
        heads.turn(x, layer, layer.norms[kKey].weight, token.rope, token.position, key);
        heads.value(x + size_t(layer.kv_heads) * D, layer, value);
      });
    auto query_of = [&](const Token& token, int head, float* y) {
      heads.turn(&wide_[size_t(token.row) * all_of + size_t(head) * query], layer, layer.norms[kQuery].weight, token.rope, token.position, y);
      const float grown = heads.growth(token.rope, token.position);
      for (int d = 0; grown != 1.f && d < D; ++d) y[d] *= grown;
      return &attended_[(size_t(token.row) * s.heads + head) * wide];
    };
    paged_.attend(layer, paged_.all(), s.heads / layer.kv_heads, query_of);
    if (s.gated_attention) by_rows(n, [&](int row) { gate_heads(row, layer); });
    if (wide != D) by_rows(n, [&](int row) { close_gaps(row, layer); });
  }

  // Keys and values are kept compressed.
  void attend_latents(int n, const Layer& layer) {
    const Linear& next = layer.q_a.weights ? layer.q_a : layer.q;
    product(pool_, layer.kv_a, residual_.rows, n, {latents_.data(), s.latent_size(), s.latent_size()});
    if (!next.reads_as(layer.kv_a)) by_rows(n, [&](int row) { residual_.put_normed(row, row, layer.norms[kInput], next); });
    if (layer.q_a.weights) {
      product(pool_, layer.q_a, residual_.rows, n, {query_latents_.data(), query_stride(), s.query_rank});
      by_rows(n, [&](int row) {
        rms_norm(&query_latents_[size_t(row) * query_stride()], layer.norms[kQueryLatents].weight, s.query_rank, kLatentEpsilon);
      });
      residual_.put_all(n, query_latents_.data(), query_stride(), s.query_rank, layer.q);
    }
    product(pool_, layer.q, residual_.rows, n, {wide_.data(), width(layer), width(layer)});
    const Clock::Within own(clock, kAttention);
    latent_.run(layer, wide_.data(), latents_.data(), attended_.data(), attended_stride(layer));
  }

  // What a row's heads give, times the sigmoid of their gates.
  void gate_heads(int row, const Layer& layer) {
    const int D = layer.head_size;
    for (int h = 0; h < s.heads; ++h) {
      float* x = &attended_[size_t(row) * attended_stride(layer) + size_t(h) * layer.wide_head()];
      const float* gates = &wide_[size_t(row) * width(layer) + size_t(h) * query_size(layer) + D];
      for (int i = 0; i < D; ++i) x[i] /= 1.f + std::exp(-gates[i]);
    }
  }

  // Takes out what stands behind each of a row's heads, and puts zeros up to a whole vector.
  void close_gaps(int row, const Layer& layer) {
    const int D = layer.head_size, wide = layer.wide_head(), end = s.heads * D;
    float* x = &attended_[size_t(row) * attended_stride(layer)];
    for (int h = 1; h < s.heads; ++h) memmove(x + h * D, x + h * wide, size_t(D) * sizeof(float));
    std::fill(x + end, x + round_up(end, kLanes), 0.f);
  }

  // A row's queries and keys, where a norm is over all heads together.
  void norm_heads(int row, const Layer& layer) {
    float* x = &wide_[size_t(row) * width(layer)];
    rms_norm(x, layer.norms[kQuery].weight, queries(layer), s.epsilon);
    if (layer.qkv.weights) rms_norm(x + queries(layer), layer.norms[kKey].weight, layer.kv_heads * layer.head_size, s.epsilon);
  }

  // A row's queries, keys and values, bounded.
  void clip(int row, int n) {
    float* x = &wide_[size_t(row) * n];
    for (int i = 0; i < n; ++i) x[i] = std::fmax(std::fmin(x[i], s.clip), -s.clip);
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
  const Widest widest_ = widest();
  Sampler sampler_{pool_, s.vocab};
  Residual residual_{s, pool_, clock};
  FeedForward feed_forward_{s, pool_, residual_, widest_.inner};
  LayerInputs inputs_{s, pool_, residual_};
  Streams streams_{s, pool_, residual_};
  LearnedResidual learned_{s, pool_, residual_};
  PagedAttention paged_{s, pool_, layers};
  LatentAttention latent_{s, pool_, paged_, heads};
  States states_{s.delta(), s.epsilon, s.delta_layers, s.num_slots};
  Array<uint8_t> unfinished_;  // [max_tokens]: rows of the last step that `finish` has not seen
  Array<int> missing_;
  Array<Rows> own_{size_t(pool_.size())};  // each thread's, of a panel
  Array<float> wide_, attended_, latents_, query_latents_, rates_;
};

}  // namespace enginehouse
