// Register tiles: a block of 32 outputs times up to kRows rows.
//
// A sum runs over steps of 64 inputs, each summed from zero and then added: the same order for every
// height of a tile, so that a row's result does not depend on the rows beside it.
#pragma once

#include "linear.h"

namespace enginehouse {

constexpr int kFew = 2;  // rows up to which a tile waits for memory, not for arithmetic

EH_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p + 4096, 0, 3), __builtin_prefetch(p + 4160, 0, 3); }

// y += scales * acc + zeros * the sum of the inputs, for one step of a block.
template <int R>
EH_INLINE void add_step(const Linear& l, int block, int step, const Rows& rows, int row, const V (&acc)[R][2], V (&y)[R][2]) {
  const float* sums = rows.sums.data() + size_t(row) * (rows.stride / kStep) + step;
  for (int half = 0; half < 2; ++half) {
    const V s = l.scale(block, step, half);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) y[r][half] = fma(acc[r][half], s, y[r][half]);
    if (!l.zeros) continue;
    const V z = l.zero(block, step, half);
    for (int r = 0; r < R; ++r) y[r][half] = fma(all(sums[size_t(r) * (rows.stride / kStep)]), z, y[r][half]);
  }
}

template <int R>
void int4_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.block(block);
  const u16* a = rows.values.data() + size_t(row) * rows.stride;
  const Nibbles nibbles;
  V y[R][2] = {};
  for (int step = 0; step < l.in / kStep; ++step, a += kStep) {
    V acc[R][2] = {};
    for (int j = 0; j < kStep / 8; ++j, w += 128) {
      const U w0 = load<U>(w), w1 = load<U>(w + 64);
      if (R <= kFew) prefetch(w);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const Pairs v0 = nibbles(w0, n), v1 = nibbles(w1, n);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const Pairs x = same_pair(pair_at(a + size_t(r) * rows.stride + j * 8 + n * 2));
          acc[r][0] = dot(acc[r][0], v0, x);
          acc[r][1] = dot(acc[r][1], v1, x);
        }
      }
    }
    add_step<R>(l, block, step, rows, row, acc, y);
  }
  for (int r = 0; r < R; ++r) finish(l, t, row + r, block * kCols, y[r][0], y[r][1]);
}

template <int R>
void bf16_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.block(block);
  const u16* a = rows.values.data() + size_t(row) * rows.stride;
  V y[R][2] = {};
  for (int step = 0; step < l.in / kStep; ++step, a += kStep) {
    V acc[R][2] = {};
#pragma GCC unroll 4
    for (int j = 0; j < kStep / 2; ++j, w += 128) {
      const Pairs w0 = pairs(load<U>(w)), w1 = pairs(load<U>(w + 64));
      if (R <= kFew) prefetch(w);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Pairs x = same_pair(pair_at(a + size_t(r) * rows.stride + j * 2));
        acc[r][0] = dot(acc[r][0], w0, x);
        acc[r][1] = dot(acc[r][1], w1, x);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) y[r][0] = y[r][0] + acc[r][0], y[r][1] = y[r][1] + acc[r][1];
  }
  for (int r = 0; r < R; ++r) finish(l, t, row + r, block * kCols, y[r][0], y[r][1]);
}

// Sums of bytes times bytes, exact, over one part of a block: R rows, two vectors.
template <int R>
struct Counted {
  I acc[R][2] = {}, more[R][2] = {}, weights[2] = {};  // more: a second chain, for few rows

  // w0, w1: of each output four weights, unsigned; a: the row's four bytes that they are multiplied by.
  EH_INLINE void add(const U& w0, const U& w1, const int8_t* a, int stride, bool second) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const u32 x = four_at(a + size_t(r) * stride);
      I(&to)[2] = R <= kFew && second ? more[r] : acc[r];
      to[0] = dot4(to[0], w0, x);
      to[1] = dot4(to[1], w1, x);
    }
    if (R <= kFew) weights[0] = dot4(weights[0], w0, 0x01010101u), weights[1] = dot4(weights[1], w1, 0x01010101u);
  }
};

