// Register tiles: a block of 32 outputs times up to kWordRows rows, or kByteRows.
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
  V y[2][R];
  clear(y);
  for (int chain = 0; chain < l.in / kChain; ++chain) {
    const Act* a = rows.chain(chain, row);
    Sum acc[R][2] = {};
    if (R > 5) keep_in_memory(y);
#pragma GCC unroll 4
    for (int j = 0; j < kChain / 2; ++j, w += 128) {
      const Pairs w0 = pairs(load<U>(w)), w1 = pairs(load<U>(w + 64));
      prefetch(w);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Pairs x = same_pair(a + r * kStep + j * 2);
        acc[r][0] = dot(acc[r][0], w0, x);
        acc[r][1] = dot(acc[r][1], w1, x);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) y[0][r] = y[0][r] + total(acc[r][0]), y[1][r] = y[1][r] + total(acc[r][1]);
  }
  finish(l, t, row, block, y);
}

// Form::int4 or Form::int8, activations as bytes: sums of each part are exact, in whole numbers.
// Weights stand without a sign, `Less` above what they are.
template <int R, Form F, int Part>
void bytes_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  constexpr int Less = F == Form::int4 ? 8 : 128;
  constexpr bool few = R <= kFew;
  constexpr auto multiply = F == Form::int4 ? dot4_of_nibbles : dot4;
  constexpr bool narrow = F == Form::int4 && kNarrowDots > 0;
  constexpr int Span = narrow ? std::min(Part, 4 * kNarrowDots * (few ? 2 : 1)) : Part;  // inputs whose sums stay narrow
  static_assert(!few || Span == Part);
  auto wide = [](const I& sums) __attribute__((always_inline)) { return narrow ? widened_sums(sums) : sums; };
  const uint8_t* w = l.block(block);
  const int parts = l.in / Part, groups = l.in / l.group, parts_of_group = l.group / Part;
  V y[2][R];
  clear(y);
  for (int group = 0, part = 0; group < groups; ++group) {
    const V s[2] = {l.scale(block, group, 0), l.scale(block, group, 1)};
    for (const int end = part + parts_of_group; part < end; ++part) {
      const int8_t* a = rows.part<Part>(part, row);
      const float* scales = &rows.scales[rows.of_part<Part>(part, row)];
      const u32* offsets = &rows.offsets[rows.of_part<Part>(part, row)];
      I acc[R][2] = {}, more[R][2] = {}, counted[2] = {};  // more: a second chain, for few rows
      if (R > 5) keep_in_memory(y);
      // Few rows count the weights on their way, which costs less than to read their counts.
      if (!few) {
        const U counts[2] = {l.counts_above(-Less, block, parts, part, 0), l.counts_above(-Less, block, parts, part, 1)};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][0] = dot2(counts[0], offsets[r * parts]), acc[r][1] = dot2(counts[1], offsets[r * parts]);
      }
      // w0, w1: of each output four weights; at: the input that the first of them is multiplied by.
      auto add = [&](const U& w0, const U& w1, int at, I(&to)[R][2]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const u32 x = four_at(a + r * kStep + at);
          to[r][0] = multiply(to[r][0], w0, x);
          to[r][1] = multiply(to[r][1], w1, x);
        }
        if (few) counted[0] = multiply(counted[0], w0, 0x01010101u), counted[1] = multiply(counted[1], w1, 0x01010101u);
      };
      auto add_span = [&](int from, I(&to)[R][2], I(&other)[R][2]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int at = from; at < from + Span; at += 8) {
          const U w0 = load<U>(w), w1 = load<U>(w + 64);
          w += 128;
          prefetch(w);
          if constexpr (F == Form::int4) {
            add(w0 & 0x0f0f0f0fu, w1 & 0x0f0f0f0fu, at, to);
            add((w0 >> 4) & 0x0f0f0f0fu, (w1 >> 4) & 0x0f0f0f0fu, at + 4, other);
          } else {
            add(w0, w1, at, to);
            add(load<U>(w), load<U>(w + 64), at + 4, other);
            w += 128;
            prefetch(w);
          }
        }
      };
      for (int from = 0; from < Part; from += Span) {
        if constexpr (few) {
          add_span(from, acc, more);
        } else if constexpr (narrow) {
          I near[R][2] = {};
          add_span(from, near, near);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) acc[r][0] = acc[r][0] + wide(near[r][0]), acc[r][1] = acc[r][1] + wide(near[r][1]);
        } else {
          add_span(from, acc, acc);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const u32 offset = offsets[r * parts];
        const int center = int16_t(offset), count = int16_t(offset >> 16);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          if (few)
            acc[r][half] = wide(acc[r][half]) + wide(more[r][half]) + (wide(counted[half]) - Less * Part) * center - Less * count;
          y[half][r] = fma(floats(acc[r][half]), s[half] * scales[r * parts], y[half][r]);
        }
      }
    }
    for (int half = 0; half < 2; ++half) add_zeros<R>(l, block, group, half, rows, row, y[half]);
  }
  finish(l, t, row, block, y);
}

