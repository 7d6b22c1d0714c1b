// Floats, sixteen at a time from the standard input -> what each of a gated product's ends makes of them
// beside an up of one.
#include "linear.h"

#include <cstdio>

using namespace enginehouse;

int main() {
  for (V x; fread(&x, sizeof x, 1, stdin) == 1;)
    for (End end : {End::silu, End::gelu, End::gelu_erf}) {
      Target t{nullptr, 0, 0, end};
      const V y = t.gated(x, all(1));
      fwrite(&y, sizeof y, 1, stdout);
    }
}
