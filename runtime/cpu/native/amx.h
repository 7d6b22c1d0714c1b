// Tiles of registers (AMX): products of 16 rows by 16 outputs, in pairs of bf16.
//
// A product adds, to each sum, those of the first of all pairs and those of the second, each
// summed by themselves from zero, as total() of a Sum has it; what is too small for a normal float is
// zero (Intel's manual of instructions, TDPBF16PS). So rows that go without tiles get the same bits.
#pragma once

#include <cstdint>

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // as GCC, and as older Clangs say it
#define EH_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace enginehouse {

// From here to the end of the block, this thread takes for zero what is too small for a normal float.
class SmallAsZero {
#if defined(EH_AMX)
 public:
  SmallAsZero() { _mm_setcsr(before_ | 0x8040); }
  ~SmallAsZero() { _mm_setcsr(before_); }
  SmallAsZero(const SmallAsZero&) = delete;
  SmallAsZero& operator=(const SmallAsZero&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
#else
 public:
  ~SmallAsZero() {}
#endif
};

#if defined(EH_AMX)

// Linux lets a process use tiles that has asked: when this is loaded. instructions.py has seen that it may.
[[maybe_unused]] static const long tiles_allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);

// From here to the end of the block this thread's tiles 0 to 3 are 16 rows by 16 sums, 4 and 5 are
// 16 rows by `depth` words of activations, 6 and 7 are `depth` words by 16 outputs.
class Tiles {
 public:
  explicit Tiles(int depth) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, none[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 0, 0, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    } shape;
    shape.row_bytes[4] = shape.row_bytes[5] = uint16_t(4 * depth);
    shape.rows[6] = shape.rows[7] = uint8_t(depth);
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int N>
void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(N)); }
// stride: bytes from one row to the next.
template <int N>
void load_tile(const void* from, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(N) : "memory");
}
template <int N>
void store_tile(void* to, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(N) : "memory");
}
template <int Sums, int Rows, int Outputs>
void dot_pairs() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Outputs)); }
#endif

}  // namespace enginehouse
