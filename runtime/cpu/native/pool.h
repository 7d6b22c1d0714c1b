// Threads that claim work item by item: one that is not running holds up nobody.
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#include "amx.h"

namespace enginehouse {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    stop_ = true;
    wake();
    for (auto& worker : workers_) worker.join();
  }
  int size() const { return int(workers_.size()) + 1; }

  // f(0) ... f(items - 1), each once, on any thread; returns when all are done.
  template <class F>
  void run(int items, F&& f) {
    assert(items <= int(kMask));
    if (items <= 1 || workers_.empty()) {
      for (int i = 0; i < items; ++i) f(i);
      return;
    }
    context_ = &f;
    call_ = [](void* context, int i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); };
    done_.store(0, std::memory_order_relaxed);
    const uint64_t phase = ((ticket_.load(std::memory_order_relaxed) >> 40) + 1) << 40;
    ticket_.store(phase | uint64_t(items) << 20);
    wake();
    while (claim()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < items; ++spins)
      spins < kSpins ? pause_briefly() : std::this_thread::yield();
  }

 private:
  static constexpr uint64_t kMask = (1 << 20) - 1;
  static constexpr int kSpins = 1500;

  static bool left(uint64_t ticket) { return (ticket & kMask) < ((ticket >> 20) & kMask); }

  // One item of the current phase, if any is left. A ticket of an older phase cannot be exchanged,
  // and the phase does not end before its claimed items are done: call_ is the item's own.
  bool claim() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (left(ticket)) {
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
        call_(context_, int(ticket & kMask));
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
    return false;
  }
  void work() {
    const SmallAsZero small;
    for (int spins = 0; !stop_;) {
      if (claim()) {
        spins = 0;
      } else if (++spins < kSpins) {
        pause_briefly();
      } else {
        const uint32_t seen = calls_.load();
        if (!left(ticket_.load()) && !stop_) calls_.wait(seen);
        spins = 0;
      }
    }
  }
  void wake() {
    calls_.fetch_add(1);
    calls_.notify_all();
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};  // phase | items | next item
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<uint32_t> calls_{0};
  std::atomic<bool> stop_{false};
  void (*call_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

// f(0) ... f(n - 1), some at a time.
template <class F>
void by_rows(Pool& pool, int n, F&& f) {
  const int items = n < 12 ? 1 : std::min(n / 2, 8 * pool.size());
  pool.run(items, [&](int item) {
    for (int i = int(int64_t(n) * item / items), end = int(int64_t(n) * (item + 1) / items); i < end; ++i) f(i);
  });
}

}  // namespace enginehouse
