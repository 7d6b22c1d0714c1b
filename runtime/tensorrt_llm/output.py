"""TensorRT-LLM's answers in this project's words: RequestOutput -> TokenOutput.

Source: TensorRT-LLM 1.2.1, `RequestOutput`, `CompletionOutput` and `Logprob`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import (
    FinishReason,
    Refusal,
    Request,
    TokenLogprobs,
    TokenOutput,
)

_FINISHES = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "cancelled": FinishReason.CANCELLED,
}
_CONSTRAINT_WORDS = ("guided", "grammar", "schema", "regex", "structural")


def token_output(request: Request, result: Any, eos_token_ids: Sequence[int]) -> TokenOutput:
    """What one response adds to its sequence.

    TensorRT-LLM takes a stop token off and names it in stop_reason; an end-of-sequence token it
    may leave at the end, and names nowhere: here neither is among the tokens.
    """
    completion, sampling = result.outputs[0], request.sampling
    token_ids = list(completion.token_ids_diff)
    finish, error, stop_token_id = None, None, None
    if completion.finish_reason is not None:
        finish = _FINISHES.get(completion.finish_reason, FinishReason.ERROR)
    if finish is FinishReason.ERROR:
        error = f"TensorRT-LLM ended the sequence: {completion.finish_reason}"
    if finish is FinishReason.STOP:
        eos = () if sampling.ignore_eos else tuple(eos_token_ids)
        if token_ids and token_ids[-1] in (*eos, *sampling.stop_token_ids):
            stop_token_id = token_ids.pop()
        elif completion.stop_reason is not None:
            stop_token_id = completion.stop_reason
        else:
            stop_token_id = next(iter(eos), None)  # end_id is the first of them
    logprobs = None
    if sampling.num_logprobs is not None:
        logprobs = token_logprobs(token_ids, completion.logprobs_diff, sampling.num_logprobs)
    return TokenOutput(
        request.request_id,
        token_ids,
        finish,
        num_cached_tokens=int(getattr(result, "cached_tokens", 0) or 0),
        error=error,
        logprobs=logprobs,
        stop_token_id=stop_token_id,
    )


def token_logprobs(
    token_ids: Sequence[int], entries: Iterable[Mapping[int, Any]], num_top: int
) -> list[TokenLogprobs]:
    """From {token id: Logprob} for each token, the chosen one beside the likeliest.

    The entry of a stop token, which is none of token_ids, comes last and is left out.
    """
    found = []
    for token, entry in zip(token_ids, entries, strict=False):
        ranked = sorted(entry.items(), key=lambda item: item[1].logprob, reverse=True)
        top = tuple((other, value.logprob) for other, value in ranked[:num_top])
        found.append(TokenLogprobs(entry[token].logprob, top))
    return found


def failed_output(request: Request, error: BaseException) -> TokenOutput:
    """A sequence's end by an exception; a constraint that does not compile is its sender's."""
    constraint, refusal = request.sampling.constraint, None
    message = f"TensorRT-LLM failed: {error}"
    if isinstance(error, RequestError):
        message = error.message
        refusal = Refusal(message, constraint.param if constraint else error.param, error.code)
    elif constraint is not None and any(word in str(error).lower() for word in _CONSTRAINT_WORDS):
        refusal = Refusal(f"{constraint.param} cannot be followed: {error}", constraint.param)
    return TokenOutput(
        request.request_id, finish_reason=FinishReason.ERROR, error=message, refusal=refusal
    )


def bias_tensor(pairs: Iterable[tuple[int, float]], vocab_size: int) -> torch.Tensor:
    """float32 [vocab_size]: what is added to each token's logit in every iteration."""
    bias = torch.zeros(vocab_size, dtype=torch.float32)
    for token, value in pairs:
        bias[token] = value
    return bias
