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
  PagedAttention(const Shape& shape, Pool& pool)
      : s(shape), pool_(pool), scratch_(pool.size()),
        cache_(Kept(s.kept), s.kept_layers, s.num_blocks, s.block_size, s.kv_heads, s.wide_head()) {
    assert(s.heads % s.kv_heads == 0 && s.block_size % kUnit == 0 && s.wide_head() <= kMostHead);
  }

  // Whether there was memory for keys and values.
  bool whole() const { return cache_.whole(); }

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
  // fill(token, KV head, key, value), of wide_head() each. place: of the layer in the cache.
  template <class F>
  void keep(int place, const Rule& rule, F&& fill) {
    with_kept(cache_.kept, [&]<class T>(T*) {
      pool_.run(tiles() * s.kv_heads, [&](int item) {
        const Tile& tile = tiles_[item / s.kv_heads];
        const int head = item % s.kv_heads;
        T* unit = cache_.unit<T>(place, table_of(tile), head, tile.position / kUnit);
        float key[kMostHead], value[kMostHead];
        for (int i = 0; i < tile.count; ++i) {
          const Token token = token_of(tile, i, rule);
          fill(token, head, key, value);
          cache_.keep(unit, token.position % kUnit, key, value, rule.kept);
        }
      });
    });
  }

  // query(token, head, y): writes the query, of wide_head(), and says where what it gives goes, of wide_kept().
  // sinks: [heads] or null. per: heads at once, none of two KV heads.
  template <class F>
  void attend(int place, const Rule& rule, const float* sinks, const Span& of, int per, F& query) {
    attend(place, rule, sinks, of, per, {&query, [](void* f, const Token& token, int head, float* y) {
      return (*static_cast<F*>(f))(token, head, y);
    }});
  }

 private:
  // A lambda less its type: so there is one attention for all.
  struct Asked {
    void* context;
    float* (*call)(void* context, const Token& token, int head, float* y);
  };

  void attend(int place, const Rule& rule, const float* sinks, const Span& of, int per, const Asked& query) {
    const int groups = (s.heads + per - 1) / per;
    with_kept(cache_.kept, [&]<class T>(T*) {
      pool_.run((of.last - of.first) * groups, [&](int item, int thread) {
        const Tile& tile = tiles_[of.first + item / groups];
        const int first = item % groups * per, count = std::min(per, s.heads - first), kv = first / (s.heads / s.kv_heads);
        const int* table = table_of(tile);
        auto unit = [&](int u) { return cache_.unit<T>(place, table, kv, u); };
        attend_each(tile.count * count, unit, s.wide_head(), s.wide_kept(), rule, scratch_[thread], [&](int k, float* y) {
          const int head = first + k % count;
          const Token token = token_of(tile, k / count, rule);
          float* out = query.call(query.context, token, head, y);
          return Query{token.position, sinks ? sinks[head] : -INFINITY, out};
        });
      });
    });
  }

  const int* table_of(const Tile& tile) const { return step_->tables + step_->table_offset[tile.chunk]; }
  Token token_of(const Tile& tile, int i, const Rule& rule) const {
    return {tile.row + i, tile.position + i, rule.rope ? rule.rope : step_->rope[tile.chunk]};
  }

  const Shape& s;
  Pool& pool_;
  const Step* step_ = nullptr;
  Array<Tile> tiles_;
  Array<Scratch> scratch_;  // each thread's
  Cache cache_;
};

}  // namespace enginehouse
