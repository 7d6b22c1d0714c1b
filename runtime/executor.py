"""The Executor protocol: what every backend is to those who run sequences on it.

An executor takes sequences, runs them in flight together, and hands out their tokens as they
come. It knows neither text nor sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.request import (
    EngineInfo,
    ExecutorStats,
    FinishReason,
    Request,
    SamplingParams,
    TokenOutput,
)


class RemoteRanks(NamedTuple):
    """Ranks of TensorRT plans on other machines. address: HOST:PORT, where the leader listens for
    them. key_file: holds the secret that both sides prove to have. num_local: ranks of the leader's
    machine, its own among them; the others come.
    """

    address: str
    key_file: Path
    num_local: int = 1


class ExecutorOptions(NamedTuple):
    """What may be decided when an engine is opened; None keeps the engine's own limit.

    deterministic: nothing that runs beside a sequence, or ran before it, changes its tokens.
    grammar_timeout_s: how long a constraint may take to compile. grammars_at_once: start what
    compiles them with the engine, not with the first constraint. tp_size: of a Hugging Face
    checkpoint, as an engine has its own. start_s: how long TensorRT-LLM may take to start.
    device: of the torch backend, auto, cpu or cuda. prefill_ms: what prompts may add to an
    iteration in which others are answered, on a CPU; None: three quarters of what it takes without.
    speculative: of backend=cpu, ngram or off; and with ngram, how many tokens are drafted, how many
    of the last are looked for, and beside how many sequences, all at most. shared_weights: of
    backend=cpu, map the packed weights, whose pages others share, and read nothing into large ones.
    """

    max_seq_len: int | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    kv_cache_gib: float | None = None
    compute_dtype: str | None = None
    num_threads: int | None = None
    deterministic: bool = False
    grammar_timeout_s: float | None = None
    tp_size: int | None = None
    start_s: float | None = None
    device: str = "auto"
    grammars_at_once: bool = False
    prefill_ms: float | None = None
    speculative: str | None = None
    num_speculative_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    speculative_batch_size: int | None = None
    shared_weights: bool = False
    remote_ranks: RemoteRanks | None = None


def limit_within(name: str, asked: int | None, built: int) -> int:
    """What was asked for, else what the engine was built for; EngineError when it is more."""
    if asked is not None and asked > built:
        raise EngineError(
            f"{name}={asked} was asked for and the engine was built for {built}; "
            f"ask for at most {built}, or build it again with more"
        )
    return asked or built


def no_prefill_ms(where: str) -> str:
    """Why it is refused there."""
    return f"prefill_ms bounds prompts on a CPU, and this is {where}; leave it out"


def check_speculation(options: ExecutorOptions, backend: str) -> None:
    """EngineError where drafts are asked for, and none can be made."""
    numbers = ("num_speculative_tokens", "max_matching_ngram_size", "speculative_batch_size")
    asked = [name for name in numbers if getattr(options, name) is not None]
    if asked and options.speculative == "off":
        raise EngineError(
            f"{asked[0]} says how tokens are drafted, and speculative=off that none are; leave one "
            "of the two out"
        )
    if options.speculative == "ngram":
        asked.insert(0, "speculative=ngram")
    if asked and backend != "cpu":
        raise EngineError(
            f"{asked[0]} is for drafts of tokens, which backend=cpu makes, and this is "
            f"backend={backend}; leave it out"
        )


def check_request(
    request: Request, *, longest: int, max_seq_len: int, vocab_size: int, embedding_size: int = 0
) -> None:
    """RequestError for what no backend can run: a prompt of more than `longest` tokens, ids that
    are not of the vocabulary, or an embedding that the engine does not give.
    """
    prompt, sampling = request.prompt_ids, request.sampling
    if not 1 <= len(prompt) <= longest:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; wanted 1 to {longest}, as this model's maximum "
            f"context length is {max_seq_len} tokens",
            param="messages",
            code="context_length_exceeded",
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise RequestError(f"a prompt token is outside the vocabulary of {vocab_size}")
    if sampling.max_tokens < 0:
        raise RequestError(
            f"max_tokens is {sampling.max_tokens}; wanted at least 0", param="max_tokens"
        )
    if any(not 0 <= token_id < vocab_size for token_id in sampling.stop_token_ids):
        raise RequestError(
            f"stop_token_ids names a token outside the vocabulary of {vocab_size}",
            param="stop_token_ids",
            code="invalid_value",
        )
    if any(not 0 <= token_id < vocab_size for token_id, _ in sampling.logit_bias):
        raise RequestError(
            f"logit_bias names a token outside the vocabulary of {vocab_size}",
            param="logit_bias",
            code="invalid_value",
        )
    if sampling.pooling is not None:
        _check_pooling(sampling, embedding_size)


def _check_pooling(sampling: SamplingParams, embedding_size: int) -> None:
    if not embedding_size:
        raise RequestError(
            "this engine gives no embeddings, as its backend tells no hidden states; serve one "
            "that was built with --backend cpu or torch",
            code="unsupported_parameter",
        )
    pooling = sampling.pooling
    if pooling is not None and not 1 <= (pooling.dimensions or 1) <= embedding_size:
        raise RequestError(
            f"dimensions is {pooling.dimensions}; wanted 1 to {embedding_size}, the size of this "
            "model's embeddings",
            param="dimensions",
        )
    if sampling.max_tokens or sampling.num_prompt_logprobs is not None:
        raise RequestError("an embedding is asked for, and tokens or their logprobs beside it")


def unexpected(error: Exception) -> EngineError:
    """What one request's sender is told of an error that is nobody's known fault."""
    said = " ".join(str(error).split())[:200]
    what = type(error).__name__ + (f": {said}" if said else "")
    return EngineError(f"the engine failed on this request alone ({what}); its log says where")


class Executor(Protocol):
    """In-flight batching over one engine. Not thread-safe: one loop owns it.

    What fails for one sequence ends that sequence, with an output that says so; what `poll` raises
    is the end of them all. on_planned is called in `poll` once an iteration is planned and before
    it is computed, by executors that plan their own; it may ask `waits`, and change nothing.
    """

    info: EngineInfo
    on_planned: Callable[[], None]

    def submit(self, request: Request) -> None:
        """Queue a sequence; RequestError when the engine can never run it."""

    def cancel(self, request_id: int) -> None:
        """Stop a sequence before the next iteration; it gives no further output."""

    def waits(self, request_id: int) -> bool:
        """Whether a sequence's prompt is not begun, as far as the engine tells."""

    def poll(self, timeout_s: float = 0.0) -> list[TokenOutput]:
        """What is new, after one iteration; waits at most timeout_s for engines that run alone."""

    @property
    def busy(self) -> bool:
        """Whether any sequence is unfinished."""

    def stats(self) -> ExecutorStats: ...

    def close(self) -> None:
        """Free the engine. Unfinished sequences are dropped."""


def stream(executor: Executor, request: Request) -> Iterator[TokenOutput]:
    """Run one sequence and yield its outputs; other sequences' outputs are lost: one user only."""
    executor.submit(request)
    finished = False
    try:
        while not finished:
            for output in executor.poll(0.1):
                if output.request_id == request.request_id:
                    finished = output.finish_reason is not None
                    yield output
    finally:
        if not finished:
            executor.cancel(request.request_id)


def generate(executor: Executor, requests: list[Request]) -> dict[int, list[int]]:
    """Run sequences together to their end: request_id -> generated token ids.

    Raises EngineError when the engine fails on one.
    """
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        executor.submit(request)
    while executor.busy:
        for output in executor.poll(0.1):
            if output.finish_reason is FinishReason.ERROR:
                raise EngineError(f"sequence {output.request_id} failed: {output.error}")
            tokens[output.request_id] += output.token_ids
    return tokens
