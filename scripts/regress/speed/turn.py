"""One burst of streams on one server: what it took. Knows no other server."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence

import msgspec

from enginehouse.regress.subject.api import COMPLETIONS, Api
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.stream_reader import parse_chunk

_JOIN_S = 900.0


class Turn(msgspec.Struct, frozen=True):
    """clients: streams at once. num_tokens: of all. seconds: from the first request to the last
    token. ttft_ms: of each stream. step_ms: of each stream, from its first token to its last over
    the steps between. gap_ms: between pieces of text, all streams'.
    """

    clients: int
    num_tokens: int
    seconds: float
    ttft_ms: list[float]
    step_ms: list[float]
    gap_ms: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def ttft(self) -> float:
        return statistics.median(self.ttft_ms)

    @property
    def step(self) -> float | None:
        """Time between tokens, ms, mean of the streams; None where answers came in one piece."""
        return statistics.fmean(self.step_ms) if self.step_ms and self.gap_ms else None


def take_turn(
    api: Api, prompts: Sequence[str | list[int]], num_tokens: int, *, ignore_eos: bool
) -> Turn:
    """Stream a completion of each prompt, all at once, at temperature 0.

    Raises EnginehouseError when a stream fails or ends with no token.
    """
    starts: list[float] = [0.0] * len(prompts)
    times: list[list[float]] = [[] for _ in prompts]
    counts: list[int] = [0] * len(prompts)
    failed: list[Exception] = []
    fields = {"max_tokens": num_tokens, "temperature": 0}
    fields |= {"ignore_eos": True} if ignore_eos else {}
    gate = threading.Barrier(len(prompts))

    def client(index: int) -> None:
        gate.wait()
        starts[index] = time.monotonic()
        try:
            lines = api.lines(
                COMPLETIONS,
                prompt=prompts[index],
                stream_options={"include_usage": True},
                **fields,
            )
            for data in lines:
                if data == "[DONE]":
                    break
                chunk = parse_chunk(data)
                if any(choice.get("text") for choice in chunk.get("choices", [])):
                    times[index].append(time.monotonic())
                usage = chunk.get("usage")
                if usage:
                    counts[index] = int(usage["completion_tokens"])
        except (EnginehouseError, KeyError, TypeError, ValueError) as error:
            failed.append(error)

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_JOIN_S)
    if failed:
        raise EnginehouseError(f"a stream of the load failed: {failed[0]}")
    if not all(times) or any(thread.is_alive() for thread in threads):
        raise EnginehouseError("a stream of the load ended without a piece of text")
    tokens = [count or len(pieces) for count, pieces in zip(counts, times, strict=True)]
    return Turn(
        clients=len(prompts),
        num_tokens=sum(tokens),
        seconds=max(pieces[-1] for pieces in times) - min(starts),
        ttft_ms=[1000 * (pieces[0] - start) for start, pieces in zip(starts, times, strict=True)],
        step_ms=[
            1000 * (pieces[-1] - pieces[0]) / (count - 1)
            for pieces, count in zip(times, tokens, strict=True)
            if count > 1
        ],
        gap_ms=[
            1000 * (b - a) for pieces in times for a, b in zip(pieces, pieces[1:], strict=False)
        ],
    )
