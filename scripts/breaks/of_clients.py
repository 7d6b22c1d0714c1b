"""Clients that read nothing, and clients that vanish in each phase of their request."""

from __future__ import annotations

import time
from collections.abc import Callable

from breaks.case import Case, Fault
from breaks.clients import Open, ask, body_of

_LIMIT_S = 3.0
_MANY = {"stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}  # megabytes of a stream
_LONG = 1800


def slow_readers(case: Case) -> None:
    """Of a stream and of a plain answer: each is more than what buffers hold."""
    began_s = time.monotonic()
    readers = [
        Open(case.port, body_of(_LONG, **{**_MANY, "stream": stream}), receive_bytes=4096)
        for stream in (True, False)
    ]
    cut = "enginehouse_slow_readers_total"
    case.wait(lambda: case.server.metrics().get(cut, 0) >= 2, "both are cut")
    seconds = time.monotonic() - began_s
    ends = [reader.rest() for reader in readers]
    case.saw = f"{', '.join(ends)} after {seconds:.1f} s"
    case.want("whole" not in ends, "a reader was given all of an answer that it had not read")
    case.want("its client took nothing for" in case.server.log, "the log does not say why")
    case.want(ask(case.port).what == "200", "others are answered")
    case.recovered(began_s + seconds)


def _vanishes(what: str, body: Callable[[], bytes], began: Callable[[Case], bool], count: int = 3):
    def run(case: Case) -> None:
        clients = [Open(case.port, body()) for _ in range(count)]
        case.wait(lambda: began(case), what)
        for client in clients:
            client.vanish()
        gone_s = time.monotonic()
        case.wait(case.server.is_idle, "all blocks are back")
        case.recovery_s = time.monotonic() - gone_s
        after = ask(case.port)
        case.saw = f"{count} gone {what}; the next: {after.what}"
        case.want(after.what == "200", "the next is answered")

    return run


def _running(case: Case) -> bool:
    return case.server.num_running >= 1


def _queued(case: Case) -> bool:
    return case.server.num_waiting >= 4


def _compiling(case: Case) -> bool:
    """A sequence that waits for its grammar waits, as the engine counts."""
    return case.server.num_waiting >= 1


def _grammar() -> bytes:
    """Seconds to compile, and another one each time."""
    properties = {f"p{i}": {"type": "string", "maxLength": 9000 + i} for i in range(12)}
    properties[f"q{time.monotonic_ns()}"] = {"type": "integer"}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return body_of(50, ignore_eos=False, response_format=form)


def _prompt() -> bytes:
    """Computed in pieces of few tokens: one of four dozen is in prefill for seconds."""
    text = " ".join(str(i) for i in range(450))
    return body_of(100, prompt=f"{time.monotonic_ns()} {text}", stream=True)


def _stream() -> bytes:
    """Of several choices: it runs for longer than the engine's statistics are old."""
    return body_of(_LONG, stream=True, n=4)


FAULTS = [
    Fault("slow-readers", slow_readers, {"ENGINEHOUSE_SEND_TIMEOUT_S": f"{_LIMIT_S:g}"}),
    Fault(
        "vanish-queued",
        _vanishes("queued", _stream, _queued, count=8),
        {"ENGINEHOUSE_MAX_BATCH_SIZE": "2"},
    ),
    Fault("vanish-grammar", _vanishes("while a grammar compiles", _grammar, _compiling)),
    Fault(
        "vanish-prefill",
        _vanishes("in prefill", _prompt, _running, count=48),
        {"ENGINEHOUSE_MAX_NUM_TOKENS": "16"},
    ),
    Fault("vanish-decode", _vanishes("in decode", _stream, _running), quick=False),
    Fault(
        "vanish-plain",
        _vanishes("of plain answers", lambda: body_of(_LONG, n=4), _running),
        quick=False,
    ),
]
