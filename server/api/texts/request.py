"""Completions bodies -> TextRequest. Knows no Flask, no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enginehouse.server.request.asked import Asked, check_min_tokens, read_common
from enginehouse.server.wire.bodies import CompletionBody
from enginehouse.server.wire.refusal import parse_body
from enginehouse.server.wire.texts_or_ids import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest(Asked):
    """A request for text completions. prompts: texts, or token ids."""

    prompts: Sequence[str | list[int]]
    echo: bool
    add_special_tokens: bool

    @property
    def echoes_logprobs(self) -> bool:
        """Whether the echoed prompt's tokens are told as the answer's are."""
        return self.echo and self.num_logprobs is not None

    def prompts_with_params(self) -> list[tuple[str | list[int], str]]:
        """Each prompt with the name that a refusal gives it."""
        if len(self.prompts) == 1:
            return [(self.prompts[0], "prompt")]
        return [(prompt, f"prompt[{index}]") for index, prompt in enumerate(self.prompts)]


def parse_text_request(body: bytes, max_seq_len: int | None = None) -> TextRequest:
    """Read one request body; RequestError names the first field at fault.

    max_seq_len: a longer prompt of ids is refused before each id is looked at.
    """
    shape = parse_body(CompletionBody, body, lambda data: check_sizes(data, "prompt", max_seq_len))
    common = read_common(shape)
    check_min_tokens(shape.min_tokens, shape.max_tokens)
    if shape.echo and shape.logprobs is not None:
        common["num_prompt_logprobs"] = max(shape.logprobs, common["num_prompt_logprobs"] or 0)
    return TextRequest(
        **common,
        max_tokens=shape.max_tokens,
        num_logprobs=shape.logprobs,
        prompts=shape.prompt,
        echo=shape.echo,
        add_special_tokens=shape.add_special_tokens,
    )
