// Attention over the paged cache: keys and values in units of 16 tokens, as bf16 or as bytes.
//
// Bytes are widened as they are read; the multiplier that a layer's have goes into its scores' scale
// and into what its shares are divided by.
//
// A query sums over its keys in the order of their positions, whatever else its step computes: what
// lies beyond its own span adds zeros. So chunks, prefixes and neighbours leave its bits alone.
#pragma once

#include <algorithm>
#include <cmath>

#include "bytes.h"
#include "linear.h"
#include "memory.h"
#include "vectors.h"

namespace enginehouse {

constexpr int kUnit = kLanes;  // tokens of one unit

constexpr int kMostHead = 576;  // DeepSeek's latents and what rope turns
constexpr int kUnitsAhead = 4;  // that are fetched while one is read: they lie anywhere

// Into the second cache: as much as is missing at once has no room on its way to the first.
EH_INLINE void fetch_soon(const void* p) { __builtin_prefetch(p, 0, 2); }

// The keys that are read first, unit(first) to unit(last) at most, before anything waits for them.
template <class Unit>
void fetch_first(Unit&& unit, int first, int last, int head_size) {
  for (int u = first; u <= std::min(last, first + kUnitsAhead - 1); ++u) {
    const auto* keys = unit(u);
    for (int i = 0; i < kUnit * head_size; i += int(64 / sizeof *keys)) fetch_soon(keys + i);
  }
}

enum class Kept { bf16, e4m3, int8 };  // as runtime/cpu/packed_file.py counts them

// f(a null pointer to the type that keys and values are kept in).
template <class F>
void with_kept(Kept kept, F&& f) {
  switch (kept) {
    case Kept::bf16: f(static_cast<u16*>(nullptr)); break;
    case Kept::e4m3: f(static_cast<E4m3*>(nullptr)); break;
    case Kept::int8: f(static_cast<Int8*>(nullptr)); break;
  }
}

// A layer's keys and values, for each block and head: units of keys [D / 2][16 tokens][2], then values
// [8][D][2 tokens].
class LayerCache {
 public:
  LayerCache(uint8_t* pages, int block_units, int heads, int size)
      : pages_(pages), units_(block_units), heads_(heads), size_(size) {}

  static size_t unit_values(int size) { return size_t(2) * kUnit * size; }

  template <class T>
  T* unit(const int* table, int head, int u) const {
    const size_t block = table[u / units_];
    return reinterpret_cast<T*>(pages_) + ((block * heads_ + head) * units_ + u % units_) * unit_values(size_);
  }

  // One token's key and value, [D] each, divided by scale. A unit's first zeroes its values: they may
  // be read, times zero, before they are written, and must not be NaN.
  template <class T>
  void keep(T* unit, int slot, const float* key, const float* value, float scale) const {
    T k[kMostHead], v[kMostHead];
    for (int d = 0; d < size_; d += kLanes) put(k + d, load<V>(key + d) / scale), put(v + d, load<V>(value + d) / scale);
    for (int d = 0; d < size_; d += 2) memcpy(unit + (d / 2 * kUnit + slot) * 2, k + d, 2 * sizeof(T));
    T* values = unit + kUnit * size_;
    if (slot == 0) memset(values, 0, size_t(kUnit) * size_ * sizeof(T));
    T* to = values + slot / 2 * 2 * size_ + slot % 2;
    for (int d = 0; d < size_; ++d) to[d * 2] = v[d];
  }

