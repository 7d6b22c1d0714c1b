"""Token outputs -> OpenAI's text completion objects, whole and in chunks, of one prompt or more.

Knows no HTTP. Source: OpenAI's (legacy) completions reference.
"""

from __future__ import annotations

from typing import Any

from enginehouse.server.answer.choice import Choice
from enginehouse.server.answer.chunked import ChunkedCompletion
from enginehouse.server.answer.completion import Delta, Terms
from enginehouse.server.text.logprobs import TokenEntry, text_logprobs


class TextCompletion(ChunkedCompletion):
    """echoes: the text of each prompt that is told before its answers, or empty texts.
    echoes_logprobs: their tokens are told as the answers' are, from `scores`.

    Choice i belongs to prompt i // n, as OpenAI numbers them.
    """

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl-"
    operation = "text_completion"

    def __init__(
        self, terms: Terms, echoes: list[str], echoes_logprobs: bool = False, **more: Any
    ) -> None:
        super().__init__(terms, **more)
        self._echoes = echoes
        self._echoes_logprobs = echoes_logprobs
        self._held: dict[int, list[Delta]] = {}  # by prompt, until all is known of its tokens
        if echoes_logprobs:
            self._held = {prompt: [] for prompt in range(terms.num_prompts)}

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._echoes[prompt] + choice.text,
                "logprobs": self._joined(
                    self._echo_logprobs(prompt), self._logprobs_at(prompt, self._told(choice))
                ),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                **self._prompt_logprobs(prompt),
            }
            for index, (prompt, choice) in enumerate(self.returned())
        ]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The prompts, if they are echoed and nothing of them is waited for."""
        if self._echoes_logprobs:
            return []
        return [chunk for prompt in range(len(self._echoes)) for chunk in self._echo_chunks(prompt)]

    def told(self, delta: Delta) -> list[dict[str, Any]]:
        """One chunk, or none when there is nothing new; more when an echo was waited for."""
        prompt = self._prompt_of(delta.index)
        if prompt not in self._held:
            return self._delta_chunks(delta)
        self._held[prompt].append(delta)
        if self.scores[prompt].num_missing:
            return []
        held = self._held.pop(prompt)
        later = [chunk for each in held for chunk in self._delta_chunks(each)]
        return [*self._echo_chunks(prompt), *later]

    def _echo_chunks(self, prompt: int) -> list[dict[str, Any]]:
        echo, first = self._echoes[prompt], prompt * self.terms.num_sequences
        if not echo and not self._echoes_logprobs:
            return []
        return [
            self._text_chunk(first + number, echo, self._echo_logprobs(prompt))
            for number in range(self.terms.num_sequences)
        ]

    def _delta_chunks(self, delta: Delta) -> list[dict[str, Any]]:
        if not (delta.text or delta.entries or delta.finish_reason):
            return []
        entries = list(delta.entries)
        if delta.finish_reason is not None:
            entries += self._ending(self.choices[delta.index])
        logprobs = self._logprobs_at(self._prompt_of(delta.index), entries)
        ending = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        return [self._text_chunk(delta.index, delta.text, logprobs, ending)]

    def _told(self, choice: Choice) -> list[TokenEntry]:
        return [*choice.entries, *self._ending(choice)]

    def _ending(self, choice: Choice) -> list[TokenEntry]:
        """The end token is told behind an echo: who scores the prompt with max_tokens 1 leaves out
        the last token, which must then be none of the prompt's.
        """
        return [choice.ending] if self._echoes_logprobs and choice.ending is not None else []

    def _echo_logprobs(self, prompt: int) -> dict[str, Any] | None:
        if not self._echoes_logprobs:
            return None
        entries = self.scores[prompt].entries(self.terms.num_logprobs or 0)
        return text_logprobs(entries, self.terms.pieces, 0)

    def _logprobs_at(self, prompt: int, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if self.terms.num_logprobs is None:
            return None
        return text_logprobs(entries, self.terms.pieces, len(self._echoes[prompt]))

    @staticmethod
    def _joined(
        echo: dict[str, Any] | None, answer: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        if echo is None or answer is None:
            return answer
        return {name: [*echo[name], *answer[name]] for name in echo}

    def _text_chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        ending: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs}
        return self._chunk_of({**choice, **(ending or {"finish_reason": None})})
