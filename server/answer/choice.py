"""One sequence on its way from token ids to the parts of an answer.

UTF-8, stop strings, parser: each holds back what is not certain yet, and at the end they are
flushed in that order. This file does not know HTTP, any answer's shape, or the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.request import FinishReason, TokenLogprobs, TokenOutput
from enginehouse.server.text.answer import (
    AnswerParser,
    Content,
    Part,
    PlainParser,
    Reasoning,
    ToolArguments,
    ToolCallStart,
)
from enginehouse.server.text.detokenizer import Detokenizer, StopMatcher, TokenPieces
from enginehouse.server.text.logprobs import LogprobQueue, TokenEntry


@dataclass(frozen=True, slots=True)
class Endings:
    """What ends a choice beside the engine, and how.

    token_ids: those the client named; only they are told as stop_reason. min_tokens: no stop
    string is looked for in the text of the tokens before.
    """

    texts: tuple[str, ...] = ()
    keep_text: bool = False
    token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0


@dataclass(slots=True)
class Call:
    """A call of a tool; arguments as far as they are known."""

    id: str
    name: str
    arguments: str = ""


class Choice:
    """Text, calls, counts and the reason of its end, while they grow.

    num_reasoning_tokens: of num_tokens, those that were thought, shown or not.
    kept_ids: special tokens whose text is shown to the parser. stop_reason: the stop string or the
    client's stop token that ended it. ending: the token that ended it, none of its own, where
    logprobs are wanted. mean_logprob: over all its tokens.
    """

    def __init__(
        self,
        pieces: TokenPieces,
        endings: Endings,
        parser: AnswerParser | None = None,
        *,
        wants_logprobs: bool = False,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_cached_tokens = 0
        self.calls: list[Call] = []
        self.entries: list[TokenEntry] = []
        self.ending: TokenEntry | None = None
        self.parser = PlainParser() if parser is None else parser
        self._endings = endings
        self._detokenizer = Detokenizer(pieces, kept_ids)
        self._matcher = StopMatcher(endings.texts)
        self._wants_logprobs = wants_logprobs
        self._logprobs = LogprobQueue()
        self._sum_logprobs = 0.0
        self._num_chars_read = 0  # of the text as tokens gave it
        self._num_chars_sent = 0  # of the same text, past the stop strings
        self._contents: list[str] = []
        self._thoughts: list[str] = []

    @property
    def text(self) -> str:
        """What is meant for the user."""
        return "".join(self._contents)

    @property
    def reasoning(self) -> str:
        return "".join(self._thoughts)

    @property
    def mean_logprob(self) -> float:
        return self._sum_logprobs / max(1, self.num_tokens)

    def push(self, output: TokenOutput) -> list[Part]:
        """Take one output, token by token: those after a stop string are neither shown nor counted.

        Returns the parts that are certain now; finish_reason is set with the last of them.
        """
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        logprobs = self._logprobs_of(output)
        sent: list[str] = []
        num_before, thought = self.num_tokens, self.parser.thinks
        for index, token_id in enumerate(output.token_ids):
            sent.append(self._take(token_id, logprobs[index] if logprobs else None))
            if self.finish_reason is not None:
                break
        if output.finish_reason is not None and self.finish_reason is None:
            sent.append(self._end(output.finish_reason, output))
        parts = self._parts("".join(sent))
        if thought or self.parser.thinks:
            self.num_reasoning_tokens += self.num_tokens - num_before
        return parts

    def finish_empty(self) -> None:
        """Nothing may be generated."""
        self.finish_reason = FinishReason.LENGTH.value

    def _logprobs_of(self, output: TokenOutput) -> Sequence[TokenLogprobs] | None:
        if not self._wants_logprobs:
            return None
        logprobs = output.logprobs or []
        if len(logprobs) != len(output.token_ids):
            raise EngineError(
                f"the engine sent {len(logprobs)} logprobs for {len(output.token_ids)} tokens"
            )
        return logprobs

    def _take(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        self.num_tokens += 1
        if logprobs is not None:
            self._sum_logprobs += logprobs.logprob
            first = self._detokenizer.first
            self._logprobs.push(TokenEntry(token_id, self._num_chars_read, first, logprobs))
        text = self._detokenizer.push_one(token_id)
        self._num_chars_read += len(text)
        if not self._endings.texts or self.num_tokens < self._endings.min_tokens:
            self._num_chars_sent += len(text)
            return text
        return self._sent(*self._matcher.push(text))

    def _end(self, reason: FinishReason, output: TokenOutput) -> str:
        stop_token_id, first = output.stop_token_id, self._detokenizer.first
        text = self._detokenizer.flush()
        sent = self._sent(*self._matcher.push(text)) if text else ""
        if self.finish_reason is None:
            sent += self._sent(*self._matcher.flush())
        if self.finish_reason is None:
            self.finish_reason = reason.value
            if stop_token_id in self._endings.token_ids:
                self.stop_reason = stop_token_id
            if stop_token_id is not None and self._wants_logprobs:
                end = self._num_chars_read, first, output.stop_logprobs
                self.ending = TokenEntry(stop_token_id, *end)
        return sent

    def _sent(self, text: str, stop: str | None) -> str:
        if stop is not None:
            self.finish_reason = FinishReason.STOP.value
            self.stop_reason = stop
            if self._endings.keep_text:
                text += stop
        self._num_chars_sent += len(text)
        return text

    def _parts(self, text: str) -> list[Part]:
        """What the text is; also the logprobs that go with it, and tool_calls as the reason."""
        parts = self.parser.push(text)
        if self.finish_reason is None:
            if self._wants_logprobs:
                self.entries += self._logprobs.release(self._num_chars_sent)
        else:
            parts += self.parser.flush()
            was_cut = isinstance(self.stop_reason, str)
            self.entries += self._logprobs.end(self._num_chars_sent, was_cut)
        for part in parts:
            self._keep(part)
        if self.finish_reason == FinishReason.STOP.value and self._has_whole_calls():
            self.finish_reason = "tool_calls"
        return parts

    def _has_whole_calls(self) -> bool:
        """False also where a stop string or the model itself broke off a call."""
        try:
            return bool([msgspec.json.decode(call.arguments) for call in self.calls])
        except msgspec.MsgspecError:
            return False

    def _keep(self, part: Part) -> None:
        if isinstance(part, Content):
            self._contents.append(part.text)
        elif isinstance(part, Reasoning):
            self._thoughts.append(part.text)
        elif isinstance(part, ToolCallStart):
            self.calls.append(Call(part.id, part.name))
        else:
            assert isinstance(part, ToolArguments)
            self.calls[part.number].arguments += part.text
