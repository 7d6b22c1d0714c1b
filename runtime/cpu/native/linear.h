// Products: weights packed in blocks of 32 outputs, times rows of bf16 activations.
//
// A sum runs over steps of 64 inputs, each summed from zero and then added: the same order for every
// height of a tile, so that a row's result does not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cassert>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "vectors.h"

namespace enginehouse {

constexpr int kStep = 64;  // inputs of one partial sum
constexpr int kCols = 32;  // outputs of one block: two vectors
#if defined(__AVX512F__)
constexpr int kRows = 6;  // rows of one register tile: as many as the registers hold
#else
constexpr int kRows = 2;
#endif

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The input of a product: bf16 rows, padded with zeros to whole steps.
struct Rows {
  std::vector<u16> values;  // [rows, stride]
  std::vector<float> sums;  // [rows, stride / 64]: of each step's values, for zero points
  int stride = 0;

  void grow(int rows, int widest) {
    const size_t wide = round_up(widest, kStep);
    values.resize(rows * wide);
    sums.resize(rows * wide / kStep);
  }
  // From here on a row has `in` inputs.
  void widen(int in) { stride = round_up(in, kStep); }
  // x: [in] times factor (may be null) times weight (may be null) times `by`. in: of kLanes.
  void put(int row, const float* x, const float* weight, const float* factor, float by, int in) {
    u16* out = values.data() + size_t(row) * stride;
    float* step_sums = sums.data() + size_t(row) * (stride / kStep);
    for (int at = 0; at < stride; at += kStep) {
      V total = all(0);
      for (int i = at; i < at + kStep; i += kLanes) {
        V v = all(0);
        if (i < in) {
          v = load<V>(x + i) * by;
          if (weight) v = v * load<V>(weight + i);
          if (factor) v = v * load<V>(factor + i);
        }
        const H rounded = to_bf16(v);
        store(out + i, rounded);
        total = total + widened(rounded);
      }
      step_sums[at / kStep] = sum(total);
    }
  }
};

enum class End { store, silu, gelu };

struct Target {
  float* y;    // [rows, stride]
  int stride;
  int width;   // outputs that are stored; what a block holds beyond them is padding
  End end = End::store;
};

// in: of whole steps, out: of whole blocks. A block: per step, [in / 8][2][16] words of eight nibbles,
// or [in / 2][2][16] words of two bf16.
struct Linear {
  int in = 0, out = 0, group = 0;  // group: inputs that share a scale; 0 for bf16
  const uint8_t* weights = nullptr;
  const float* scales = nullptr;  // [out / 32][groups][32]
  const float* zeros = nullptr;   // the same, or null
  const float* bias = nullptr;    // [out] or null
  const float* factor = nullptr;  // [in] or null: what the input is multiplied by

