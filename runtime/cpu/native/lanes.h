// Sixteen numbers in as many registers as they take, where none has 512 bits.
//
// GCC and Clang have such vectors of their own, but where registers are narrower GCC keeps them in
// memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace enginehouse {

#define EH_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;
#if defined(__AVX2__)
constexpr int kRegister = 32;  // bytes
#else
constexpr int kRegister = 16;
#endif

template <class T>
struct Lanes;

// f(constant of 0), f(constant of 1), ... for each part of T: no loop, which GCC would unroll too late.
template <class T, class F>
EH_INLINE T of_parts(F&& f) {
  T out;
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    ((out.part[i] = (typename T::Part)f(i)), ...);
  }(std::make_integer_sequence<int, T::kParts>());
  return out;
}

template <class T>
struct Lanes {
  using Number = T;
  static constexpr int kBytes = kLanes * int(sizeof(T)) < kRegister ? kLanes * int(sizeof(T)) : kRegister;
  static constexpr int kParts = kLanes * int(sizeof(T)) / kBytes;
  typedef T Part __attribute__((vector_size(kBytes)));
  Part part[kParts];

  Lanes() = default;
  EH_INLINE Lanes(T x) : Lanes(of_parts<Lanes>([&](int) __attribute__((always_inline)) { return x - Part{}; })) {}
  template <class From>
  EH_INLINE explicit Lanes(const Lanes<From>& x)  // the same bits
      : Lanes(of_parts<Lanes>([&](int i) __attribute__((always_inline)) { return x.part[i]; })) {
    static_assert(sizeof x == sizeof *this);
  }
  EH_INLINE T operator[](int i) const { return part[i / (kLanes / kParts)][i % (kLanes / kParts)]; }

  using Mask = Lanes<int32_t>;
#define EH_BOTH(op, Given)                                                                                   \
  friend EH_INLINE auto operator op(const Lanes& a, const Lanes& b) {                                        \
    return of_parts<Given>([&](int i) __attribute__((always_inline)) { return a.part[i] op b.part[i]; });    \
  }
  EH_BOTH(+, Lanes) EH_BOTH(-, Lanes) EH_BOTH(*, Lanes) EH_BOTH(/, Lanes)
  EH_BOTH(&, Lanes) EH_BOTH(|, Lanes) EH_BOTH(<<, Lanes) EH_BOTH(>>, Lanes)
  EH_BOTH(<, Mask) EH_BOTH(>, Mask) EH_BOTH(<=, Mask) EH_BOTH(>=, Mask) EH_BOTH(==, Mask) EH_BOTH(!=, Mask)
#undef EH_BOTH
  friend EH_INLINE Lanes operator-(const Lanes& a) {
    return of_parts<Lanes>([&](int i) __attribute__((always_inline)) { return -a.part[i]; });
  }
  friend EH_INLINE Lanes operator~(const Lanes& a) {
    return of_parts<Lanes>([&](int i) __attribute__((always_inline)) { return ~a.part[i]; });
  }
};

// The numbers in another type.
template <class To, class T>
EH_INLINE To converted(const Lanes<T>& x) {
  using Number = typename To::Number;
  constexpr int kCount = kLanes / (Lanes<T>::kParts > To::kParts ? Lanes<T>::kParts : To::kParts);  // at a time
  typedef T Some __attribute__((vector_size(kCount * sizeof(T))));
  typedef Number Given __attribute__((vector_size(kCount * sizeof(Number))));
  To out;
  for (int i = 0; i < kLanes / kCount; ++i) {
    Some some;
    memcpy(&some, reinterpret_cast<const char*>(&x) + i * sizeof some, sizeof some);
    const Given given = __builtin_convertvector(some, Given);
    memcpy(reinterpret_cast<char*>(&out) + i * sizeof given, &given, sizeof given);
  }
  return out;
}

}  // namespace enginehouse