 private:
  uint8_t* pages_;
  int units_, heads_, size_;
};

// softmax(cap(q @ k * scale)) over the last `window` positions, or those of the position's own chunk; 0: no
// window, no chunks, no cap. kept: what the cache's numbers are multiplied by.
struct Rule {
  float scale = 1, cap = 0, kept = 1;
  int window = 0, chunk = 0;
  int rope = 0;  // 0: the table that a step names; 1: the local one; -1: none
  int first(int position) const {
    if (chunk) return position / chunk * chunk;
    return window ? std::max(0, position - window + 1) : 0;
  }
};

constexpr int kMostQueries = kTall ? kTallRows : kRows;
// A chain of products, of dimensions and of tokens, as a tile of registers has it, or of all there are.
constexpr int kChainDims = kTall ? 16 : kMostHead, kColumns = kTall ? 2 : 4;
constexpr int kUnitsAtOnce = kRows > 2 ? 2 : 1;  // of keys, as many as the registers hold sums of
constexpr int kChains = kTall ? 1 : 2;  // that are summed at once: a product takes longer than to start the next

// Some queries that share a key/value head.
struct Queries {
  alignas(64) u16 words[kTall ? kTallRows * kMostHead : 1];  // [kTallRows, D], for tall ones
  Act q[kRows * kMostHead];                                  // [R, D], for others
  int position[kMostQueries];
  float sink[kMostQueries];
  float* out[kMostQueries];  // [value_size] each
};

struct Scratch {
  Array<float> scores;  // [R, length]
  Array<Act> shares;
  Array<u16> words;  // instead of them, for tall ones
  void grow(size_t n) {
    if (scores.size() < n) scores.resize(n), shares.resize(n), words.resize(kTall ? n : 0);
  }
};

// f(i, seen) for each vector of scores, which are of the positions from `begin` on; seen(x, other): x where a position is one
// of first ... last. Most vectors are seen whole.
template <class F>
EH_INLINE void by_vectors(int begin, int length, int first, int last, F&& f) {
  const int lead = std::min(length, round_up(first - begin, kLanes)), whole = std::max(lead, (last + 1 - begin) / kLanes * kLanes);
  auto some = [&](int from, int to) __attribute__((always_inline)) {
    for (int i = from; i < to; i += kLanes) {
      const I at = lanes() + (begin + i);
      f(i, [&](const V& x, float other) __attribute__((always_inline)) { return select((at >= first) & (at <= last), x, all(other)); });
    }
  };
  some(0, lead);
  for (int i = lead; i < whole; i += kLanes) f(i, [](const V& x, float) __attribute__((always_inline)) { return x; });
  some(whole, length);
}

// scores of a row -> its shares in bf16, not yet divided by their sum, which is returned. sink: a score more,
// that nothing is read at; -INFINITY for none.
template <class T>
float softmax(float* scores, T* shares, int begin, int length, int first, int last, float sink, const Rule& rule) {
  const float scale = rule.scale * rule.kept;
  V most = all(-INFINITY);
  by_vectors(begin, length, first, last, [&](int i, auto seen) {
    const V x = soft_cap(load<V>(scores + i) * scale, rule.cap);
    store(scores + i, x);
    most = larger(seen(x, -INFINITY), most);
  });
  const float top = std::fmax(largest(most), sink);
  V sums = all(0);
  by_vectors(begin, length, first, last, [&](int i, auto seen) {
    const V e = seen(exp(load<V>(scores + i) - top), 0.f);
    sums = sums + e;
    put_acts(shares + i, to_bf16(e));
  });
  return sum(sums) + std::exp(sink - top);
}

// shares @ values for C vectors of the head from column c0 on.
template <int R, int C, class Units>
void weigh(const Queries& set, const Act* shares, int length, int end, Units&& units, int head_size, int c0, const float* sums) {
  V all_of[R][C] = {};
  Sum acc[R][C] = {};
  for (int from = 0; from < end; from += kUnit) {
    if (kTall && from) {
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) all_of[r][c] = all_of[r][c] + total(acc[r][c]), acc[r][c] = Sum{};
    }
    const int u = from / kUnit, place = kUnit * head_size + c0 * kLanes * 2, count = std::min(kUnit, end - from);
    const auto* values = units(u) + place;
    const auto* soon = units(std::min(u + kUnitsAhead, (end - 1) / kUnit)) + place;
    for (int i = 0; i < count; i += 2, values += 2 * head_size, soon += 2 * head_size) {
      Pairs v[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) v[c] = pairs_at(values + c * kLanes * 2), fetch_soon(soon + c * kLanes * 2);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Pairs x = same_pair(shares + size_t(r) * length + from + i);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], v[c], x);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(set.out[r] + (c0 + c) * kLanes, (all_of[r][c] + total(acc[r][c])) / sums[r]);
}

