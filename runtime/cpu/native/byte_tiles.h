// Weights of one byte, INT8 or e4m3, times rows in bf16: widened as they are read, which is exact.
//
// The same words of four weights serve activations in bytes: see tiles.h.
#pragma once

#include "bytes.h"
#include "linear.h"

namespace enginehouse {

template <int R, class T>
void widened_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.block(block);
  const u16* a = rows.values.data() + size_t(row) * rows.stride;
  const int steps = l.group / kStep;
  V y[R][2] = {};
  for (int group = 0; group < l.in / l.group; ++group) {
    const V s[2] = {l.scale(block, group, 0), l.scale(block, group, 1)};
    for (int step = 0; step < steps; ++step, a += kStep) {
      V acc[R][2] = {};
      for (int j = 0; j < kStep / 8; ++j, w += 256) {
        if (R <= kFew) prefetch(w), prefetch(w + 128);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {  // of eight inputs the pairs 0 2, 4 6, 1 3, 5 7
          const uint8_t* four = w + n % 2 * 128;
          const Pairs v0 = pairs_of<T>(load<U>(four), n / 2), v1 = pairs_of<T>(load<U>(four + 64), n / 2);
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
  }
  for (int r = 0; r < R; ++r) {
    const float by = rows.row_scales[row + r];
    finish(l, t, row + r, block * kCols, y[r][0] * by, y[r][1] * by);
  }
}

}  // namespace enginehouse
