"""Token outputs -> OpenAI's chat completion objects, whole and in chunks, with usage and cost.

Here the choices of a request are gathered (choice.py makes each) and told. This file does not
know HTTP or SSE; the engine is whatever has the two protocols below.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

import msgspec

from enginehouse.runtime.errors import EngineError, HostUnavailable
from enginehouse.runtime.request import (
    EngineInfo,
    ExecutorStats,
    FinishReason,
    SamplingParams,
    TokenOutput,
)
from enginehouse.server.answer.chat_message import chat_deltas, chat_message
from enginehouse.server.answer.choice import Choice, Endings
from enginehouse.server.answer.prompt_scores import PromptScores
from enginehouse.server.text.answer import (
    AnswerParser,
    Content,
    Part,
    PlainParser,
)
from enginehouse.server.text.detokenizer import TokenPieces
from enginehouse.server.text.logprobs import TokenEntry, chat_logprobs

_CONTENT, _NO_CONTENT = b'"content":', b'"content":""'
_encode = msgspec.json.Encoder().encode


class Generation(Protocol):
    """The running choices of one request; see runtime/host/client.py."""

    @property
    def finished(self) -> bool: ...
    @property
    def begun(self) -> bool: ...
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


class Completion:
    """One request's answer while it grows; knows its shape, counts, and moments.

    make_parser makes one AnswerParser for each choice. scores: of each prompt, where the engine was
    asked for the log probabilities of its tokens. started_s, submitted_s (to the engine),
    first_token_s, finished_s are read from `clock` (seconds, any origin). queued_s: as the engine
    tells. on_gap is called with the seconds between two outputs of a choice. unfinished_reason says
    how the choices ended that have no finish_reason of their own.
    """

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

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
        self.completion_id = completion_id or f"{self.id_prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time()) if created is None else created
        self._clock = clock
        self._last_s: dict[int, float] = {}
        self._untold: list[list[TokenEntry]] = [[] for _ in self.choices]
        self._around: dict[int, tuple[bytes, bytes]] = {}
        self._only_text_is_new = terms.num_logprobs is None and not terms.continuous_usage

    @property
    def num_prompt_tokens(self) -> int:
        return self.terms.num_prompt_tokens

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

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

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has; all that was generated counts."""
        num_prompt, num_completion = self.num_prompt_tokens, self.num_completion_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens()},
            "estimated_cost": self.terms.prices.cost(num_prompt, num_completion),
        }

    def _num_cached_tokens(self) -> int:
        """What every sequence of a prompt found: one may find what another has just computed."""
        count = self.terms.num_sequences
        groups = [self.choices[i : i + count] for i in range(0, len(self.choices), count)]
        return sum(min(choice.num_cached_tokens for choice in group) for group in groups)

    def whole(self) -> dict[str, Any]:
        """The answer to a plain request."""
        choices = [
            {
                "index": index,
                "message": chat_message(choice, self.terms.only_calls),
                "logprobs": self._logprobs(choice.entries),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, (_, choice) in enumerate(self.returned())
        ]
        answer = {**self._head(self.kind), "choices": choices, "usage": self.usage()}
        return {**answer, **self._prompt_logprobs(0)}

    def _prompt_logprobs(self, prompt: int) -> dict[str, Any]:
        """vLLM's field, where it was asked for."""
        most = self.terms.num_prompt_logprobs
        return {} if most is None else {"prompt_logprobs": self.scores[prompt].by_id(most)}

    def opening_chunks(self) -> list[dict[str, Any]]:
        """The first chunk of every choice: the role, once."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta) for index in range(len(self.choices))]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The parts if there are any; then an empty delta when they were the choice's last.

        Log probabilities go with the first of them, and wait where there is none.
        """
        deltas = chat_deltas(delta.parts)
        untold = self._untold[delta.index]
        untold += delta.entries
        chunks = [self._chunk(delta.index, item) for item in deltas]
        if delta.finish_reason is not None:
            ending = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            chunks.append(self._chunk(delta.index, {}, ending))
        if chunks and untold:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(untold)
            self._untold[delta.index] = []
        return chunks

    def content_chunk(self, delta: Delta) -> bytes | None:
        """The JSON of the chunk of a delta that is one piece of content and no more, as nearly all
        are: what stands around the text is encoded once. None for any other.
        """
        if len(delta.parts) != 1 or delta.finish_reason is not None or not self._only_text_is_new:
            return None
        [part] = delta.parts
        if type(part) is not Content:
            return None
        around = self._around.get(delta.index)
        if around is None:
            empty = msgspec.json.encode(self._chunk(delta.index, {"content": ""}))
            before, _, after = empty.partition(_NO_CONTENT)
            around = self._around[delta.index] = (before + _CONTENT, after)
        return around[0] + _encode(part.text) + around[1]

    def closing_chunks(self) -> list[dict[str, Any]]:
        """The usage, when stream_options asked for it."""
        if not self.terms.include_usage:
            return []
        return [{**self._head(self.chunk_kind), "choices": [], "usage": self.usage()}]

    def _logprobs(self, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if self.terms.num_logprobs is None:
            return None
        return chat_logprobs(entries, self.terms.pieces)

    def _chunk(
        self, index: int, delta: dict[str, Any], ending: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None}
        return self._chunk_of({**choice, **(ending or {"finish_reason": None})})

    def _chunk_of(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head(self.chunk_kind), "choices": [choice]}
        if self.terms.continuous_usage:
            chunk["usage"] = self.usage()
        elif self.terms.include_usage:  # OpenAI: it is in every chunk, null in all but the last
            chunk["usage"] = None
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self._created,
            "model": self.terms.model,
            "system_fingerprint": self.terms.fingerprint,
        }
