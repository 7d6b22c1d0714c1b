"""What is asked of an engine and what comes back: plain values, token ids only.

Read by the workers too, so nothing here may import torch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class FinishReason(str, enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence or stop token was produced
    LENGTH = "length"  # max_tokens, or the context, was reached
    CANCELLED = "cancelled"
    ERROR = "error"  # the engine failed on it; TokenOutput.error says how


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are chosen.

    Applied in this order: penalties, temperature, min_p, top_k, top_p.
    repetition_penalty counts prompt and generated tokens (Keskar et al., 2019, section 4.1);
    presence_penalty and frequency_penalty count generated tokens only, as OpenAI's do.
    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 are off. seed None is random.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. request_id is unique for its submitter."""

    request_id: int
    prompt_ids: list[int]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one iteration added to one sequence.

    The end-of-sequence or stop token itself is not among token_ids. num_cached_tokens is how
    many prompt tokens were found in the KV cache instead of computed.
    """

    request_id: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ExecutorStats:
    """One look at a running executor. Counters only grow; the rest are of this moment."""

    num_running: int = 0
    num_waiting: int = 0
    num_kv_blocks: int = 0
    num_free_kv_blocks: int = 0
    num_iterations: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a server and its users must know of the engine that is running."""

    name: str
    model: str
    quantization: str
    backend: str
    tp_size: int
    pp_size: int
    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    vocab_size: int
    kv_block_size: int
    num_kv_blocks: int
    eos_token_ids: tuple[int, ...]
    digest: str
    created: int  # seconds since the epoch
