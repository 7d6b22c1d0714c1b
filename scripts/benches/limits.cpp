// What this machine can do at most: bytes read a second, and multiply-adds of each instruction.
//
// Arguments: threads, then what is wanted: a number of bytes, which are read again and again, or a name
// of kPeaks, for an instruction that the caller knows this CPU to have. Prints each with its thousand
// millions a second. An operation is a product or a sum.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

using Clock = std::chrono::steady_clock;
constexpr double kSeconds = 0.4;
typedef uint64_t Words __attribute__((vector_size(64)));

// round(thread): what one piece of work comes to. All threads for kSeconds, twice: the better.
double rate(int threads, const std::function<double(int)>& round) {
  double best = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::vector<double> done(threads);
    std::vector<std::thread> all;
    const auto began = Clock::now();
    const auto end = began + std::chrono::duration<double>(kSeconds);
    for (int t = 0; t < threads; ++t)
      all.emplace_back([&, t] {
        while (Clock::now() < end) done[t] += round(t);
      });
    for (auto& thread : all) thread.join();
    double total = 0;
    for (double amount : done) total += amount;
    best = std::max(best, total / std::chrono::duration<double>(Clock::now() - began).count());
  }
  return best / 1e9;
}

double read_rate(int threads, size_t bytes) {
  const size_t count = bytes / sizeof(Words) / threads;
  std::vector<std::vector<uint64_t>> memory(threads);
  for (auto& own : memory) own.assign((count + 1) * 8, 1);
  return rate(threads, [&](int t) {
    const auto address = (reinterpret_cast<uintptr_t>(memory[t].data()) + 63) / 64 * 64;
    const Words* w = reinterpret_cast<const Words*>(address);
    Words sums[8] = {};
    for (size_t i = 0; i + 8 <= count; i += 8)
      for (int j = 0; j < 8; ++j) {
        __builtin_prefetch(w + i + j + 32);
        sums[j] += w[i + j];
      }
    for (auto& sum : sums) asm volatile("" ::"r"(&sum) : "memory");
    return double(count * sizeof(Words));
  });
}

#if defined(__x86_64__)
constexpr int kRounds = 20000, kChains = 12;

// A function of one instruction on kChains registers that do not wait for each other.
#define PEAK(name, isa, type, code)                                               \
  __attribute__((target(isa), noinline)) double name(int) {                       \
    type acc[kChains] = {};                                                       \
    for (int i = 0; i < kRounds; ++i)                                             \
      _Pragma("GCC unroll 12") for (int c = 0; c < kChains; ++c)                  \
          asm volatile(code : "+x"(acc[c])::"xmm15");                             \
    _Pragma("GCC unroll 12") for (int c = 0; c < kChains; ++c)                    \
        asm volatile("" ::"x"(acc[c]));                                           \
    return double(kRounds) * kChains * sizeof(type);                              \
  }

// Amounts are bytes of registers: per byte of int8 2 operations, of bf16 1, of float32 a half.
PEAK(vnni512, "avx512f,avx512vnni", __m512i, "vpdpbusd %0, %0, %0")
PEAK(vnni256, "avx2,avxvnni", __m256i, "%{vex%} vpdpbusd %0, %0, %0")
PEAK(bf16_512, "avx512f,avx512bf16", __m512i, "vdpbf16ps %0, %0, %0")
PEAK(fma512, "avx512f", __m512, "vfmadd231ps %0, %0, %0")
PEAK(fma256, "avx2,fma", __m256, "vfmadd231ps %0, %0, %0")
// int8 without VNNI: products of pairs, their sums, and the addition.
PEAK(madd256, "avx2", __m256i, "vpmaddubsw %0, %0, %%ymm15; vpmaddwd %%ymm15, %%ymm15, %%ymm15; vpaddd %%ymm15, %0, %0")

// Tiles of 16 rows of 64 bytes: 16 x 16 sums of 64 products of int8, of 32 of bf16.
struct alignas(64) TileShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

template <bool kInt8>
__attribute__((target("amx-tile,amx-int8,amx-bf16"), noinline)) double tiles(int) {
  TileShape shape;
  for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
  asm volatile("" ::"r"(&shape) : "memory");  // some compilers think that only its first words are read
  _tile_loadconfig(&shape);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < kRounds / 8; ++i) {
    if (kInt8) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
  return double(kRounds / 8) * 4 * 16 * 16 * (kInt8 ? 64 : 32) * 2;
}

bool tiles_allowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl, asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Peak {
  const char* name;
  double (*work)(int);
  double operations;  // of one amount
};
constexpr Peak kPeaks[] = {
    {"int8:avx512_vnni", vnni512, 2}, {"int8:avx_vnni", vnni256, 2},     {"int8:avx2", madd256, 2},
    {"int8:amx_int8", tiles<true>, 1}, {"bf16:avx512_bf16", bf16_512, 1}, {"bf16:amx_bf16", tiles<false>, 1},
    {"float32:avx512f", fma512, 0.5}, {"float32:fma", fma256, 0.5},
};

double peak(const char* name, int threads) {
  for (const Peak& one : kPeaks)
    if (!strcmp(one.name, name)) {
      if (strstr(name, "amx") && !tiles_allowed()) return 0;
      return rate(threads, one.work) * one.operations;
    }
  return 0;
}
#else
double peak(const char*, int) { return 0; }
#endif

int main(int argc, char** argv) {
  const int threads = atoi(argv[1]);
  for (int i = 2; i < argc; ++i) {
    const size_t bytes = strtoull(argv[i], nullptr, 10);
    printf("%s %.1f\n", argv[i], bytes ? read_rate(threads, bytes) : peak(argv[i], threads));
    fflush(stdout);
  }
}
