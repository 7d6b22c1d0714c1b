// Attention of up to 16 queries at once, by tiles of registers: the same bits as attention.h gives of each; and of any
// number of queries, by either.
#pragma once

#include "amx.h"
#include "attention.h"

namespace enginehouse {

constexpr int kLeastQueries = 8;  // from which on tiles of registers are faster

#if defined(EH_AMX)

// A unit's keys or values as bf16: as they are, or widened to `room`.
inline const u16* as_words(const u16* from, int, u16*) { return from; }
template <class T>
const u16* as_words(const T* from, int count, u16* room) {
  for (int i = 0; i < count; i += 2 * kLanes) store(room + i, words(pairs_at(from + i)));
  return room;
}

// unit(u): the head's unit u of this sequence. Some of `set.words` may count for nothing: those after n.
template <class Unit>
void attend_tall(const Queries& set, int n, Unit&& unit, int head_size, int value_size, const Rule& rule, Scratch& scratch) {
  int first = INT32_MAX, last = 0;
  for (int r = 0; r < n; ++r) {
    first = std::min(first, rule.first(set.position[r]));
    last = std::max(last, set.position[r]);
  }
  const int u0 = first / kUnit, begin = u0 * kUnit, length = (last / kUnit + 1) * kUnit - begin, in_unit = kUnit * head_size;
  scratch.grow(size_t(kTallRows) * length);
  float* scores = scratch.scores.data();
  u16* shares = scratch.words.data();
  alignas(64) u16 room[kUnit * kMostHead];
  const Tiles tiles(8);
  for (int i = 0; i < length; i += kUnit) {
    const u16* keys = as_words(unit(u0 + i / kUnit), in_unit, room);
    zero_tile<0>();
    for (int d = 0; d < head_size; d += kChainDims)
      load_tile<4>(set.words + d, head_size * 2), load_tile<6>(keys + d * kUnit, 64), dot_pairs<0, 4, 6>();
    store_tile<0>(scores + i, length * 4);
  }
  float sums[kTallRows] = {};
  for (int r = 0; r < n; ++r) {
    const size_t row = size_t(r) * length;
    const int position = set.position[r];
    sums[r] = softmax(scores + row, shares + row, begin, length, rule.first(position), position, set.sink[r], rule) / rule.kept;
  }
  for (int c = 0; c < value_size; c += 4 * kLanes) {
    const int wide = std::min(4, (value_size - c) / kLanes);
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int i = 0; i < length; i += kUnit) {
      const u16* values = as_words(unit(u0 + i / kUnit) + in_unit, in_unit, room) + c * 2;
      load_tile<4>(shares + i, length * 2);
      load_tile<6>(values, head_size * 4), dot_pairs<0, 4, 6>();
      if (wide > 1) load_tile<7>(values + 32, head_size * 4), dot_pairs<1, 4, 7>();
      if (wide > 2) load_tile<6>(values + 64, head_size * 4), dot_pairs<2, 4, 6>();
      if (wide > 3) load_tile<7>(values + 96, head_size * 4), dot_pairs<3, 4, 7>();
    }
    alignas(64) V out[4][kTallRows];
    store_tile<0>(out[0], 64), store_tile<1>(out[1], 64), store_tile<2>(out[2], 64), store_tile<3>(out[3], 64);
    for (int r = 0; r < n; ++r)
      for (int i = 0; i < wide; ++i) store(set.out[r] + c + i * kLanes, out[i][r] / sums[r]);
  }
}

#else

template <class Unit>
void attend_tall(const Queries&, int, Unit&&, int, int, const Rule&, Scratch&) {}

#endif

// sink: -INFINITY for none. out: [value_size].
struct Query {
  int position;
  float sink;
  float* out;
};

// `count` queries of a head, some at a time: at(k, y) gives the k-th, and writes its [head_size] to y.
template <class Unit, class At>
void attend_each(int count, Unit&& unit, int head_size, int value_size, const Rule& rule, Scratch& scratch, At&& at) {
  float y[kMostHead];
  Queries set;
  for (int done = 0, n; done < count; done += n) {
    const bool tall = kTall && count - done >= kLeastQueries;
    n = std::min(count - done, tall ? kTallRows : kRows);
    for (int i = 0; i < n; ++i) {
      const Query query = at(done + i, y);
      for (int d = 0; d < head_size; d += kLanes) {
        const H rounded = to_bf16(load<V>(y + d));
        tall ? put_acts(set.words + i * head_size + d, rounded) : put_acts(set.q + i * head_size + d, rounded);
      }
      set.position[i] = query.position, set.sink[i] = query.sink, set.out[i] = query.out;
    }
    if (tall)
      attend_tall(set, n, unit, head_size, value_size, rule, scratch);
    else
      with_height(n, [&](auto R) { attend<R.value>(set, unit, head_size, value_size, rule, scratch); });
  }
}

}  // namespace enginehouse
