// Zeroed memory that takes no room before it is touched, in large pages where the system has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace enginehouse {

class Pages {
 public:
  explicit Pages(size_t bytes) : size_(((bytes + kLarge - 1) & ~(kLarge - 1)) + kLarge) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    mapped_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    const size_t skipped = -reinterpret_cast<uintptr_t>(mapped_) & (kLarge - 1);
    data_ = static_cast<uint8_t*>(mapped_) + skipped;
#ifdef MADV_HUGEPAGE
    madvise(data_, size_ - kLarge, MADV_HUGEPAGE);
#endif
  }
  ~Pages() { munmap(mapped_, size_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  uint8_t* data() const { return data_; }

 private:
  static constexpr size_t kLarge = size_t(2) << 20;
  size_t size_;
  void* mapped_;
  uint8_t* data_;
};

}  // namespace enginehouse
