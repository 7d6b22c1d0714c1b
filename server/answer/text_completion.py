"""Token outputs -> OpenAI's text completion objects, whole and in chunks; several prompts at once.

Knows no HTTP. Source: OpenAI's (legacy) completions reference.
"""

from __future__ import annotations

from typing import Any

from gevent import Greenlet, killall, spawn
from gevent.queue import Empty, Queue

from enginehouse.runtime.request import TokenOutput
from enginehouse.server.answer.completion import Completion, Delta, Generation, Terms
from enginehouse.server.text.logprobs import TokenEntry, text_logprobs


class TextCompletion(Completion):
    """echoes: the text of each prompt that is told before its answers, or empty texts.

    Choice i belongs to prompt i // n, as OpenAI numbers them.
    """

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, terms: Terms, echoes: list[str], **more: Any) -> None:
        super().__init__(terms, **more)
        self._echoes = echoes

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._echoes[prompt] + choice.text,
                "logprobs": self._logprobs_at(prompt, choice.entries),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, (prompt, choice) in enumerate(self.returned())
        ]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    def opening_chunks(self) -> list[dict[str, Any]]:
        """The prompts, if they are echoed."""
        return [
            self._text_chunk(index, echo)
            for index in range(len(self.choices))
            if (echo := self._echoes[self._prompt_of(index)])
        ]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """One chunk, or none when there is nothing new."""
        if not (delta.text or delta.entries or delta.finish_reason):
            return []
        logprobs = self._logprobs_at(self._prompt_of(delta.index), list(delta.entries))
        ending = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        return [self._text_chunk(delta.index, delta.text, logprobs, ending)]

    def _prompt_of(self, index: int) -> int:
        return index // self.terms.num_sequences

    def _logprobs_at(self, prompt: int, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if self.terms.num_logprobs is None:
            return None
        return text_logprobs(entries, self.terms.pieces, len(self._echoes[prompt]))

    def _text_chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        ending: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs}
        return self._chunk_of({**choice, **(ending or {"finish_reason": None})})


class Batch:
    """The generations of several prompts as one; choices are numbered through.

    A greenlet waits for each, and all hand over to one queue. None in it: one has ended.
    """

    def __init__(self, generations: list[Generation], num_sequences: int) -> None:
        self._generations = generations
        self._num_sequences = num_sequences
        self._events: Queue[tuple[int, TokenOutput] | Exception | None] = Queue()
        self._num_waiting = len(generations)
        self._greenlets: list[Greenlet[..., None]] = [
            spawn(self._hand_over, number, generation)
            for number, generation in enumerate(generations)
        ]

    @property
    def finished(self) -> bool:
        """Nothing more will come, and all that came was taken."""
        return self._num_waiting == 0 and self._events.empty()

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        """The next (choice, output); None after timeout_s, or once all have ended."""
        while not self.finished:
            try:
                event = self._events.get(timeout=timeout_s)
            except Empty:
                return None
            if isinstance(event, Exception):
                raise event
            if event is not None:
                return event
        return None

    def cancel(self, index: int | None = None) -> None:
        if index is not None:
            number, choice = divmod(index, self._num_sequences)
            self._generations[number].cancel(choice)
            return
        killall(self._greenlets, block=False)
        for generation in self._generations:
            generation.cancel()
        self._num_waiting = 0
        self._events.put(None)  # wakes a greenlet that waits in get()

    def _hand_over(self, number: int, generation: Generation) -> None:
        first = number * self._num_sequences
        try:
            while (item := generation.get()) is not None:
                index, output = item
                self._events.put((first + index, output))
                if generation.finished:
                    break
        except Exception as error:  # raised again where the answer is made
            self._events.put(error)
        self._num_waiting -= 1
        self._events.put(None)
