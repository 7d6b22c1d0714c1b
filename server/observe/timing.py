"""How long an answer took, in milliseconds, as its headers say it.

Source: W3C, "Server Timing"; OpenAI's API reference, "Debugging requests" (openai-processing-ms).
"""

from __future__ import annotations

from collections.abc import Iterator

from enginehouse.server.answer.completion import Completion


def server_timing(completion: Completion) -> str:
    """The value of Server-Timing: what is known by now, which of a stream is up to its first token,
    and of a whole answer all.
    """
    return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in _durations(completion))


def _durations(completion: Completion) -> Iterator[tuple[str, float]]:
    started_s, submitted_s = completion.started_s, completion.submitted_s
    first_s, ended_s = completion.first_token_s, completion.finished_s
    if submitted_s is not None:
        yield "prepare", submitted_s - started_s
        if first_s is not None:
            if completion.queued_s is not None:
                yield "queue", completion.queued_s
                yield "prefill", max(0.0, first_s - submitted_s - completion.queued_s)
            yield "ttft", first_s - started_s
    if ended_s is not None:
        if first_s is not None:
            yield "decode", ended_s - first_s
        yield "total", ended_s - started_s
