// Steps of a tiny model of odd sizes, for sanitizers: int4 with zero points, windows, caps, norms.
// Prints "alike" when a prompt in one step and in three gave the same bits.
#include <cstdio>
#include <vector>

#include "engine.cpp"

static float next_float(unsigned& state) {
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / float(1 << 24) - 0.5f;
}

template <class T, class F>
static std::vector<T> filled(size_t n, F&& f) {
  std::vector<T> values(n);
  for (auto& value : values) value = T(f());
  return values;
}

int main() {
  constexpr int kHidden = 48, kHeads = 3, kKv = 1, kHead = 16, kInner = 64, kVocab = 70, kBlocks = 9;
  constexpr int kTokens = 37;
  const Shape shape = {kHidden, 2, kHeads, kKv, kHead, 8, kInner, kVocab, kBlocks, 16, 40, 2, 1, 1, 1e-5f, 2.f, 30.f};
  Model* m = eh_open(&shape);
  unsigned state = 7;
  auto number = [&] { return next_float(state); };
  auto bf16 = [&] { return to_bf16(next_float(state)); };
  auto nibble = [&] { return int(next_float(state) * 15); };
  const auto embedding = filled<u16>(kVocab * kHidden, bf16);
  const auto cos = filled<float>(64 * 4, number), sin = filled<float>(64 * 4, number);
  eh_embedding(m, embedding.data());
  for (int i = 0; i < 3; ++i) eh_rotary(m, i, cos.data(), sin.data());
  for (int l = 0; l < 2; ++l) {
    eh_rule(m, l, 0.25f, 20.f, l ? 9 : 0, l);
    for (int which = 0; which < kNorms; ++which) {
      const int size = which < kQuery ? kHidden : kHead;
      eh_norm(m, l, which, filled<float>(size, number).data(), size);
    }
    const auto w = filled<u16>(200 * 64, bf16);
    const auto b = filled<float>(200, number);
    eh_bf16(m, l, 0, w.data(), b.data(), nullptr, (kHeads + 2 * kKv) * kHead, kHidden);
    eh_bf16(m, l, 1, w.data(), nullptr, b.data(), kHidden, kHeads * kHead);
    eh_bf16(m, l, 2, w.data(), b.data(), nullptr, 2 * kInner, kHidden);
    const auto q = filled<int8_t>(kHidden * kInner, nibble);
    eh_int4(m, l, 3, q.data(), b.data(), b.data() + 60, nullptr, b.data(), kHidden, kInner, 64);
  }
  eh_norm(m, 0, kNorms, filled<float>(kHidden, number).data(), kHidden);
  eh_bf16(m, 0, 4, filled<u16>(kVocab * kHidden, bf16).data(), nullptr, nullptr, kVocab, kHidden);

  const auto ids = filled<int>(kTokens, [&] { return int((next_float(state) + 0.5f) * kVocab); });
  auto run = [&](std::vector<int> cuts, const std::vector<int>& table) {
    std::vector<float> logits(kVocab);
    int start = 0, rope = 0, offset = 0;
    for (int end : cuts) {
      const int count = end - start, row = count - 1;
      const Step step = {1, count, ids.data() + start, &count, &start, &rope, &offset, table.data()};
      eh_step(m, &step);
      eh_logits(m, &row, 1, logits.data());
      start = end;
    }
    return logits;
  };
  const bool alike = run({kTokens}, {0, 3, 5}) == run({5, 6, kTokens}, {8, 1, 2});
  eh_close(m);
  std::puts(alike ? "alike" : "different");
}
