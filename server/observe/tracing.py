"""A request as spans: HTTP, the answer, and of that queue, prefill and decode. Without a library.

What becomes of spans is otel.py's, which is imported only where an endpoint is set.
Source: OpenTelemetry semantic conventions, "HTTP spans" and "Generative AI spans".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from enginehouse.runtime.request import SamplingParams
from enginehouse.server.answer.completion import Completion, Generation

TRACE = "enginehouse.trace"  # in WSGI's environ
PROPAGATED = ("traceparent", "tracestate")  # W3C, "Trace Context"


class Part(NamedTuple):
    """Of an answer, on the clock of its completion."""

    name: str
    start_s: float
    end_s: float


class Trace(Protocol):
    """The spans of one request."""

    trace_id: str

    def asked(self, sampling: SamplingParams) -> None:
        """What the engine is asked for; of several sequences, the first."""

    def answered(self, completion: Completion, generation: Generation | None) -> None:
        """The answer has ended, whole or not."""

    def end(self, status: int | None, route: str | None) -> None:
        """All of it is sent. Once; more calls do nothing. None: gunicorn ended it."""


class Tracing(Protocol):
    """Where spans go. Nothing here waits for anybody."""

    def begin(self, method: str, path: str, carried: Mapping[str, str]) -> Trace:
        """carried: those of PROPAGATED that the client sent, whose trace is gone on with."""

    def close(self) -> None:
        """Send what is left, for as long as that takes a moment."""


def open_tracing(endpoint: str | None) -> Tracing | None:
    """None where no endpoint is set."""
    if endpoint is None:
        return None
    from enginehouse.server.observe.otel import OtelTracing

    return OtelTracing(endpoint)


def parts_of(completion: Completion, generation: Generation | None, now_s: float) -> Iterator[Part]:
    """How far an answer has come by `now_s`. What no engine tells apart is one part."""
    submitted_s, first_s = completion.submitted_s, completion.first_token_s
    if submitted_s is None:
        return
    queued_s = completion.queued_s
    begun_s = first_s if first_s is not None else now_s
    if queued_s is not None and first_s is not None:
        yield Part("queue", submitted_s, submitted_s + queued_s)
        yield Part("prefill", submitted_s + queued_s, max(first_s, submitted_s + queued_s))
    elif first_s is None and (generation is None or not generation.begun):
        yield Part("queue", submitted_s, begun_s)
    else:
        yield Part("queue and prefill", submitted_s, begun_s)
    if first_s is not None:
        yield Part("decode", first_s, completion.finished_s or now_s)


def sampling_attributes(sampling: SamplingParams) -> dict[str, Any]:
    """As the conventions name what was asked for, a seed that nobody chose left out."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")
    values = {name: getattr(sampling, name) for name in (*names, "seed")}
    return {f"gen_ai.request.{name}": v for name, v in values.items() if v is not None}


def attributes_of(completion: Completion) -> dict[str, Any]:
    """What of an answer is told beside its times; no text of it."""
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": completion.operation,
        "gen_ai.provider.name": "enginehouse",
        "gen_ai.request.model": completion.terms.model,
        "gen_ai.response.model": completion.terms.model,
        "gen_ai.response.id": completion.completion_id,
        "gen_ai.response.finish_reasons": [
            choice.finish_reason or completion.unfinished_reason for choice in completion.choices
        ],
        "gen_ai.usage.input_tokens": completion.num_prompt_tokens,
        "gen_ai.usage.output_tokens": completion.num_completion_tokens,
    }
    if completion.terms.num_returned > 1:
        attributes["gen_ai.request.choice.count"] = completion.terms.num_returned
    if completion.first_token_s is not None:
        seconds = completion.first_token_s - completion.started_s
        attributes["gen_ai.response.time_to_first_chunk"] = seconds
    if not completion.finished:
        attributes["error.type"] = completion.unfinished_reason
    return attributes
