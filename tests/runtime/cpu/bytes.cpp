// Floats, sixteen at a time from the standard input -> their e4m3 and their int8 bytes. Then what each
// of the 256 bytes of e4m3, and of int8, is as the first and as the second of a pair: floats.
#include "bytes.h"

#include <cstdio>

using namespace enginehouse;

constexpr Act kOne = sizeof(Act) == 2 ? Act(0x3f80) : Act(1);

template <class T>
static void write_all_numbers() {
  T pairs[2 * kLanes];
  for (int byte = 0; byte < 256; byte += kLanes) {
    for (int i = 0; i < kLanes; ++i) pairs[2 * i] = T{uint8_t(byte + i)}, pairs[2 * i + 1] = T{uint8_t(255 - byte - i)};
    for (int one = 0; one < 2; ++one) {
      const Act of_pair[2] = {one == 0 ? kOne : Act{}, one == 1 ? kOne : Act{}};
      const V value = total(dot(Sum{}, pairs_at(pairs), same_pair(of_pair)));
      fwrite(&value, sizeof value, 1, stdout);
    }
  }
}

int main() {
  for (V x; fread(&x, sizeof x, 1, stdin) == 1;) {
    E4m3 fp8[kLanes];
    Int8 int8[kLanes];
    put(fp8, x), put(int8, x);
    fwrite(fp8, sizeof fp8, 1, stdout), fwrite(int8, sizeof int8, 1, stdout);
  }
  write_all_numbers<E4m3>();
  write_all_numbers<Int8>();
}
