// Register tiles: a block of 32 outputs times up to kRows rows.
//
// A sum runs over chains of inputs, each summed from zero and then added: the same order for every
// height of a tile, so that a row's result does not depend on the rows beside it.
#pragma once

#include "linear.h"
#include "tall_tiles.h"
#include "widened_tiles.h"

namespace enginehouse {

template <int R>
void bf16_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.block(block);
  V y[R][2] = {};
  for (int chain = 0; chain < l.in / kChain; ++chain) {
    const Act* a = rows.chain(chain, row);
    Sum acc[R][2] = {};
#pragma GCC unroll 4
    for (int j = 0; j < kChain / 2; ++j, w += 128) {
      const Pairs w0 = pairs(load<U>(w)), w1 = pairs(load<U>(w + 64));
      if (R <= kFew) prefetch(w);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Pairs x = same_pair(a + r * kStep + j * 2);
        acc[r][0] = dot(acc[r][0], w0, x);
        acc[r][1] = dot(acc[r][1], w1, x);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) y[r][0] = y[r][0] + total(acc[r][0]), y[r][1] = y[r][1] + total(acc[r][1]);
  }
  for (int r = 0; r < R; ++r) finish(l, t, row + r, block * kCols, y[r][0], y[r][1]);
}

// Form::int4 or Form::int8, activations as bytes: sums of each part are exact, in whole numbers.
// Weights stand without a sign, `Less` above what they are.
template <int R, Form F>
void bytes_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  constexpr int Less = F == Form::int4 ? 8 : 128;
  constexpr bool few = R <= kFew;
  constexpr auto multiply = F == Form::int4 ? dot4_of_nibbles : dot4;
  const uint8_t* w = l.block(block);
  const int parts = l.in / kPart;
  const int16_t* weights = l.counts + size_t(block) * parts * kCols;
  V y[2][R] = {};
  for (int group = 0, part = 0; group < l.in / l.group; ++group) {
    const V s[2] = {l.scale(block, group, 0), l.scale(block, group, 1)};
    for (const int end = (group + 1) * l.group / kPart; part < end; ++part) {
      const int8_t* a = rows.part(part, row);
      const size_t first = rows.of_part(part, row);
      const float *scales = &rows.scales[first], *centers = &rows.centers[first];
      const int32_t* counts = &rows.counts[first];
      I acc[R][2], more[R][2] = {}, counted[2] = {};  // more: a second chain, for few rows
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = I{} - Less * counts[r * parts];
      // w0, w1: of each output four weights; at: the input that the first of them is multiplied by.
      auto add = [&](const U& w0, const U& w1, int at, I(&to)[R][2]) __attribute__((always_inline)) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const u32 x = four_at(a + r * kStep + at);
          to[r][0] = multiply(to[r][0], w0, x);
          to[r][1] = multiply(to[r][1], w1, x);
        }
        if (few) counted[0] = multiply(counted[0], w0, 0x01010101u), counted[1] = multiply(counted[1], w1, 0x01010101u);
      };
#pragma GCC unroll 4
      for (int at = 0; at < kPart; at += 8) {
        const U w0 = load<U>(w), w1 = load<U>(w + 64);
        w += 128;
        if (few) prefetch(w);
        if constexpr (F == Form::int4) {
          add(w0 & 0x0f0f0f0fu, w1 & 0x0f0f0f0fu, at, acc);
          add((w0 >> 4) & 0x0f0f0f0fu, (w1 >> 4) & 0x0f0f0f0fu, at + 4, few ? more : acc);
        } else {
          add(w0, w1, at, acc);
          add(load<U>(w), load<U>(w + 64), at + 4, few ? more : acc);
          w += 128;
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        // Few rows count the weights on their way, which costs less than to read their counts.
        const V sum = few ? floats(counted[half] - Less * kPart) : floats(load<S>(weights + size_t(part) * kCols + half * kLanes));
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const V x = fma(all(centers[r * parts]), sum, floats(few ? acc[r][half] + more[r][half] : acc[r][half]));
          y[half][r] = fma(x, s[half] * scales[r * parts], y[half][r]);
        }
      }
    }
    for (int half = 0; half < 2; ++half) add_zeros<R>(l, block, group, half, rows, row, y[half]);
  }
  for (int r = 0; r < R; ++r) finish(l, t, row + r, block * kCols, y[0][r], y[1][r]);
}

template <int R>
void tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  fetch_target(t, block, row, R);
  const bool bytes = l.input == Input::bytes;
  switch (l.form) {
    case Form::bf16: bf16_tile<R>(l, block, rows, row, t); break;
    case Form::int4: bytes ? bytes_tile<R, Form::int4>(l, block, rows, row, t) : widened_tile<R, Words4>(l, block, rows, row, t); break;
    case Form::int8: bytes ? bytes_tile<R, Form::int8>(l, block, rows, row, t) : widened_tile<R, Words8<Int8>>(l, block, rows, row, t); break;
    case Form::e4m3: widened_tile<R, Words8<E4m3>>(l, block, rows, row, t); break;
  }
}

// `count` rows from `row` on, of the input and of the target.
struct Run {
  const Linear* linear;
  int row, count;
};

// at(i): the i-th of `runs`, whose linears are of one size.
template <class At>
void product(Pool& pool, int runs, const Rows& rows, const Target& t, At&& at) {
  const Run first = at(0);
  assert(rows.in == first.linear->in);
  const int blocks = first.linear->out / kCols, all_blocks = runs * blocks;
  const int items = std::min(all_blocks, (runs == 1 && first.count <= 8 ? 3 : 8) * pool.size());
  pool.run(items, [&](int item, int thread) {
    const int end = int(int64_t(all_blocks) * (item + 1) / items);
    for (int b = int(int64_t(all_blocks) * item / items); b < end; ++b) {
      const Run run = at(b / blocks);
      if (is_tall(*run.linear, run.count)) {
        tall_block(pool, thread, *run.linear, b % blocks, rows, run.row, run.count, t);
        continue;
      }
      const int tiles = (run.count + kRows - 1) / kRows;
      for (int i = 0, done = 0; i < tiles; ++i) {  // tiles of like height
        const int height = (run.count - done) / (tiles - i);
        with_height(height, [&](auto R) { tile<R.value>(*run.linear, b % blocks, rows, run.row + done, t); });
        done += height;
      }
    }
  });
}

inline void product(Pool& pool, const Linear& l, const Rows& rows, int n, const Target& t) {
  product(pool, 1, rows, t, [&](int) { return Run{&l, 0, n}; });
}

}  // namespace enginehouse
