// Where a step's time goes: each moment is of one phase's, that of the innermost block that is open.
#pragma once

#include <time.h>

#include <cstdint>

namespace enginehouse {

// As runtime/cpu/structures.py names them.
enum Phase { kLinears, kAttention, kHead, kRowWork, kPhases };

// Looked at by the thread that calls; the others work within its blocks.
class Clock {
 public:
  double seconds[kPhases] = {};  // since it was made

  // From here to the end of the block.
  class Within {
   public:
    Within(Clock& clock, Phase phase) : clock_(clock), outer_(clock.phase_) { clock_.turn(phase); }
    ~Within() { clock_.turn(outer_); }
    Within(const Within&) = delete;
    Within& operator=(const Within&) = delete;

   private:
    Clock& clock_;
    const Phase outer_;
  };

 private:
  void turn(Phase phase) {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    const int64_t now = int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
    if (phase_ != kPhases) seconds[phase_] += double(now - since_) * 1e-9;
    phase_ = phase, since_ = now;
  }

  Phase phase_ = kPhases;  // none
  int64_t since_ = 0;  // nanoseconds
};

}  // namespace enginehouse
