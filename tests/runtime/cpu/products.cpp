// One linear's product, or a mixture of experts. From the standard input, all numbers of 32 bits: the
// number of rows and of their inputs; the experts, how many are chosen, and the rest of Routing with its
// scale and epsilon in percent, then an expert's columns and the limit of clamped gates in percent, all 0 for one linear;
// the linears. To the standard output: float32 rows.
// A linear: form, in, out, group, input, narrow_scales; of each of its arrays the bytes' number and the
// bytes. A mixture: its router, its bias and correction, arrays; then of each expert fc_gate and proj.
#include <cstdio>
#include <cstdlib>

#include "experts.h"

using namespace enginehouse;

template <class T>
static Array<T> read(size_t n) {
  Array<T> values(n);
  if (fread(values.data(), sizeof(T), n, stdin) != n) std::exit(1);
  return values;
}

static Array<Array<uint8_t>> arrays;

static const void* read_array() {
  const int bytes = read<int>(1)[0];
  if (!bytes) return nullptr;
  arrays.push_back(read<uint8_t>(bytes));
  return arrays.back().data();
}

template <class T>
static void read_array(T*& to) {
  to = static_cast<T*>(read_array());
}

static Linear read_linear() {
  Linear l;
  const auto told = read<int>(6);
  l.form = Form(told[0]), l.in = told[1], l.out = told[2], l.group = told[3], l.input = Input(told[4]);
  l.narrow_scales = told[5];
  read_array(l.weights), read_array(l.scales), read_array(l.zeros), read_array(l.counts);
  read_array(l.bias), read_array(l.factor);
  return l;
}

int main() {
  const auto sizes = read<int>(14);
  const int n = sizes[0], in = sizes[1], experts = sizes[2], chosen = sizes[3], inner = sizes[12];
  Pool pool(2);
  Array<float> x, y;
  if (experts) {
    Experts all;
    read_array(all.router), read_array(all.bias), read_array(all.correction);
    for (int i = 0; i < experts; ++i) all.fc_gate.push_back(read_linear()), all.proj.push_back(read_linear());
    y = read<float>(size_t(n) * in);
    const Routing routing = {experts, chosen, sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[10], float(sizes[9]) / 100, float(sizes[11]) / 100};
    Mixture mixture(routing, in, inner, 7 * chosen);  // 7 rows at once
    const float limit = float(sizes[13]) / 100;
    mixture.run(pool, all, n, y.data(), y.data(), {nullptr, inner, inner, limit > 0 ? End::clamped : End::silu, limit, 1.702f});
  } else {
    const Linear l = read_linear();
    x = read<float>(size_t(n) * in);
    Rows rows;
    rows.grow(n, in);
    rows.shape(n, in);
    for (int row = 0; row < n; ++row) rows.put(row, &x[size_t(row) * in], nullptr, l.factor, 1, in, l.input);
    y.resize(size_t(n) * l.out);
    product(pool, l, rows, n, {y.data(), l.out, l.out});
  }
  fwrite(y.data(), sizeof(float), y.size(), stdout);
}
