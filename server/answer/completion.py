"""One request's answer while it grows: its choices, counts and moments, in no endpoint's form.

Here the choices of a request are gathered (choice.py makes each); a form of `server/api/` tells
them. This file does not know HTTP; the engine is whatever has the two protocols below.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
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
from enginehouse.server.answer.choice import Choice, Endings
from enginehouse.server.answer.framing import Framing
from enginehouse.server.answer.prompt_scores import PromptScores
from enginehouse.server.text.answer import (
    AnswerParser,
    Content,
    Part,
    PlainParser,
)
from enginehouse.server.text.detokenizer import TokenPieces
from enginehouse.server.text.logprobs import TokenEntry


class Generation(Protocol):
    """The running choices of one request; see runtime/host/client.py."""

    @property
    def finished(self) -> bool: ...
    @property
    def begun(self) -> bool: ...
    @property
    def preempted(self) -> frozenset[int]: ...
    @property
    def has_output(self) -> bool: ...
    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None: ...
    def cancel(self, index: int | None = None) -> None: ...


class EngineClient(Protocol):
    """What the server needs of runtime/host/client.py; tests have a scripted twin."""

    @property
    def ready(self) -> bool: ...
    @property
    def stands_still(self) -> bool: ...
    @property
    def info(self) -> EngineInfo: ...
    @property
    def stats(self) -> ExecutorStats: ...
    def check_room(self) -> None: ...
    def submit(
        self,
        prompt_ids: list[int],
        samplings: list[SamplingParams],
        priority: int = 0,
        label: str = "",
    ) -> Generation: ...


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
    """What is new of one choice, and the reason when it was its last."""

    index: int
    parts: tuple[Part, ...] = ()
    finish_reason: str | None = None
    entries: tuple[TokenEntry, ...] = ()
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Content))


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is to be answered, and how it is told.

    num_sequences are generated for each of num_prompts; num_returned of them, the best by mean
    logprob, are told. num_logprobs None: no log probabilities are told; num_prompt_logprobs: the
    same of the prompts' tokens, in vLLM's shape. kept_ids: special tokens whose text is shown to
    the parser. only_calls: nothing else is asked for.
    """

    model: str
    pieces: TokenPieces
    prices: Prices
    num_prompt_tokens: int
    num_prompts: int = 1
    num_sequences: int = 1
    num_returned: int = 1
    endings: Endings = Endings()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    kept_ids: frozenset[int] = frozenset()
    only_calls: bool = False
    fingerprint: str | None = None


