// Where a step's time goes: each moment is of one phase's, that of the innermost block that is open.
#pragma once

#include <array>
#include <chrono>

namespace enginehouse {

// As runtime/cpu/library.py names them.
enum Phase { kLinears, kAttention, kHead, kRowWork, kPhases };

// Looked at by the thread that calls; the others work within its blocks.
class Clock {
 public:
  std::array<double, kPhases> seconds = {};  // since it was made

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
  using Time = std::chrono::steady_clock;

  void turn(Phase phase) {
    const auto now = Time::now();
    if (phase_ != kPhases) seconds[phase_] += std::chrono::duration<double>(now - since_).count();
    phase_ = phase, since_ = now;
  }

  Phase phase_ = kPhases;  // none
  Time::time_point since_;
};

}  // namespace enginehouse
