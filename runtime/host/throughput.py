"""Executor statistics -> a line of throughput every ten seconds, as long as anything moves.

Knows no executor and no log.
"""

from __future__ import annotations

from enginehouse.runtime.request import ExecutorStats

PERIOD_S = 10.0


class Throughput:
    """Remembers the statistics that its last line ended with."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._before = ExecutorStats()

    def line(self, stats: ExecutorStats, now_s: float) -> str | None:
        """What the time since the last line brought; None before PERIOD_S, and of idle time."""
        seconds = now_s - self._since_s
        if seconds < PERIOD_S:
            return None
        before, self._before, self._since_s = self._before, stats, now_s
        prompt = stats.num_prompt_tokens - before.num_prompt_tokens
        output = stats.num_generated_tokens - before.num_generated_tokens
        cached = stats.num_cached_tokens - before.num_cached_tokens
        if not (prompt or output or cached or stats.num_running or stats.num_waiting):
            return None
        used = stats.num_kv_blocks - stats.num_free_kv_blocks
        parts = [
            f"{stats.num_running} running, {stats.num_waiting} waiting",
            f"prompt {prompt / seconds:.1f} tokens/s",
            f"output {output / seconds:.1f} tokens/s",
            f"KV cache {used / max(1, stats.num_kv_blocks):.0%} held",
        ]
        if prompt + cached:
            parts.append(f"{cached / (prompt + cached):.0%} of prompts found there")
        return "; ".join(parts)
