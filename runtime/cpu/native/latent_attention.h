// Latent attention: keys and values are kept as they were compressed, as one head's for all.
//
// What makes keys of latents is multiplied into the queries, what makes values into what attention gives:
// DeepSeek-V2 (2024), section 2.1 and appendix C.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstring>

#include "heads.h"
#include "linear.h"
#include "memory.h"
#include "norms.h"
#include "paged_attention.h"
#include "pool.h"
#include "shape.h"
#include "tiles.h"

namespace enginehouse {

constexpr float kLatentEpsilon = 1e-6f;  // transformers' classes have it written in

class LatentAttention {
 public:
  LatentAttention(const Shape& shape, Pool& pool, PagedAttention& paged, const Heads& heads)
      : s(shape), pool_(pool), paged_(paged), heads_(heads) {
    if (!s.latent_rank) return;
    assert(s.nope <= kMostHead);
    const int entries = s.heads * std::min(kRowsAtOnce, s.max_tokens);
    wide_.resize(size_t(entries) * round_up(s.latent_size(), kLanes)), given_.resize(size_t(entries) * s.value);
    rows_.grow(entries, std::max(s.nope, s.latent_rank));
  }

  // queries: [tokens, heads, nope + rope]; latents: [tokens, rank + rope], not normed yet. to: [tokens, stride],
  // of which it writes [heads, value].
  void run(const Layer& layer, const float* queries, const float* latents, float* to, int stride) {
    const float* norm = layer.norms[kLatents].weight;
    const int size = s.latent_size(), wide = layer.wide_head();
    paged_.keep(layer, [&](const Token& token, int, float* key, float* value) {
      widen(latents + size_t(token.row) * size, size, wide, key);
      rms_norm(key, norm, s.latent_rank, kLatentEpsilon);
      widen(key, s.latent_rank, wide, value);
      turn(token, key);
    });
    for (int first = 0; first < paged_.tiles();) {
      const Span some = paged_.some(first, kRowsAtOnce);
      run(layer, some, queries, to + size_t(some.row) * stride, stride);
      first = some.last;
    }
  }

 private:
  static constexpr int kRowsAtOnce = 64;

  // Of all heads one after the other, of each all rows.
  void run(const Layer& layer, const Span& some, const float* queries, float* to, int stride) {
    const int n = some.rows, wide = layer.wide_head(), each = s.nope + s.rotary;
    auto query_of = [&](int row, int head) { return queries + (size_t(row) * s.heads + head) * each; };
    rows_.shape(n * s.heads, s.nope);
    by_rows(pool_, n * s.heads, [&](int i) {
      float plain[kMostHead];
      widen(query_of(some.row + i % n, i / n), s.nope, round_up(s.nope, kLanes), plain);
      rows_.put(i, plain, nullptr, nullptr, 1, s.nope, Input::bf16);
    });
    multiply(layer.of_keys, n, {wide_.data(), wide, s.latent_rank});
    auto query = [&](const Token& token, int head, float* y) {
      float* absorbed = &wide_[size_t(head * n + token.row - some.row) * wide];
      memcpy(y, absorbed, size_t(s.latent_rank) * sizeof(float));
      widen(query_of(token.row, head) + s.nope, s.rotary, wide - s.latent_rank, y + s.latent_rank);
      turn(token, y);
      return absorbed;  // which is read: what attention gives takes its place
    };
    const int per = std::min(kMostQueries, (s.heads * (some.last - some.first) + pool_.size() - 1) / pool_.size());
    paged_.attend(layer, some, std::min(per, s.heads), query);
    rows_.shape(n * s.heads, s.latent_rank);
    by_rows(pool_, n * s.heads, [&](int i) {
      rows_.put(i, &wide_[size_t(i) * wide], nullptr, nullptr, 1, s.latent_rank, Input::bf16);
    });
    multiply(layer.of_values, n, {given_.data(), s.value, s.value});
    by_rows(pool_, n, [&](int row) {
      for (int h = 0; h < s.heads; ++h)
        std::copy_n(&given_[size_t(h * n + row) * s.value], s.value, to + size_t(row) * stride + size_t(h) * s.value);
    });
  }

  // Each head's n rows by what it has.
  void multiply(const Array<Linear>& of_heads, int n, const Target& t) {
    product(pool_, s.heads, rows_, t, [&](int head) { return Run{&of_heads[head], head * n, n}; });
  }

  void turn(const Token& token, float* key) const {
    if (token.rope >= 0) heads_.rotate(token.rope, token.position, key + s.latent_rank);
  }

  const Shape& s;
  Pool& pool_;
  PagedAttention& paged_;
  const Heads& heads_;
  Rows rows_;
  Array<float> wide_, given_;  // [heads, rows, wide_head], [heads, rows, value]
};

}  // namespace enginehouse
