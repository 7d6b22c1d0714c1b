"""Completions bodies -> TextRequest. Knows no Flask, no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enginehouse.server.asked import Asked, check_min_tokens, read_common
from enginehouse.server.bodies import CompletionBody
from enginehouse.server.refusal import parse_body, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest(Asked):
    """A request for text completions. prompts: texts, or token ids."""

    prompts: Sequence[str | list[int]]
    echo: bool
    add_special_tokens: bool

    def prompts_with_params(self) -> list[tuple[str | list[int], str]]:
        """Each prompt with the name that a refusal gives it."""
        if len(self.prompts) == 1:
            return [(self.prompts[0], "prompt")]
        return [(prompt, f"prompt[{index}]") for index, prompt in enumerate(self.prompts)]


def parse_text_request(body: bytes) -> TextRequest:
    """Read one request body; RequestError names the first field at fault."""
    shape = parse_body(CompletionBody, body, lambda data: None)
    common = read_common(shape)
    check_min_tokens(shape.min_tokens, shape.max_tokens)
    if shape.echo and shape.logprobs is not None:
        refuse(
            "logprobs",
            "contradicts echo: the prompt's own log probabilities are not computed",
            "unsupported_parameter",
        )
    return TextRequest(
        **common,
        max_tokens=shape.max_tokens,
        num_logprobs=shape.logprobs,
        prompts=shape.prompt,
        echo=shape.echo,
        add_special_tokens=shape.add_special_tokens,
    )