class Completion(ABC):
    """What every form of an answer is made of; `whole` and what yields events is the form's own.

    make_parser makes one AnswerParser for each choice. scores: of each prompt, where the engine was
    asked for the log probabilities of its tokens. started_s, submitted_s (to the engine),
    first_token_s, finished_s are read from `clock` (seconds, any origin). queued_s: as the engine
    tells. on_gap is called with the seconds between two outputs of a choice. unfinished_reason says
    how the choices ended that have no finish_reason of their own.
    """

    id_prefix: str
    framing: Framing
    operation = "chat"  # as OpenTelemetry's GenAI conventions name it

    def __init__(
        self,
        terms: Terms,
        make_parser: Callable[[], AnswerParser] = PlainParser,
        *,
        scores: Sequence[PromptScores] = (),
        completion_id: str | None = None,
        created: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        started_s: float | None = None,
    ) -> None:
        ranks = terms.num_sequences > terms.num_returned
        self.choices = [
            Choice(
                terms.pieces,
                terms.endings,
                make_parser(),
                wants_logprobs=ranks or terms.num_logprobs is not None,
                kept_ids=terms.kept_ids,
            )
            for _ in range(terms.num_prompts * terms.num_sequences)
        ]
        self.terms = terms
        self.scores = scores
        self.unfinished_reason = "cancelled"  # until it runs, only a client that left can end it
        self.started_s = clock() if started_s is None else started_s
        self.submitted_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.queued_s: float | None = None
        self.on_gap: Callable[[float], None] = lambda seconds: None
        self.completion_id = completion_id or f"{self.id_prefix}{secrets.token_hex(16)}"
        self.created = int(time.time()) if created is None else created
        self._clock = clock
        self._last_s: dict[int, float] = {}

    @property
    def is_large(self) -> bool:
        """Whether to tell it may take long: a prompt's scores may."""
        return bool(self.scores)

    @property
    def num_prompt_tokens(self) -> int:
        return self.terms.num_prompt_tokens

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    @property
    def finished(self) -> bool:
        for choice in self.choices:  # asked for with each token: all() and a generator cost more
            if choice.finish_reason is None:
                return False
        return True

    def run(
        self, generation: Generation | None, silence_s: float | None = None
    ) -> Generator[Delta | None, None, None]:
        """Take outputs until every choice has ended; None whenever silence_s passed without one.

        generation None: nothing may be generated, every choice ends at once by its length.
        Whatever ends this early cancels what still runs. Raises ClientGone when the generation was
        cancelled from outside, HostUnavailable and EngineError when the engine gives up, and
        RequestError when it refuses the request.
        """
        if generation is None:
            for index, choice in enumerate(self.choices):
                choice.finish_empty()
                yield Delta(index, (), choice.finish_reason)
            self.finished_s = self._clock()
            return
        self.unfinished_reason = "error"
        self.submitted_s = self._clock()
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
        except BaseException as error:  # no Exception: it is left, or its greenlet is ended
            if isinstance(error, ClientGone) or not isinstance(error, Exception):
                self.unfinished_reason = "cancelled"
            raise
        finally:
            if not self.finished:
                generation.cancel()

    def _take_scores(self, index: int, output: TokenOutput) -> None:
        """They come with a prompt's first choice, and before its first token."""
        scores = self.scores[self._prompt_of(index)]
        scores.push(output.prompt_logprobs or [])
        begins = bool(output.token_ids) or output.finish_reason is not None
        if begins and scores.num_missing and index % self.terms.num_sequences == 0:
            raise EngineError(f"the engine sent no logprobs for {scores.num_missing} prompt tokens")

    def _prompt_of(self, index: int) -> int:
        """The number of a choice's prompt."""
        return index // self.terms.num_sequences

    def _advance(self, generation: Generation, index: int, output: TokenOutput) -> Delta | None:
        if output.finish_reason is FinishReason.ERROR:
            if output.refusal is not None:
                raise output.refusal.error()
            raise EngineError(output.error or "the engine gave no reason")
        if output.finish_reason is FinishReason.CANCELLED:
            raise HostUnavailable("it cancelled this request; send it again")
        if self.scores:
            self._take_scores(index, output)
        if output.token_ids:
            self._take_time(index, output)
        choice = self.choices[index]
        if choice.finish_reason is not None:
            return None
        num_entries = len(choice.entries)
        parts = choice.push(output)
        if choice.finish_reason is not None and output.finish_reason is None:
            generation.cancel(index)
        entries = tuple(choice.entries[num_entries:])
        return Delta(index, tuple(parts), choice.finish_reason, entries, choice.stop_reason)

    def _take_time(self, index: int, output: TokenOutput) -> None:
        now, before = self._clock(), self._last_s.get(index)
        self._last_s[index] = now
        if before is not None:
            self.on_gap(now - before)
        if self.first_token_s is None:
            self.first_token_s, self.queued_s = now, output.queued_s

    @property
    def num_cached_tokens(self) -> int:
        """What every sequence of a prompt found: one may find what another has just computed."""
        count = self.terms.num_sequences
        groups = [self.choices[i : i + count] for i in range(0, len(self.choices), count)]
        return sum(min(choice.num_cached_tokens for choice in group) for group in groups)

    @property
    def cost(self) -> float:
        """Dollars."""
        return self.terms.prices.cost(self.num_prompt_tokens, self.num_completion_tokens)

    def returned(self) -> list[tuple[int, Choice]]:
        """The choices that are told, with the number of each one's prompt."""
        count, best = self.terms.num_sequences, self.terms.num_returned
        told = []
        for start in range(0, len(self.choices), count):
            group = self.choices[start : start + count]
            if best < count:
                group = sorted(group, key=lambda choice: -choice.mean_logprob)[:best]
            told += [(start // count, choice) for choice in group]
        return told

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The answer to a plain request."""

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with, before anything is known of the answer."""

    @abstractmethod
    def told(self, delta: Delta) -> list[dict[str, Any]]:
        """What of a stream is new with a delta; nothing where that is held back."""

    @abstractmethod
    def closing(self) -> list[dict[str, Any]]:
        """What a stream ends with that ran to its end."""

    @abstractmethod
    def failing(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        """What a stream ends with that has begun and cannot go on. error: OpenAI's object."""

    def told_at_once(self, delta: Delta) -> bytes | None:
        """The event of a delta that is one piece of text and no more, as nearly all are, where a
        form is quicker about that; None for any other.
        """
        return None
