"""What is asked of an engine and what comes back: plain values, token ids only.

Read by the workers too, so nothing here may import torch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from enginehouse.runtime.errors import RequestError


class FinishReason(str, enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence or stop token was produced
    LENGTH = "length"  # max_tokens, or the context, was reached
    CANCELLED = "cancelled"
    ERROR = "error"  # the engine failed on it; TokenOutput.error says how


class ConstraintKind(str, enum.Enum):
    """What the value of a Constraint is."""

    JSON_OBJECT = "json_object"  # any JSON object; the value is empty
    JSON_SCHEMA = "json_schema"  # a JSON schema, as JSON text
    REGEX = "regex"  # a regular expression for the whole answer
    EBNF = "ebnf"  # a grammar in xgrammar's GBNF, its root named `root`
    CHOICE = "choice"  # a JSON list of strings, one of which is the answer
    STRUCTURAL_TAG = "structural_tag"  # xgrammar's structural tag format, as JSON text


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that the generated text must follow: a plain value, compiled by the engine.

    param: the request's field it came from, for a refusal.
    """

    kind: ConstraintKind
    value: str
    param: str = "response_format"


class PoolingKind(str, enum.Enum):
    """Of which tokens of a prompt an embedding is made."""

    LAST = "last"  # of the last token, which has read all others
    MEAN = "mean"  # of all of them, each counting alike


@dataclass(frozen=True, slots=True)
class Pooling:
    """An embedding of the prompt: its tokens' hidden states, behind the last norm, as one vector.

    dimensions: so many of its first numbers are told; None: all. normalize: to a Euclidean length
    of 1, once those are cut.
    """

    kind: PoolingKind = PoolingKind.LAST
    dimensions: int | None = None
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are chosen.

    Applied in this order: constraint, logit_bias, penalties, temperature, min_p, top_k, top_p.
    Before min_tokens tokens have been generated no end-of-sequence or stop token is chosen.
    logit_bias: (token id, what is added to its logit). num_logprobs: how many alternatives are
    reported beside each chosen token, from the logits before any of the above; None: nothing.
    num_prompt_logprobs: the same for each token of the prompt but the first. max_tokens 0: the
    prompt is computed and nothing generated; pooling says what embedding is told of it then.
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
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    pooling: Pooling | None = None


# Sequences of this priority and of higher numbers are of the class that gives way: none of them is
# computed while one of a lower number is there.
GIVES_WAY = 2**30


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. request_id is unique for its submitter. A lower priority runs
    first; from GIVES_WAY on, only when nothing below it is there. label: what a log calls the HTTP
    request that it is of.
    """

    request_id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    label: str = ""


def log_fields(request: Request) -> dict[str, str]:
    """What a line about a request has beside its message."""
    return {"request_id": request.label} if request.label else {}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities. top: (token id, logprob), the likeliest first.

    rank: one more than the tokens that are likelier than this one.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an engine takes a request no further that its server found legal: the sender's fault, or
    that there is no room. status: HTTP's. retry_after_s: when it may be sent again.
    """

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    retry_after_s: int | None = None

    def error(self) -> RequestError:
        """The same, to be raised."""
        return RequestError(
            self.message,
            param=self.param,
            code=self.code or "invalid_value",
            status=self.status,
            retry_after_s=self.retry_after_s,
        )


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one iteration added to one sequence. Made for each token, so it is no dataclass.

    The end-of-sequence or stop token itself is not among token_ids: it is stop_token_id.
    num_cached_tokens is how many prompt tokens were found in the KV cache instead of computed.
    logprobs: one for each of token_ids, when they were asked for, and stop_logprobs of
    stop_token_id where the backend tells them. prompt_logprobs: of the prompt's next tokens, from
    its second on; the last come with the first of token_ids. refusal: of a request that ended with
    ERROR and is its sender's to mend. queued_s: with the first token, how long the sequence waited
    before its prompt was begun, where the engine tells. embedding: of a pooled prompt, as float32
    numbers, the lowest byte of each first.
    """

    request_id: int
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    stop_token_id: int | None = None
    refusal: Refusal | None = None
    stop_logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    queued_s: float | None = None
    embedding: bytes | None = None


def joined(before: TokenOutput, more: TokenOutput) -> TokenOutput:
    """What one iteration added to a sequence at twice, in one output."""
    logprobs = (before.logprobs or []) + (more.logprobs or [])
    return replace(
        more,
        token_ids=before.token_ids + more.token_ids,
        logprobs=logprobs or None,
        prompt_logprobs=before.prompt_logprobs,
    )


MOST_CELLS = 480  # of a map of the KV cache


@dataclass(frozen=True, slots=True)
class ExecutorStats:
    """One look at a running executor. Counters only grow; the rest are of this moment.

    num_remembered_kv_blocks: of the free ones, those that keep a prefix; None where the engine does
    not say. num_prompt_tokens were computed, num_cached_tokens of prompts found in the KV cache.
    num_draft_tokens were guessed and computed, num_accepted_tokens of them right. iterations_s: of
    all iterations, and num_in_iterations the sequences that each had, summed; None where the engine
    does not say.

    kv_blocks: a map of the KV cache, a byte for each block, or for as many as MOST_CELLS of them,
    evenly: 0 free, 1 free with a prefix that can be found, 2 held by a sequence, 3 by several; None
    where the engine does not say. preempted: the ids of sequences that run
    no more, as others need their room, and wait to be computed again.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_kv_blocks: int = 0
    num_free_kv_blocks: int = 0
    num_remembered_kv_blocks: int | None = None
    num_iterations: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    iterations_s: float | None = None
    num_in_iterations: int | None = None
    kv_blocks: bytes | None = None
    preempted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a server and its users must know of the engine that is running.

    kv_cache_bytes: what keys and values take at most, on each GPU or on the CPU.
    scores_prompts: whether it can tell the log probabilities of a prompt's tokens.
    embedding_size: how many numbers an embedding has; 0 where the engine gives none.
    max_queue_*: what the engine host lets wait, as its QueueLimits say; None before it has.
    """

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
    kv_cache_bytes: int
    eos_token_ids: tuple[int, ...]
    digest: str
    created: int  # seconds since the epoch
    scores_prompts: bool = True
    embedding_size: int = 0
    max_queue_requests: int | None = None
    max_queue_tokens: int | None = None
    max_queue_s: float | None = None
