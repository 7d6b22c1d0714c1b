// A step's tokens over the paged cache: how they are cut, what is kept of them, what their queries give.
//
// What a query or a key is made of is the caller's.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>

#include "attention.h"
#include "pool.h"
#include "shape.h"
#include "tall_attention.h"

namespace enginehouse {

// rope: its rotary table, -1 where it is not turned.
struct Token {
  int row, position, rope;
};

// Some tiles that follow each other, and their rows.
struct Span {
  int first, last, row, rows;
};

class PagedAttention {
 public:
  // layers: each place that has keys is of one layer at least, and of like ones if of several.
  PagedAttention(const Shape& shape, Pool& pool, const Array<Layer>& layers)
      : s(shape), pool_(pool), scratch_(pool.size()), kept_(Kept(s.kept)), begins_(s.kept_layers + 1), pages_(placed(layers)) {
    assert(s.block_size % kUnit == 0);
  }

  // Whether there was memory for keys and values.
  bool whole() const { return pages_.data() != nullptr; }

  // From here on there are this step's tokens; it is the caller's.
  void cut(const Step& step) {
    step_ = &step;
    tiles_.clear();
    for (int c = 0, row = 0; c < step.chunks; ++c)
      for (int p = step.start[c], end = p + step.count[c]; p < end;) {
        const int count = std::min(kUnit - p % kUnit, end - p);
        tiles_.push_back({c, row, count, p});
        row += count, p += count;
      }
  }

  // From `first` on, of `rows` rows at most, or one.
  Span some(int first, int rows) const {
    Span found = {first, first, tiles_[first].row, 0};
    do found.rows += tiles_[found.last++].count;
    while (found.last < int(tiles_.size()) && found.rows + tiles_[found.last].count <= rows);
    return found;
  }
  Span all() const { return some(0, step_->tokens); }
  int tiles() const { return int(tiles_.size()); }

  // All keys of a step before any is read: a sequence may read some that another writes in this very step.
  // fill(token, KV head, key, value), of the layer's wide_head() each.
  template <class F>
  void keep(const Layer& layer, F&& fill) {
    const LayerCache cache = cache_of(layer);
    with_kept(kept_, [&]<class T>(T*) {
      pool_.run(tiles() * layer.kv_heads, [&](int item) {
        const Tile& tile = tiles_[item / layer.kv_heads];
        const int head = item % layer.kv_heads;
        T* unit = cache.unit<T>(table_of(tile), head, tile.position / kUnit);
        float key[kMostHead], value[kMostHead];
        for (int i = 0; i < tile.count; ++i) {
          const Token token = token_of(tile, i, layer.rule);
          fill(token, head, key, value);
          cache.keep(unit, token.position % kUnit, key, value, layer.rule.kept);
        }
      });
    });
  }

  // query(token, head, y): writes the query, of the layer's wide_head(), and says where what it gives goes, as wide
  // or, of latents, as their rank. per: heads at once, none of two KV heads.
  template <class F>
  void attend(const Layer& layer, const Span& of, int per, F& query) {
    attend(layer, of, per, {&query, [](void* f, const Token& token, int head, float* y) {
      return (*static_cast<F*>(f))(token, head, y);
    }});
  }

 private:
  // A lambda less its type: so there is one attention for all.
  struct Asked {
    void* context;
    float* (*call)(void* context, const Token& token, int head, float* y);
  };

  void attend(const Layer& layer, const Span& of, int per, const Asked& query) {
    const int groups = (s.heads + per - 1) / per, shared = s.heads / layer.kv_heads;
    const int wide = layer.wide_head(), wide_value = s.latent_rank ? round_up(s.latent_rank, kLanes) : wide;
    const LayerCache cache = cache_of(layer);
    const Rule& rule = layer.rule;
    with_kept(kept_, [&]<class T>(T*) {
      pool_.run((of.last - of.first) * groups, [&](int item, int thread) {
        const Tile& tile = tiles_[of.first + item / groups];
        const int first = item % groups * per, count = std::min(per, s.heads - first), kv = first / shared;
        const int* table = table_of(tile);
        auto unit = [&](int u) { return cache.unit<T>(table, kv, u); };
        fetch_first(unit, rule.first(tile.position) / kUnit, tile.position / kUnit, wide);
        attend_each(tile.count * count, unit, wide, wide_value, rule, scratch_[thread], [&](int k, float* y) {
          const int head = first + k % count;
          const Token token = token_of(tile, k / count, rule);
          float* out = query.call(query.context, token, head, y);
          return Query{token.position, layer.sinks ? layer.sinks[head] : -INFINITY, out};
        });
      });
    });
  }

  // begins_: where the layer at each place begins in the pages, whose bytes are given.
  size_t placed(const Array<Layer>& layers) {
    for (const Layer& layer : layers) {
      if (!layer.kv_heads) continue;
      assert(s.heads % layer.kv_heads == 0 && layer.wide_head() <= kMostHead && layer.place < s.kept_layers);
      const size_t each = LayerCache::unit_values(layer.wide_head()) * (kept_ == Kept::bf16 ? 2 : 1);
      begins_[layer.place + 1] = each * layer.kv_heads * block_units() * s.num_blocks;
    }
    for (int place = 0; place < s.kept_layers; ++place) begins_[place + 1] += begins_[place];
    return begins_[s.kept_layers];
  }
  LayerCache cache_of(const Layer& layer) const {
    return {pages_.data() + begins_[layer.place], block_units(), layer.kv_heads, layer.wide_head()};
  }
  int block_units() const { return s.block_size / kUnit; }
  const int* table_of(const Tile& tile) const { return step_->tables + step_->table_offset[tile.chunk]; }
  Token token_of(const Tile& tile, int i, const Rule& rule) const {
    return {tile.row + i, tile.position + i, rule.rope ? rule.rope : step_->rope[tile.chunk]};
  }

  const Shape& s;
  Pool& pool_;
  const Step* step_ = nullptr;
  Array<Tile> tiles_;
  Array<Scratch> scratch_;  // each thread's
  const Kept kept_;
  Array<size_t> begins_;
  Pages pages_;
};

}  // namespace enginehouse
