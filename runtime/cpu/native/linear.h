// Products: weights packed in blocks of 32 outputs, times rows of activations. packed_linear.py has the layout.
#pragma once

#include <algorithm>
#include <cassert>
#include <type_traits>

#include "pool.h"
#include "rows.h"
#include "vectors.h"

namespace enginehouse {

constexpr int kCols = 32;  // outputs of one block: two vectors
// Queries of one register tile, and rows of one in bf16 and in bytes: as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kRows = 6, kWordRows = kTall ? 6 : 8, kByteRows = 8;
#else
constexpr int kRows = 2, kWordRows = 2, kByteRows = 2;
#endif

enum class Form : int { bf16, int4, int8, e4m3 };

// in: of whole steps, out: of whole blocks. All arrays are the caller's. As runtime/cpu/structures.py has it.
struct Linear {
  Form form = Form::bf16;
  int in = 0, out = 0;
  int group = 0;           // inputs that share a scale: of whole steps; 0 for bf16
  Input input = Input::bf16;
  int narrow_scales = 0;   // whether scales are bf16, else float32
  const uint8_t* weights = nullptr;
  const void* scales = nullptr;     // [out / 32][groups][32]
  const float* zeros = nullptr;     // the same, or null
  const int16_t* counts = nullptr;  // [out / 32][parts][32]: of each part's weights the sum; for bytes
  const float* bias = nullptr;      // [out] or null
  const float* factor = nullptr;    // [in] or null: what the input is multiplied by

  size_t block_bytes() const {
    const size_t values = size_t(in) * kCols;
    return form == Form::bf16 ? 2 * values : form == Form::int4 ? values / 2 : values;
  }
  bool reads_as(const Linear& other) const { return input == other.input && factor == other.factor; }
  const uint8_t* block(int b) const { return weights + b * block_bytes(); }
  V scale(int b, int of_group, int half) const {
    const size_t at = (size_t(b) * (in / group) + of_group) * kCols + half * kLanes;
    return narrow_scales ? widened(load<H>(static_cast<const u16*>(scales) + at)) : load<V>(static_cast<const float*>(scales) + at);
  }
  // The sum of a part's weights, and `above` in the upper 16 bits.
  U counts_above(int above, int b, int parts, int part, int half) const {
    const int16_t* at = counts + (size_t(b) * parts + part) * kCols + half * kLanes;
    return converted<U>(load<H>(at)) | u32(above) << 16;
  }
  V zero(int b, int of_group, int half) const {
    return load<V>(zeros + (size_t(b) * (in / group) + of_group) * kCols + half * kLanes);
  }
};

// clamped: GPT-OSS's, gate * sigmoid(alpha * gate) * (up + 1) of gates up to a limit and ups within it.
enum class End { store, silu, gelu, gelu_erf, clamped };

struct Target {
  float* y;    // [rows, stride]
  int stride;
  int width;   // outputs that are stored; what a block holds beyond them is padding
  End end = End::store;
  float limit = 0, alpha = 1;  // of clamped
  bool far = false;  // more than a cache holds: written past it
};

// What is written at the end is fetched while it is computed.
inline void fetch_target(const Target& t, int block, int row, int count) {
  if (t.far) return;
  for (int r = row; r < row + count; ++r) {
    const float* y = t.y + size_t(r) * t.stride + (t.end == End::store ? block * kCols : block * kCols / 2);
    __builtin_prefetch(y, 1, 3);
    if (t.end == End::store) __builtin_prefetch(y + kLanes, 1, 3);
  }
}

// The outputs of a block, of `count` rows from `row` on. y: its two halves; of a gated product gates and ups, as they take
// turns of 16 outputs.
template <int R>
void finish(const Linear& l, const Target& t, int row, int block, V (&y)[2][R], int count = R) {
  const int col = block * kCols;
  if (l.bias)
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < count; ++r) y[half][r] = y[half][r] + load<V>(l.bias + col + half * kLanes);
  auto gated = [&](auto&& gate) {
    float* to = t.y + size_t(row) * t.stride + col / 2;
    for (int r = 0; r < count; ++r, to += t.stride) store(to, gate(y[0][r], y[1][r]));
  };
  switch (t.end) {
    case End::silu: return gated([](const V& g, const V& up) { return silu(g) * up; });
    case End::gelu: return gated([](const V& g, const V& up) { return gelu(g) * up; });
    case End::gelu_erf: return gated([](const V& g, const V& up) { return gelu_erf(g) * up; });
    case End::clamped:
      return gated([&](const V& g, const V& up) {
        const V raised = larger(smaller(up, all(t.limit)), all(-t.limit)) + 1.f;
        return silu(smaller(g, all(t.limit)) * t.alpha) / t.alpha * raised;
      });
    case End::store: break;
  }
  for (int half = 0; half < 2; ++half) {
    const int at = col + half * kLanes, width = std::min(kLanes, t.width - at);
    float* to = t.y + size_t(row) * t.stride + at;
    for (int r = 0; width == kLanes && r < count; ++r, to += t.stride) t.far ? store_far(to, y[half][r]) : store(to, y[half][r]);
    for (int r = 0; width > 0 && width < kLanes && r < count; ++r, to += t.stride) memcpy(to, &y[half][r], size_t(width) * sizeof(float));
  }
}

// Many rows' sums are kept in memory: GCC would keep them in the registers that their products take.
template <class Sums>
EH_INLINE void keep_in_memory(Sums& sums) {
  asm("" : "+m"(sums));
}
// Zeros, one vector after another: what GCC calls for an array of them takes longer.
template <int R>
EH_INLINE void clear(V (&y)[2][R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) y[0][r] = y[1][r] = all(0);
}

constexpr int kFew = kRows > 2 ? 2 : 1;  // rows up to which a tile waits for memory, not for arithmetic

EH_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p + 4096, 0, 3), __builtin_prefetch(p + 4160, 0, 3); }

// f(constant of n) for an n of 1 to kRows.
template <int Most = kRows, class F>
void with_height(int n, F&& f) {
  assert(0 < n && n <= Most);
  if constexpr (Most > 1) {
    if (n < Most) return with_height<Most - 1>(n, f);
  }
  f(std::integral_constant<int, Most>{});
}

}  // namespace enginehouse
