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

// y += zeros * the sum of the inputs, for the steps of one group. y: of R rows the half of a block's outputs.
template <int R>
EH_INLINE void add_zeros(const Linear& l, int block, int group, int half, const Rows& rows, int row, V (&y)[R]) {
  if (!l.zeros) return;
  const V z = l.zero(block, group, half);
  const int steps = l.group / kStep;
  for (int step = group * steps; step < (group + 1) * steps; ++step)
    for (int r = 0; r < R; ++r) y[r] = fma(all(rows.sums[rows.of_step(step, row + r)]), z, y[r]);
}

template <int R, class Words>
void widened_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.block(block);
  const Words words;
  const int groups = l.in / l.group, chains_of_group = l.group / kChain;
  V y[2][R];
  clear(y);
  for (int group = 0, chain = 0; group < groups; ++group) {
    const V s[2] = {l.scale(block, group, 0), l.scale(block, group, 1)};
    V sums[2][R] = {};  // as tiles of registers sum them
    for (const int end = chain + chains_of_group; chain < end; ++chain) {
      const Act* a = rows.chain(chain, row);
      Sum acc[2][R] = {};
      if (R > 5) keep_in_memory(y);
      for (int j = 0; j < kChain / 8; ++j, w += Words::kBytes) {
        for (int line = 0; R <= kFew && line < Words::kBytes; line += 128) prefetch(w + line);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const Pairs v0 = words.at(w, 0, n), v1 = words.at(w, 1, n);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const Pairs x = same_pair(a + r * kStep + j * 8 + n * 2);
            acc[0][r] = dot(acc[0][r], v0, x);
            acc[1][r] = dot(acc[1][r], v1, x);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half) {
          const V of_chain = total(acc[half][r]);
          if (kTall)
            sums[half][r] = sums[half][r] + of_chain;
          else
            y[half][r] = fma(of_chain, s[half], y[half][r]);
        }
    }
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; kTall && r < R; ++r) y[half][r] = fma(sums[half][r], s[half], y[half][r]);
      add_zeros<R>(l, block, group, half, rows, row, y[half]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const float by = rows.row_scales[row + r];
    y[0][r] = y[0][r] * by, y[1][r] = y[1][r] * by;
  }
  finish(l, t, row, block, y);
}

}  // namespace enginehouse
