// Threads that claim work item by item: one that is not running holds up nobody.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "memory.h"

namespace enginehouse {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : shares_(std::max(1, threads)), rooms_(std::max(1, threads)), workers_(std::max(0, threads - 1)) {
    for (Worker& worker : workers_) {
      worker.pool = this, worker.number = int(&worker - workers_.begin()) + 1;
      if (pthread_create(&worker.thread, nullptr, begin, &worker)) lacking("threads");
    }
  }
  ~Pool() {
    stop_ = true;
    wake();
    for (Worker& worker : workers_) pthread_join(worker.thread, nullptr);
    pthread_cond_destroy(&called_);
    pthread_mutex_destroy(&door_);
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  int size() const { return int(workers_.size()) + 1; }
  // A thread's own, for what it does with one item.
  uint8_t* room(int thread, size_t bytes) {
    if (rooms_[thread].size() < bytes) rooms_[thread].resize(bytes);
    return rooms_[thread].data();
  }

  // f(0) ... f(items - 1), each once, on any thread; returns when all are done. f may take the number
  // of its thread too, of size(). Each thread has as many items of its own, the same part of them in each
  // run: what it wrote in the one is near it in the next.
  template <class F>
  void run(int items, F&& f) {
    assert(items <= int(kMask));
    if (items <= 1 || workers_.empty()) {
      for (int i = 0; i < items; ++i) call(f, i, 0);
      return;
    }
    context_ = &f;
    call_ = [](void* context, int i, int thread) { call(*static_cast<std::remove_reference_t<F>*>(context), i, thread); };
    done_.store(0, std::memory_order_relaxed);
    const uint64_t phase = phase_.load(std::memory_order_relaxed) + 1;
    for (int t = 0; t < size(); ++t) {
      const auto before = [&](int thread) { return uint64_t(items) * thread / size(); };
      shares_[t].left.store(phase << 40 | before(t + 1) << 20 | before(t), std::memory_order_release);
    }
    phase_.store(phase);
    wake();
    claim_all(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < items; ++spins)
      spins < kSpins ? pause_briefly() : void(sched_yield());
  }

 private:
  static constexpr uint64_t kMask = (1 << 20) - 1;
  static constexpr int kSpins = 1500;

  struct Worker {
    Pool* pool;
    int number;
    pthread_t thread;
  };

  template <class F>
  static void call(F& f, int i, int thread) {
    if constexpr (std::is_invocable_v<F&, int, int>)
      f(i, thread);
    else
      f(i);
  }
  // Items of the current phase, as long as any are left: a thread's own from behind, then others' from the front.
  void claim_all(int thread) {
    for (int i = 0; i < size(); ++i)
      while (claim((thread + i) % size(), i == 0, thread)) {
      }
  }
  // One item of a share, if any is left. A share of an older phase cannot be exchanged, and the phase does not
  // end before its claimed items are done: call_ is the item's own.
  bool claim(int of, bool own, int thread) {
    std::atomic<uint64_t>& share = shares_[of].left;
    uint64_t left = share.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t next = left & kMask, end = left >> 20 & kMask;
      if (next == end) return false;
      if (share.compare_exchange_weak(left, own ? left - (uint64_t(1) << 20) : left + 1, std::memory_order_acq_rel)) {
        call_(context_, int(own ? end - 1 : next), thread);
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }
  static void* begin(void* worker) {
    static_cast<Worker*>(worker)->pool->work(static_cast<Worker*>(worker)->number);
    return nullptr;
  }
  void work(int thread) {
    const SmallAsZero small;
    uint64_t seen = 0;
    for (int spins = 0; !stop_;) {
      const uint64_t phase = phase_.load(std::memory_order_acquire);
      if (phase != seen) {
        claim_all(thread);
        seen = phase, spins = 0;
      } else if (++spins < kSpins) {
        pause_briefly();
      } else {
        sleep(seen);
        spins = 0;
      }
    }
  }

  // A worker counts itself as asleep before it looks for a new phase the last time, and a caller looks for
  // sleepers after it has begun one: one of them sees the other.
  void sleep(uint64_t seen) {
    pthread_mutex_lock(&door_);
    asleep_.fetch_add(1);
    while (phase_.load() == seen && !stop_) pthread_cond_wait(&called_, &door_);
    asleep_.fetch_sub(1);
    pthread_mutex_unlock(&door_);
  }
  void wake() {
    if (!asleep_.load()) return;
    pthread_mutex_lock(&door_);
    pthread_cond_broadcast(&called_);
    pthread_mutex_unlock(&door_);
  }

  struct Share {
    Share() = default;
    Share(Share&&) noexcept {}  // of one that nobody has used
    alignas(64) std::atomic<uint64_t> left{0};  // phase | its end | its next item
  };
  Array<Share> shares_;  // each thread's
  alignas(64) std::atomic<uint64_t> phase_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic<bool> stop_{false};
  pthread_mutex_t door_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t called_ = PTHREAD_COND_INITIALIZER;
  void (*call_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
  Array<Array<uint8_t>> rooms_;  // each thread's
  Array<Worker> workers_;  // last: they begin when all else is there
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