// Weights are stored without a sign: less `Less` each. acc += what a part gives, by the activations' scales.
template <int R, int Less>
EH_INLINE void add_part(const Linear& l, int block, int part, const Part* parts, int parts_a_row, Counted<R>& c, V (&acc)[R][2]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    V weights;
    if (R <= kFew) {  // counted on the way, which costs less than to read it
      weights = __builtin_convertvector(c.weights[half] - Less * kPart, V);
    } else {
      const int16_t* counts = l.counts + (size_t(block) * (l.in / kPart) + part) * kCols + half * kLanes;
      weights = __builtin_convertvector(load<S>(counts), V);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Part& p = parts[size_t(r) * parts_a_row];
      I sum = c.acc[r][half] - Less * p.count;
      if (R <= kFew) sum = sum + c.more[r][half];
      acc[r][half] = fma(fma(all(p.center), weights, __builtin_convertvector(sum, V)), all(p.scale), acc[r][half]);
    }
  }
}

// Form::int4 or Form::int8, activations as bytes.
template <int R, Form F>
void bytes_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.block(block);
  const int8_t* a = rows.bytes.data() + size_t(row) * rows.stride;
  const int parts_a_row = rows.stride / kPart;
  const Part* parts = rows.parts.data() + size_t(row) * parts_a_row;
  V y[R][2] = {};
  for (int step = 0; step < l.in / kStep; ++step) {
    V acc[R][2] = {};
    for (int part = step * 2; part < step * 2 + 2; ++part, a += kPart) {
      Counted<R> c;
      if constexpr (F == Form::int4) {
#pragma GCC unroll 4
        for (int j = 0; j < kPart; j += 8, w += 128) {
          const U w0 = load<U>(w), w1 = load<U>(w + 64);
          if (R <= kFew) prefetch(w);
          c.add(w0 & 0x0f0f0f0fu, w1 & 0x0f0f0f0fu, a + j, rows.stride, false);
          c.add((w0 >> 4) & 0x0f0f0f0fu, (w1 >> 4) & 0x0f0f0f0fu, a + j + 4, rows.stride, true);
        }
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < kPart; j += 4, w += 128) {
          if (R <= kFew) prefetch(w);
          c.add(load<U>(w), load<U>(w + 64), a + j, rows.stride, j % 8);
        }
      }
      add_part<R, F == Form::int4 ? 8 : 128>(l, block, part, parts + part, parts_a_row, c, acc);
    }
    add_step<R>(l, block, step, rows, row, acc, y);
  }
  for (int r = 0; r < R; ++r) finish(l, t, row + r, block * kCols, y[r][0], y[r][1]);
}

template <int R>
void tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  if (l.form == Form::bf16)
    bf16_tile<R>(l, block, rows, row, t);
  else if (l.form == Form::int8)
    bytes_tile<R, Form::int8>(l, block, rows, row, t);
  else if (l.as_bytes)
    bytes_tile<R, Form::int4>(l, block, rows, row, t);
  else
    int4_tile<R>(l, block, rows, row, t);
}

inline void product(Pool& pool, const Linear& l, const Rows& rows, int n, const Target& t) {
  assert(rows.stride == l.in);
  const int blocks = l.out / kCols, tiles = (n + kRows - 1) / kRows;
  const int items = std::min(blocks, (n <= 8 ? 3 : 8) * pool.size());
  pool.run(items, [&](int item) {
    const int end = int(int64_t(blocks) * (item + 1) / items);
    for (int b = int(int64_t(blocks) * item / items); b < end; ++b)
      for (int i = 0, row = 0; i < tiles; ++i) {  // tiles of like height
        const int height = (n - row) / (tiles - i);
        with_height(height, [&](auto R) { tile<R.value>(l, b, rows, row, t); });
        row += height;
      }
  });
}

}  // namespace enginehouse
