// Memory without the C++ library, of which the kernels use headers alone: arrays, and large pages.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>

namespace enginehouse {

[[noreturn]] inline void lacking(const char* what) {
  std::fprintf(stderr, "enginehouse: the system gives the kernels no more %s\n", what);
  std::abort();
}

constexpr size_t kLargePage = size_t(2) << 20;

// The whole ones of so many bytes, where the system has them.
inline void in_large_pages([[maybe_unused]] void* from, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(from, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
}

// Owns its elements, whose addresses change as it grows. The first stands on a cache line.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t size) { resize(size); }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_), std::swap(room_, other.room_);
    return *this;
  }
  ~Array() {
    clear();
    std::free(data_);
  }

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T* begin() { return data_; }
  const T* begin() const { return data_; }
  T* end() { return data_ + size_; }
  const T* end() const { return data_ + size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T& at(size_t i) {
    assert(i < size_);
    return data_[i];
  }
  T& back() { return at(size_ - 1); }

  // Elements that are new are zeros, or what their type begins as.
  void resize(size_t size) {
    reserve(size);
    while (size_ < size) new (data_ + size_++) T();
    while (size_ > size) data_[--size_].~T();
  }
  void clear() {
    while (size_) data_[--size_].~T();
  }
  void push_back(T value) {
    reserve(size_ + 1);
    new (data_ + size_++) T(std::move(value));
  }

 private:
  static constexpr size_t kLine = 64;
  static_assert(alignof(T) <= kLine);

  void reserve(size_t size) {
    if (size <= room_) return;
    const size_t room = std::max(size, 2 * room_), line = room < kLargePage / sizeof(T) ? kLine : kLargePage;
    const size_t bytes = (room * sizeof(T) + kLine - 1) / kLine * kLine;
    void* found = nullptr;
    if (room > SIZE_MAX / 2 / sizeof(T) || posix_memalign(&found, line, bytes)) lacking("memory");
    if (line == kLargePage) in_large_pages(found, bytes);
    T* moved = static_cast<T*>(found);
    for (size_t i = 0; i < size_; ++i) {
      new (moved + i) T(std::move(data_[i]));
      data_[i].~T();
    }
    std::free(data_);
    data_ = moved, room_ = room;
  }

  T* data_ = nullptr;
  size_t size_ = 0, room_ = 0;
};

// Zeroed memory that takes no room before it is touched, in large pages where the system has them.
class Pages {
 public:
  explicit Pages(size_t bytes) : size_(((bytes + kLargePage - 1) & ~(kLargePage - 1)) + kLargePage) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    mapped_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapped_ == MAP_FAILED) return;
    const size_t skipped = -reinterpret_cast<uintptr_t>(mapped_) & (kLargePage - 1);
    data_ = static_cast<uint8_t*>(mapped_) + skipped;
    in_large_pages(data_, size_ - kLargePage);
  }
  ~Pages() {
    if (data_) munmap(mapped_, size_);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  uint8_t* data() const { return data_; }  // null where there is not so much

 private:
  size_t size_;
  void* mapped_;
  uint8_t* data_ = nullptr;
};

}  // namespace enginehouse
