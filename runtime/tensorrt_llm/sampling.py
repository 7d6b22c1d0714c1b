"""One request in TensorRT-LLM's words: SamplingParams' and GuidedDecodingParams' fields.

Plain values, so that every line can be read and tested without TensorRT-LLM.
Source: TensorRT-LLM 1.2.1, `SamplingParams` and `GuidedDecodingParams`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.executor import check_request
from enginehouse.runtime.grammar.constraint import check
from enginehouse.runtime.grammar.support import TENSORRT_LLM
from enginehouse.runtime.request import Constraint, ConstraintKind, Request, SamplingParams

_SEED_BITS = 63
# Of the host's memory: TensorRT-LLM gives out the logits of a whole prompt at once.
MAX_CONTEXT_LOGITS_BYTES = 2 << 30
_GUIDES = {
    ConstraintKind.JSON_SCHEMA: "json",
    ConstraintKind.REGEX: "regex",
    ConstraintKind.EBNF: "grammar",
    ConstraintKind.STRUCTURAL_TAG: "structural_tag",
}


def check_for_trtllm(
    request: Request,
    *,
    max_seq_len: int,
    max_input_len: int,
    vocab_size: int,
    num_eos: int,
    context_logits: bool,
) -> None:
    """RequestError for what this engine can never run.

    context_logits: whether it was built to give the logits of a prompt.
    """
    sampling = request.sampling
    longest = min(max_seq_len - 1, max_input_len)
    check_request(request, longest=longest, max_seq_len=max_seq_len, vocab_size=vocab_size)
    if sampling.num_prompt_logprobs is not None:
        _check_scored(len(request.prompt_ids), vocab_size, context_logits)
    if not 0.0 <= sampling.min_p <= 1.0:  # TensorRT-LLM does not look
        raise RequestError(f"min_p is {sampling.min_p}; wanted 0 to 1", param="min_p")
    num_stops = len(sampling.stop_token_ids) + (0 if sampling.ignore_eos else num_eos)
    if sampling.min_tokens > 1 and num_stops > 1:
        raise RequestError(
            f"min_tokens is {sampling.min_tokens}, and {num_stops} tokens end this sequence; "
            "TensorRT-LLM holds back one of them only: leave min_tokens out, or set ignore_eos",
            param="min_tokens",
        )


def _check_scored(prompt_len: int, vocab_size: int, context_logits: bool) -> None:
    if not context_logits:
        raise RequestError(
            "the engine was built without gather_context_logits and tells no log probabilities of "
            "a prompt; build it with trtllm_build: {gather_context_logits: true}, or do not ask",
            param="prompt_logprobs",
            code="unsupported_parameter",
        )
    most = MAX_CONTEXT_LOGITS_BYTES // (4 * vocab_size)
    if prompt_len > most:
        raise RequestError(
            f"the prompt has {prompt_len} tokens; with log probabilities of its own TensorRT-LLM "
            f"takes at most {most} here, as it holds all of their logits at once: shorten it",
            param="prompt_logprobs",
            code="context_length_exceeded",
        )


def sampling_fields(
    request: Request, *, max_seq_len: int, eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    """The keyword arguments of SamplingParams; `guided_decoding` holds GuidedDecodingParams'.

    embedding_bias holds (token id, bias) pairs: the executor makes a tensor of them. max_tokens is
    1 at least; of a request for 0 `output.py` tells no token.
    """
    sampling = request.sampling
    prompt_len = len(request.prompt_ids)
    eos = () if sampling.ignore_eos else tuple(eos_token_ids)
    fields: dict[str, Any] = {
        "detokenize": False,
        "max_tokens": max(1, min(sampling.max_tokens, max_seq_len - prompt_len)),
        "seed": _seed(sampling.seed),
        **_choice_fields(sampling),
    }
    if eos_token_ids:
        fields["end_id"] = fields["pad_id"] = eos_token_ids[0]
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    if stops := list(dict.fromkeys((*eos, *sampling.stop_token_ids))):
        fields["stop_token_ids"] = stops
    if sampling.min_tokens > 1:
        fields["min_tokens"] = sampling.min_tokens
    if sampling.repetition_penalty != 1.0:
        fields["repetition_penalty"] = sampling.repetition_penalty
    if sampling.presence_penalty or sampling.frequency_penalty:
        fields["presence_penalty"] = sampling.presence_penalty
        fields["frequency_penalty"] = sampling.frequency_penalty
        fields["prompt_ignore_length"] = prompt_len  # OpenAI's count generated tokens only
    if sampling.logit_bias:
        fields["embedding_bias"] = sampling.logit_bias
    if sampling.num_logprobs is not None:
        fields["logprobs"] = max(sampling.num_logprobs, 1)  # 0 would be none at all
    if sampling.num_prompt_logprobs is not None:
        fields["return_context_logits"] = True
    if sampling.constraint is not None:
        fields["guided_decoding"] = guided_fields(sampling.constraint)
    return fields


def _choice_fields(sampling: SamplingParams) -> dict[str, Any]:
    """Every one of them is said: setting only some changes what the others mean.

    Greedy is top_k 1, which needs no division by a temperature of 0.
    """
    if sampling.temperature == 0.0:
        return {"top_k": 1}
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_k": max(sampling.top_k, 0),
        "top_p": sampling.top_p,
    }
    if sampling.min_p > 0.0:
        fields["min_p"] = sampling.min_p
    return fields


def _seed(seed: int | None) -> int:
    """TensorRT-LLM's default is 0 for everybody: equal prompts would get equal answers."""
    return secrets.randbits(_SEED_BITS) if seed is None else seed & ((1 << _SEED_BITS) - 1)


def guided_fields(constraint: Constraint) -> dict[str, Any]:
    """The one field of GuidedDecodingParams that says the constraint.

    A choice is a grammar, and JSON_OBJECT a schema, as TensorRT-LLM's json_object takes any JSON.
    RequestError for what the xgrammar that TensorRT-LLM is compiled with does not enforce,
    whichever Python package lies beside it.
    """
    checked = check(constraint, TENSORRT_LLM)
    return {_GUIDES[checked.kind]: checked.value}
