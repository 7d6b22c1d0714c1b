// Products of 16 rows at once, by tiles of registers: the same bits as tiles.h gives of each row.
//
// A block's weights are widened once, then all rows are taken past them.
#pragma once

#include <algorithm>

#include "amx.h"
#include "linear.h"
#include "widened_tiles.h"

namespace enginehouse {

#if defined(EH_AMX)

// A block's nibbles or bytes -> pairs of bf16, as a block of Form::bf16 has them.
template <class Words>
void unpack(const uint8_t* w, int in, uint8_t* to) {
  const Words of;
  for (int eight = 0; eight < in / 8; ++eight, w += Words::kBytes)
    for (int n = 0; n < 4; ++n, to += 128) store(to, words(of.at(w, 0, n))), store(to + 64, words(of.at(w, 1, n)));
}

// w: pairs of bf16. `count` rows of T times kTallRows.
template <int T>
void tall_tile(const Linear& l, int block, const uint8_t* w, const Rows& rows, int row, int count, const Target& t) {
  constexpr long kRowBytes = kStep * sizeof(u16);
  const int groups = l.form == Form::bf16 ? 1 : l.in / l.group;
  V y[2][T * kTallRows] = {};
  for (int group = 0, chain = 0; group < groups; ++group) {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (const int end = (group + 1) * (l.in / groups) / kChain; chain < end; ++chain, w += kChain * kCols * sizeof(u16)) {
      const u16* a = rows.words_of(chain, row);
      load_tile<4>(a, kRowBytes), load_tile<6>(w, 128), load_tile<7>(w + 64, 128);
      dot_pairs<0, 4, 6>(), dot_pairs<1, 4, 7>();
      if (T == 2) load_tile<5>(a + kTallRows * kStep, kRowBytes), dot_pairs<2, 5, 6>(), dot_pairs<3, 5, 7>();
    }
    alignas(64) V sums[2][T * kTallRows];
    store_tile<0>(sums[0], 64), store_tile<1>(sums[1], 64);
    if (T == 2) store_tile<2>(sums[0] + kTallRows, 64), store_tile<3>(sums[1] + kTallRows, 64);
    for (int half = 0; half < 2; ++half) {
      const V s = l.form == Form::bf16 ? all(1) : l.scale(block, group, half);
#pragma GCC unroll 4
      for (int r = 0; r < T * kTallRows; ++r) y[half][r] = fma(sums[half][r], s, y[half][r]);
      add_zeros<T * kTallRows>(l, block, group, half, rows, row, y[half]);
    }
  }
  for (int r = 0; r < count; ++r) {
    const float by = l.form == Form::bf16 ? 1.f : rows.row_scales[row + r];
    y[0][r] = y[0][r] * by, y[1][r] = y[1][r] * by;
  }
  finish(l, t, row, block, y, count);
}

// Whether so many rows are multiplied here. Bytes are not: a part's sums are scaled by themselves, and
// that takes as long as to multiply them.
inline bool is_tall(const Linear& l, int rows = kTallRows) { return !part_of(l.input) && rows >= 8; }

// All of `count` rows by one block, which is unpacked to a room of the thread's own.
inline void tall_block(Pool& pool, int thread, const Linear& l, int block, const Rows& rows, int row, int count, const Target& t) {
  uint8_t* const room = pool.room(thread, l.form == Form::bf16 ? 0 : size_t(l.in) * kCols * sizeof(u16));
  const uint8_t* packed = l.block(block);
  const uint8_t* w = l.form == Form::bf16 ? packed : room;
  switch (l.form) {
    case Form::bf16: break;
    case Form::int4: unpack<Words4>(packed, l.in, room); break;
    case Form::int8: unpack<Words8<Int8>>(packed, l.in, room); break;
    case Form::e4m3: unpack<Words8<E4m3>>(packed, l.in, room); break;
  }
  const Tiles tiles(kChain / 2);
  for (int done = 0, left; (left = count - done) > 0; done += 2 * kTallRows) {
    fetch_target(t, block, row + done, std::min(left, 2 * kTallRows));
    if (left <= kTallRows)
      tall_tile<1>(l, block, w, rows, row + done, left, t);
    else
      tall_tile<2>(l, block, w, rows, row + done, std::min(left, 2 * kTallRows), t);
  }
}

#else

inline bool is_tall(const Linear&, int = 0) { return false; }
inline void tall_block(Pool&, int, const Linear&, int, const Rows&, int, int, const Target&) {}

#endif

}  // namespace enginehouse