// Rows in bf16.
template <int R>
void words_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  switch (l.form) {
    case Form::bf16: bf16_tile<R>(l, block, rows, row, t); break;
    case Form::int4: widened_tile<R, Words4>(l, block, rows, row, t); break;
    case Form::int8: widened_tile<R, Words8<Int8>>(l, block, rows, row, t); break;
    case Form::e4m3: widened_tile<R, Words8<E4m3>>(l, block, rows, row, t); break;
  }
}

// `count` rows from `row` on, by tiles of like height.
template <int Most, class F>
void in_tiles(int row, int count, F&& f) {
  for (int left = (count + Most - 1) / Most; left > 0; --left) {
    const int height = count / left;
    with_height<Most>(height, [&](auto R) { f(R, row); });
    row += height, count -= height;
  }
}

// `count` rows by one block.
template <Form F, int Part>
void bytes_block(const Linear& l, int block, const Rows& rows, int row, int count, const Target& t) {
  in_tiles<kByteRows>(row, count, [&](auto R, int from) {
    fetch_target(t, block, from, R.value);
    bytes_tile<R.value, F, Part>(l, block, rows, from, t);
  });
}
inline void block_product(const Linear& l, int block, const Rows& rows, int row, int count, const Target& t) {
  const bool nibbles = l.form == Form::int4;
  switch (l.input) {
    case Input::bytes: return (nibbles ? bytes_block<Form::int4, 64> : bytes_block<Form::int8, 64>)(l, block, rows, row, count, t);
    case Input::fine_bytes: return (nibbles ? bytes_block<Form::int4, 32> : bytes_block<Form::int8, 32>)(l, block, rows, row, count, t);
    default: break;
  }
  in_tiles<kWordRows>(row, count, [&](auto R, int from) {
    fetch_target(t, block, from, R.value);
    words_tile<R.value>(l, block, rows, from, t);
  });
}

// `count` rows from `row` on, of the input and of the target.
struct Run {
  const Linear* linear;
  int row, count;
};

constexpr int kPanel = 16;  // rows that stay in a cache while blocks are taken past them

// at(i): the i-th of `runs`, whose linears are of one size. Items are some blocks of one run by a panel, or
// by all rows, where there are several runs or blocks are tall.
template <class At>
void product(Pool& pool, int runs, const Rows& rows, const Target& t, At&& at) {
  const Run first = at(0);
  assert(rows.in == first.linear->in);
  const int blocks = first.linear->out / kCols, all_blocks = runs * blocks;
  const int panels = runs > 1 || is_tall(*first.linear, first.count) ? 1 : (first.count + kPanel - 1) / kPanel;
  const int wanted = (runs == 1 && first.count <= 8 ? 3 : 8) * pool.size();
  const int shares = std::min(all_blocks, std::max(2, wanted / panels));
  pool.run(panels * shares, [&](int item, int thread) {
    const int share = item % shares, end = int(int64_t(all_blocks) * (share + 1) / shares);
    for (int b = int(int64_t(all_blocks) * share / shares), next; b < end; b = next) {
      const Run run = at(b / blocks);
      next = std::min(end, (b / blocks + 1) * blocks);
      const bool tall = is_tall(*run.linear, run.count);
      const int panel = tall ? run.count : kPanel, from = item / shares * panel;
      const int to = panels > 1 ? std::min(from + panel, run.count) : run.count;
      for (int row = from; row < to; row += panel)
        for (int i = b; i < next; ++i) {
          const int count = std::min(panel, to - row);
          if (tall)
            tall_block(pool, thread, *run.linear, i % blocks, rows, run.row + row, count, t);
          else
            block_product(*run.linear, i % blocks, rows, run.row + row, count, t);
        }
    }
    if (t.far) done_writing();
  });
}

inline void product(Pool& pool, const Linear& l, const Rows& rows, int n, const Target& t) {
  product(pool, 1, rows, t, [&](int) { return Run{&l, 0, n}; });
}

// On the thread that calls.
inline void product(const Linear& l, const Rows& rows, int n, const Target& t) {
  assert(rows.in == l.in);
  for (int block = 0; block < l.out / kCols; ++block) block_product(l, block, rows, 0, n, t);
}

}  // namespace enginehouse
