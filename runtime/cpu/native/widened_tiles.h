// Weights of four bits or one byte times rows in bf16: widened as they are read, which is exact.
//
// The same words serve activations in bytes: see tiles.h.
#pragma once

#include "bytes.h"
#include "linear.h"

namespace enginehouse {

// How eight inputs of a block stand, in kBytes: at(w, half, n) gives the n-th of the pairs 0 2, 4 6, 1 3, 5 7.
struct Words4 {
  static constexpr int kBytes = 128;
  Nibbles nibbles;
  EH_INLINE Pairs at(const uint8_t* w, int half, int n) const { return nibbles(load<U>(w + half * 64), n); }
};
template <class T>
struct Words8 {
  static constexpr int kBytes = 256;
  EH_INLINE Pairs at(const uint8_t* w, int half, int n) const {
    return pairs_of<T>(load<U>(w + n % 2 * 128 + half * 64), n / 2);
  }
};

// y += zeros * the sum of the inputs, for the steps of one group.
template <int R>
EH_INLINE void add_zeros(const Linear& l, int block, int group, const Rows& rows, int row, V (&y)[R][2]) {
  if (!l.zeros) return;
  const V z[2] = {l.zero(block, group, 0), l.zero(block, group, 1)};
  const int steps = l.group / kStep, steps_a_row = rows.stride / kStep;
  for (int r = 0; r < R; ++r)
    for (int step = group * steps; step < (group + 1) * steps; ++step) {
      const V x = all(rows.sums[size_t(row + r) * steps_a_row + step]);
      y[r][0] = fma(x, z[0], y[r][0]), y[r][1] = fma(x, z[1], y[r][1]);
    }
}

template <int R, class Words>
void widened_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.block(block);
  const u16* a = rows.values.data() + size_t(row) * rows.stride;
  const int steps = l.group / kStep;
  const Words words;
  V y[R][2] = {};
  for (int group = 0; group < l.in / l.group; ++group) {
    const V s[2] = {l.scale(block, group, 0), l.scale(block, group, 1)};
    for (int step = 0; step < steps; ++step, a += kStep) {
      V acc[R][2] = {};
      for (int j = 0; j < kStep / 8; ++j, w += Words::kBytes) {
        for (int line = 0; R <= kFew && line < Words::kBytes; line += 128) prefetch(w + line);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const Pairs v0 = words.at(w, 0, n), v1 = words.at(w, 1, n);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            const Pairs x = same_pair(pair_at(a + size_t(r) * rows.stride + j * 8 + n * 2));
            acc[r][0] = dot(acc[r][0], v0, x);
            acc[r][1] = dot(acc[r][1], v1, x);
          }
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) y[r][0] = fma(acc[r][0], s[0], y[r][0]), y[r][1] = fma(acc[r][1], s[1], y[r][1]);
    }
    add_zeros<R>(l, block, group, rows, row, y);
  }
  for (int r = 0; r < R; ++r) {
    const float by = rows.row_scales[row + r];
    finish(l, t, row + r, block * kCols, y[r][0] * by, y[r][1] * by);
  }
}

}  // namespace enginehouse