// unit(u): the head's unit u of this sequence. value_size: of the first numbers of values, which are read.
template <int R, class Unit>
void attend(const Queries& set, Unit&& unit, int head_size, int value_size, const Rule& rule, Scratch& scratch) {
  int first = INT32_MAX, last = 0;
  for (int r = 0; r < R; ++r) {
    first = std::min(first, rule.first(set.position[r]));
    last = std::max(last, set.position[r]);
  }
  const int u0 = first / kUnit, begin = u0 * kUnit, length = (last / kUnit + 1) * kUnit - begin;
  auto units = [&](int u) { return unit(u0 + u); };
  scratch.grow(size_t(R) * length);
  float* scores = scratch.scores.data();
  Act* shares = scratch.shares.data();
  auto score = [&](int i, auto count) __attribute__((always_inline)) {  // of so many units at once, which share a query's reads
    constexpr int n = count;
    decltype(units(0)) keys[n], soon[n];
    V all_of[n][R] = {};
    for (int u = 0; u < n; ++u) {
      const int at = i / kUnit + u, ahead = at + kUnitsAhead, beyond = ahead - length / kUnit;
      keys[u] = units(at);
      soon[u] = beyond < 0 ? units(ahead) : units(std::min(beyond, at)) + kUnit * head_size;  // values come next
    }
    for (int from = 0; from < head_size; from += kChainDims) {
      Sum acc[n][kChains][R] = {};
      const int to = std::min(head_size, from + kChainDims);
      for (int d = from; d < to; d += 2 * kChains)
#pragma GCC unroll 2
        for (int chain = 0; chain < kChains; ++chain) {
          const int at = d + 2 * chain;
          Pairs k[n];
#pragma GCC unroll 2
          for (int u = 0; u < n; ++u) k[u] = pairs_at(keys[u] + at * kUnit), fetch_soon(soon[u] + at * kUnit);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            const Pairs x = same_pair(set.q + r * head_size + at);
#pragma GCC unroll 2
            for (int u = 0; u < n; ++u) acc[u][chain][r] = dot(acc[u][chain][r], k[u], x);
          }
        }
      for (int u = 0; u < n; ++u)
        for (auto& chain : acc[u])
          for (int r = 0; r < R; ++r) all_of[u][r] = all_of[u][r] + total(chain[r]);
    }
    for (int u = 0; u < n; ++u)
      for (int r = 0; r < R; ++r) store(scores + size_t(r) * length + i + u * kUnit, all_of[u][r]);
  };
  int i = 0;
  for (; i + kUnitsAtOnce * kUnit <= length; i += kUnitsAtOnce * kUnit) score(i, std::integral_constant<int, kUnitsAtOnce>());
  for (; i < length; i += kUnit) score(i, std::integral_constant<int, 1>());
  float sums[R];
  for (int r = 0; r < R; ++r) {
    const size_t row = size_t(r) * length;
    const int position = set.position[r];
    sums[r] = softmax(scores + row, shares + row, begin, length, rule.first(position), position, set.sink[r], rule) / rule.kept;
  }
  const int end = last + 1 - begin;
  for (int c = 0, left = value_size / kLanes; left > 0; c += kColumns, left -= kColumns)
    with_height<kColumns>(std::min(kColumns, left), [&](auto C) {
      weigh<R, C.value>(set, shares, length, end, units, head_size, c, sums);
    });
}

}  // namespace enginehouse