  size_t block_bytes() const { return size_t(in) * kCols * (group ? 1 : 4) / 2; }
};

inline void finish(const Linear& l, const Target& t, int row, int col, V a, V b) {
  if (l.bias) a = a + load<V>(l.bias + col), b = b + load<V>(l.bias + col + kLanes);
  float* y = t.y + size_t(row) * t.stride;
  if (t.end != End::store) {  // gate and up take turns of 16 outputs
    store(y + col / 2, (t.end == End::silu ? silu(a) : gelu(a)) * b);
    return;
  }
  for (int half = 0; half < 2; ++half) {
    const int at = col + half * kLanes, count = std::min(kLanes, t.width - at);
    const V& v = half ? b : a;
    if (count > 0) memcpy(y + at, &v, size_t(count) * sizeof(float));
  }
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

template <int R>
void int4_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.weights + block * l.block_bytes();
  const int groups = l.in / l.group, steps_a_group = l.group / kStep;
  const float* scales = l.scales + size_t(block) * groups * kCols;
  const float* zeros = l.zeros ? l.zeros + size_t(block) * groups * kCols : nullptr;
  const u16* a = rows.values.data() + size_t(row) * rows.stride;
  const float* sums = rows.sums.data() + size_t(row) * (rows.stride / kStep);
  const Nibbles nibbles;
  V y[R][2] = {};
  for (int step = 0; step < l.in / kStep; ++step, a += kStep) {
    V acc[R][2] = {};
    for (int j = 0; j < kStep / 8; ++j, w += 128) {
      const U w0 = load<U>(w), w1 = load<U>(w + 64);
      if (R <= 2) prefetch(w + 4096), prefetch(w + 4160);
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
    const size_t at = size_t(step / steps_a_group) * kCols;
    for (int h = 0; h < 2; ++h) {
      const V s = load<V>(scales + at + h * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) y[r][h] = fma(acc[r][h], s, y[r][h]);
      if (!zeros) continue;
      const V z = load<V>(zeros + at + h * kLanes);
      for (int r = 0; r < R; ++r)
        y[r][h] = fma(all(sums[size_t(r) * (rows.stride / kStep) + step]), z, y[r][h]);
    }
  }
  for (int r = 0; r < R; ++r) finish(l, t, row + r, block * kCols, y[r][0], y[r][1]);
}

template <int R>
void bf16_tile(const Linear& l, int block, const Rows& rows, int row, const Target& t) {
  const uint8_t* w = l.weights + block * l.block_bytes();
  const u16* a = rows.values.data() + size_t(row) * rows.stride;
  V y[R][2] = {};
  for (int step = 0; step < l.in / kStep; ++step, a += kStep) {
    V acc[R][2] = {};
#pragma GCC unroll 4
    for (int j = 0; j < kStep / 2; ++j, w += 128) {
      const Pairs w0 = pairs(load<U>(w)), w1 = pairs(load<U>(w + 64));
      if (R <= 2) prefetch(w + 4096), prefetch(w + 4160);
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

// f(constant of n) for an n of 1 to kRows.
template <int Most = kRows, class F>
void with_height(int n, F&& f) {
  assert(0 < n && n <= Most);
  if constexpr (Most > 1) {
    if (n < Most) return with_height<Most - 1>(n, f);
  }
  f(std::integral_constant<int, Most>{});
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
        with_height(height, [&](auto R) {
          if (l.group)
            int4_tile<R.value>(l, b, rows, row, t);
          else
            bf16_tile<R.value>(l, b, rows, row, t);
        });
        row += height;
      }
  });
}

// ---- packing ----

inline const float* copied(Arena& arena, const float* from, size_t count, size_t room) {
  if (!from) return nullptr;
  float* to = reinterpret_cast<float*>(arena.take(room * sizeof(float)));
  memcpy(to, from, count * sizeof(float));
  return to;
}

// values: [rows, groups] -> [rows / 32][groups][32].
inline const float* in_blocks(Arena& arena, const float* values, int rows, int groups) {
  if (!values) return nullptr;
  const size_t room = size_t(round_up(rows, kCols)) * groups;
  float* to = reinterpret_cast<float*>(arena.take(room * sizeof(float)));
  for (int o = 0; o < rows; ++o)
    for (int g = 0; g < groups; ++g)
      to[(size_t(o / kCols) * groups + g) * kCols + o % kCols] = values[size_t(o) * groups + g];
  return to;
}

inline void set_sizes(Linear& l, Arena& arena, int out, int in, int group, const float* bias, const float* factor) {
  l.in = round_up(in, kStep), l.out = round_up(out, kCols), l.group = group;
  l.bias = copied(arena, bias, out, l.out);
  l.factor = copied(arena, factor, in, l.in);
}

// q: [out, in] of -8 to 7; scales, zeros (may be null): [out, in / group]. in: of whole groups.
inline Linear pack_int4(Arena& arena, const int8_t* q, const float* scales, const float* zeros, const float* bias,
                        const float* factor, int out, int in, int group) {
  assert(group % kStep == 0 && in % group == 0);
  Linear l;
  set_sizes(l, arena, out, in, group, bias, factor);
  uint8_t* weights = arena.take(l.block_bytes() * (l.out / kCols));
  for (int o = 0; o < out; ++o)
    for (int k = 0; k < in; k += 8) {
      const int8_t* from = q + size_t(o) * in + k;
      u32 word = 0;  // the n-th nibble of the low half is input 2n, of the high half 2n + 1
      for (int i = 0; i < 8; ++i) word |= (u32(from[i] + 8) & 15u) << (4 * (i / 2) + 16 * (i % 2));
      memcpy(weights + (o / kCols) * l.block_bytes() + size_t(k) * 16 + size_t(o % kCols) * 4, &word, 4);
    }
  l.weights = weights;
  l.scales = in_blocks(arena, scales, out, in / group);
  l.zeros = in_blocks(arena, zeros, out, in / group);
  return l;
}

// w: bf16 [out, in], in even.
inline Linear pack_bf16(Arena& arena, const u16* w, const float* bias, const float* factor, int out, int in) {
  assert(in % 2 == 0);
  Linear l;
  set_sizes(l, arena, out, in, 0, bias, factor);
  uint8_t* weights = arena.take(l.block_bytes() * (l.out / kCols));
  for (int o = 0; o < out; ++o)
    for (int k = 0; k < in; k += 2)
      memcpy(weights + (o / kCols) * l.block_bytes() + size_t(k) * 64 + size_t(o % kCols) * 4, w + size_t(o) * in + k, 4);
  l.weights = weights;
  return l;
}

}  // namespace enginehouse
