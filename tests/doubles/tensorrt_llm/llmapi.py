"""tensorrt_llm.llmapi: the values that LLM and its requests are made of."""

from __future__ import annotations

from tensorrt_llm.contract import ENUMS, Fields

CapacitySchedulerPolicy = ENUMS["CapacitySchedulerPolicy"]
ContextChunkingPolicy = ENUMS["ContextChunkingPolicy"]


class KvCacheConfig(Fields):
    title = "KvCacheConfig"
    unknown = ValueError  # pydantic's

    def validate(self) -> None:
        fraction = self.free_gpu_memory_fraction
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError(f"free_gpu_memory_fraction={fraction} is not in 0..1")


class SchedulerConfig(Fields):
    title = "SchedulerConfig"
    unknown = ValueError


class GuidedDecodingParams(Fields):
    title = "GuidedDecodingParams"

    def validate(self) -> None:
        if sum(bool(value) for value in self.given.values()) > 1:
            raise ValueError("Only one guide can be used for a request")


class SamplingParams(Fields):
    title = "SamplingParams"

    def validate(self) -> None:
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got {self.temperature}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is no unsigned 64-bit number")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        if max(self.n, self.best_of or 1) > 1 and self.greedy:
            raise ValueError("Greedy decoding does not allow multiple returns")

    @property
    def greedy(self) -> bool:
        chosen = (self.temperature, self.top_p, self.top_k)
        nothing = all(value is None for value in chosen)
        return nothing or self.temperature == 0 or self.top_k == 1 or self.top_p == 0
