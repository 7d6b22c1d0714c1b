"""Token outputs -> OpenAI's chat completion objects, whole and in chunks, with usage and cost.

Here a sequence of ids becomes a choice: text, stop strings, finish_reason, counts. This file
does not know HTTP or SSE; the engine is whatever has the two protocols below.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

from enginehouse.runtime.errors import EngineError, HostUnavailable
from enginehouse.runtime.request import (
    EngineInfo,
    ExecutorStats,
    FinishReason,
    SamplingParams,
    TokenOutput,
)
from enginehouse.server.detokenizer import Detokenizer, StopMatcher, TokenPieces


class Generation(Protocol):
    """The running choices of one request; see runtime/client.py."""

    @property
    def finished(self) -> bool: ...
    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None: ...
    def cancel(self, index: int | None = None) -> None: ...


class EngineClient(Protocol):
    """What the server needs of runtime/client.py; tests have a scripted twin."""

    @property
    def ready(self) -> bool: ...
    @property
    def info(self) -> EngineInfo: ...
    @property
    def stats(self) -> ExecutorStats: ...
    def submit(self, prompt_ids: list[int], samplings: list[SamplingParams]) -> Generation: ...


class ClientGone(Exception):
    """Nobody waits for the answer any more; the generation was cancelled from outside."""


class Prices(NamedTuple):
    """Dollars per million tokens."""

    input: Decimal
    output: Decimal

    def cost(self, num_prompt_tokens: int, num_completion_tokens: int) -> float:
        """Dollars, computed exactly and rounded to 10 places."""
        micros = num_prompt_tokens * self.input + num_completion_tokens * self.output
        return float(round(micros / 1_000_000, 10))


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one choice, and the reason when it was its last."""

    index: int
    text: str
    finish_reason: str | None


class Choice:
    """One sequence on its way from token ids to a message."""

    def __init__(self, pieces: TokenPieces, stops: tuple[str, ...]) -> None:
        self.finish_reason: str | None = None
        self.num_tokens = 0
        self._detokenizer = Detokenizer(pieces)
        self._matcher = StopMatcher(stops)
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def push(self, output: TokenOutput) -> str:
        """Take one output, token by token: those after a stop string are neither shown nor counted.

        Returns the text that is certain now; finish_reason is set with the last of it.
        """
        start = len(self._texts)
        for token_id in output.token_ids:
            self.num_tokens += 1
            self._take(self._detokenizer.push([token_id]))
            if self.finish_reason is not None:
                break
        if output.finish_reason is not None and self.finish_reason is None:
            self._take(self._detokenizer.flush())
        if output.finish_reason is not None and self.finish_reason is None:
            text, stop = self._matcher.flush()
            self._texts.append(text)
            self.finish_reason = "stop" if stop is not None else output.finish_reason.value
        return "".join(self._texts[start:])

    def _take(self, text: str) -> None:
        text, stop = self._matcher.push(text)
        self._texts.append(text)
        if stop is not None:
            self.finish_reason = "stop"


class Completion:
    """One request's answer while it grows; knows its shape, counts, and moments.

    started_s, first_token_s, finished_s are read from `clock` (seconds, any origin).
    unfinished_reason says how the choices ended that have no finish_reason of their own.
    """

    def __init__(
        self,
        *,
        model: str,
        pieces: TokenPieces,
        num_choices: int,
        stops: tuple[str, ...],
        num_prompt_tokens: int,
        prices: Prices,
        include_usage: bool = False,
        completion_id: str | None = None,
        created: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        started_s: float | None = None,
    ) -> None:
        self.choices = [Choice(pieces, stops) for _ in range(num_choices)]
        self.num_prompt_tokens = num_prompt_tokens
        self.include_usage = include_usage
        self.unfinished_reason = "cancelled"  # until it runs, only a client that left can end it
        self.started_s = clock() if started_s is None else started_s
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self._id = completion_id or new_completion_id()
        self._created = int(time.time()) if created is None else created
        self._model = model
        self._prices = prices
        self._clock = clock

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    def run(
        self, generation: Generation | None, silence_s: float | None = None
    ) -> Generator[Delta | None, None, None]:
        """Take outputs until every choice has ended; None whenever silence_s passed without one.

        generation None: nothing may be generated, every choice ends at once by its length.
        Whatever ends this early cancels what still runs. Raises ClientGone when the generation was
        cancelled from outside, HostUnavailable and EngineError when the engine gives up.
        """
        if generation is None:
            for index, choice in enumerate(self.choices):
                choice.finish_reason = FinishReason.LENGTH.value
                yield Delta(index, "", choice.finish_reason)
            self.finished_s = self._clock()
            return
        self.unfinished_reason = "error"
        try:
            while not self.finished:
                item = None if generation.finished else generation.get(silence_s)
                if item is not None:
                    yield self._advance(generation, *item)
                elif generation.finished:
                    raise ClientGone
                else:
                    yield None
            self.finished_s = self._clock()
        except (ClientGone, GeneratorExit):
            self.unfinished_reason = "cancelled"
            raise
        finally:
            if not self.finished:
                generation.cancel()

    def _advance(self, generation: Generation, index: int, output: TokenOutput) -> Delta | None:
        if output.finish_reason is FinishReason.ERROR:
            raise EngineError(output.error or "the engine gave no reason")
        if output.finish_reason is FinishReason.CANCELLED:
            raise HostUnavailable("it cancelled this request; send it again")
        if output.token_ids and self.first_token_s is None:
            self.first_token_s = self._clock()
        choice = self.choices[index]
        if choice.finish_reason is not None:
            return None
        text = choice.push(output)
        if choice.finish_reason is not None and output.finish_reason is None:
            generation.cancel(index)
        return Delta(index, text, choice.finish_reason)

    def usage(self) -> dict[str, Any]:
        """The prompt counts once, however many choices it has."""
        num_prompt, num_completion = self.num_prompt_tokens, self.num_completion_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "estimated_cost": self._prices.cost(num_prompt, num_completion),
        }

    def whole(self) -> dict[str, Any]:
        """The answer to a plain request."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text},
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    def opening_chunks(self) -> list[dict[str, Any]]:
        """The first chunk of every choice: the role, once."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta, None) for index in range(len(self.choices))]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The text if there is any; then an empty delta when it was the choice's last."""
        chunks = []
        if delta.text:
            chunks.append(self._chunk(delta.index, {"content": delta.text}, None))
        if delta.finish_reason is not None:
            chunks.append(self._chunk(delta.index, {}, delta.finish_reason))
        return chunks

    def closing_chunks(self) -> list[dict[str, Any]]:
        """The usage, when stream_options asked for it."""
        if not self.include_usage:
            return []
        return [{**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}]

    def _chunk(
        self, index: int, delta: dict[str, str], finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.include_usage:  # OpenAI: the field is in every chunk, null in all but the last
            chunk["usage"] = None
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }


def new_completion_id() -> str:
    return f"chatcmpl-{secrets.token_hex(16)}"
