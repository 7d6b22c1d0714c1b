// One linear's product. From the standard input: the number of rows; what a Linear has of numbers, then
// of each of its arrays the bytes' number and the bytes; the rows, float32 [rows, in]. To the standard
// output: float32 [rows, out].
#include <cstdio>
#include <vector>

#include "tiles.h"

using namespace enginehouse;

template <class T>
static std::vector<T> read(size_t n) {
  std::vector<T> values(n);
  if (fread(values.data(), sizeof(T), n, stdin) != n) std::exit(1);
  return values;
}

int main() {
  const int n = read<int>(1)[0];
  const auto told = read<int>(7);
  Linear l;
  l.form = Form(told[0]), l.in = told[1], l.out = told[2], l.group = told[3], l.input = Input(told[4]);
  l.narrow_scales = told[5];
  const int in = told[6];
  std::vector<std::vector<uint8_t>> arrays;
  for (int i = 0; i < 6; ++i) arrays.push_back(read<uint8_t>(read<int>(1)[0]));
  auto at = [&](int i) { return arrays[i].empty() ? nullptr : static_cast<const void*>(arrays[i].data()); };
  l.weights = arrays[0].data(), l.scales = at(1), l.zeros = static_cast<const float*>(at(2));
  l.counts = static_cast<const int16_t*>(at(3)), l.bias = static_cast<const float*>(at(4));
  l.factor = static_cast<const float*>(at(5));
  const auto x = read<float>(size_t(n) * in);
  Pool pool(1);
  Rows rows;
  rows.grow(n, in);
  rows.widen(in);
  for (int row = 0; row < n; ++row) rows.put(row, &x[size_t(row) * in], nullptr, l.factor, 1, in, l.input);
  std::vector<float> y(size_t(n) * l.out);
  product(pool, l, rows, n, {y.data(), l.out, l.out});
  fwrite(y.data(), sizeof(float), y.size(), stdout);
}
