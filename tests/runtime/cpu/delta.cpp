// From the standard input sizes, a layer's weights and the rows of two sequences of linear attention, which
// one of the slots had before -> what they read, in one step each, and once more in steps of some tokens.
#include <cstdio>

#include "delta.h"

using namespace enginehouse;

static Array<float> taken(size_t n) {
  Array<float> values(n);
  if (fread(values.data(), sizeof(float), n, stdin) != n) std::abort();
  return values;
}

int main() {
  int told[6];
  if (fread(told, sizeof told, 1, stdin) != 1) return 1;
  const DeltaSizes z = {told[0], told[1], told[2], told[3], told[4]};
  const int tokens = told[5], heads = z.key_heads * z.group;
  Pool pool(2);
  States states(z, 1e-5f, 2, 3);
  const auto filter = taken(size_t(z.key_heads) * z.kernel * z.mixed()), speed = taken(heads), bias = taken(heads);
  const auto norm = taken(z.value_size);
  const auto in = taken(size_t(2) * tokens * z.width()), rates = taken(size_t(2) * tokens * z.wide_rates());
  DeltaWeights w;
  w.filter = filter.data(), w.speed = speed.data(), w.bias = bias.data(), w.norm = norm.data();
  Array<float> out(size_t(2) * tokens * z.read());
  const int both[] = {tokens, tokens}, starts[] = {0, 0}, slots[] = {2, 0};
  const Step whole = {2, 2 * tokens, nullptr, both, starts, nullptr, slots, nullptr, nullptr};
  states.run(pool, whole, 1, w, {in.data(), rates.data(), out.data()});
  fwrite(out.data(), sizeof(float), out.size(), stdout);
  for (int sequence = 0; sequence < 2; ++sequence)
    for (int start = 0, count = 1; start < tokens; start += count, count = std::min(count * 3, tokens - start)) {
      const size_t row = size_t(sequence) * tokens + start;
      const int slot = 2 - sequence;
      const Step some = {1, count, nullptr, &count, &start, nullptr, &slot, nullptr, nullptr};
      states.run(pool, some, 1, w, {in.data() + row * z.width(), rates.data() + row * z.wide_rates(), out.data() + row * z.read()});
    }
  fwrite(out.data(), sizeof(float), out.size(), stdout);
}
