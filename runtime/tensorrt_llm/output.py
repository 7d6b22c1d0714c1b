"""TensorRT-LLM's answers in this project's words: RequestOutput -> TokenOutput.

Source: TensorRT-LLM 1.2.1, `RequestOutput`, `CompletionOutput` and `Logprob`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.logprobs import ROWS_AT_ONCE, logprobs_of_rows
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
    may leave at the end, and names nowhere: here neither is among the tokens. Of a request for no
    tokens, which TensorRT-LLM does not take, the one that it made is left out.
    """
    completion, sampling = result.outputs[0], request.sampling
    token_ids = list(completion.token_ids_diff)
    finish, error, stop_token_id = None, None, None
    if completion.finish_reason is not None:
        finish = _FINISHES.get(completion.finish_reason, FinishReason.ERROR)
    if finish is FinishReason.ERROR:
        error = f"TensorRT-LLM ended the sequence: {completion.finish_reason}"
    if sampling.max_tokens == 0 and finish in (None, FinishReason.STOP, FinishReason.LENGTH):
        return TokenOutput(request.request_id, [], FinishReason.LENGTH if finish else None)
    if finish is FinishReason.STOP:
        eos = () if sampling.ignore_eos else tuple(eos_token_ids)
        if token_ids and token_ids[-1] in (*eos, *sampling.stop_token_ids):
            stop_token_id = token_ids.pop()
        elif completion.stop_reason is not None:
            stop_token_id = completion.stop_reason
        else:
            stop_token_id = next(iter(eos), None)  # end_id is the first of them
    logprobs, stop_logprobs = None, None
    if sampling.num_logprobs is not None:
        entries = completion.logprobs_diff
        logprobs = token_logprobs(token_ids, entries, sampling.num_logprobs)
        if stop_token_id is not None and stop_token_id in _after(entries, len(token_ids)):
            ending = [stop_token_id], entries[len(token_ids) :], sampling.num_logprobs
            [stop_logprobs] = token_logprobs(*ending)
    return TokenOutput(
        request.request_id,
        token_ids,
        finish,
        num_cached_tokens=_num_cached(result),
        error=error,
        logprobs=logprobs,
        stop_token_id=stop_token_id,
        stop_logprobs=stop_logprobs,
    )


def _num_cached(result: Any) -> int:
    return int(getattr(result, "cached_tokens", 0) or 0)


def _after(entries: Sequence[Mapping[int, Any]], count: int) -> Mapping[int, Any]:
    """The entry behind those of the tokens, if there is one."""
    return entries[count] if len(entries) > count else {}


def prompt_logprobs(request: Request, result: Any, vocab_size: int) -> list[TokenLogprobs]:
    """Of each token of the prompt but the first, from a response's context logits.

    Those are [prompt tokens, vocab_size or more, as TP pads it], reduced some rows at a time.
    EngineError when they are not of every token: those of a cached prefix are not computed.
    """
    prompt, most = request.prompt_ids, request.sampling.num_prompt_logprobs or 0
    logits: torch.Tensor | None = result.context_logits
    found = 0 if logits is None else len(logits) - _num_cached(result)
    if logits is None or found != len(prompt):
        raise EngineError(f"it gave the logits of {found} of the prompt's {len(prompt)} tokens")
    scores: list[TokenLogprobs] = []
    for first in range(0, len(prompt) - 1, ROWS_AT_ONCE):
        tokens = prompt[first + 1 : first + 1 + ROWS_AT_ONCE]
        rows = logits[first : first + len(tokens), :vocab_size].float().log_softmax(dim=-1)
        scores += logprobs_of_rows(rows, tokens, [most] * len(tokens))
    return scores


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
