"""Texts and token ids -> prompts, and back: what needs a tokenizer and no chat template.

Knows no HTTP and no engine but its limits.
"""

from __future__ import annotations

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import EngineInfo
from enginehouse.server.prompt.chat import MAX_INLINE_CHARS, Chat, call_beside_the_loop
from enginehouse.server.wire.json_body import found_text
from enginehouse.server.wire.refusal import refuse


def tokenize(chat: Chat, text: str, add_special_tokens: bool) -> list[int]:
    def encode() -> list[int]:
        # The batch call, unlike encode(), lets other threads run meanwhile.
        [encoding] = chat.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    return encode() if len(text) <= MAX_INLINE_CHARS else call_beside_the_loop(encode)


def text_prompt(
    chat: Chat, prompt: str | list[int], add_special_tokens: bool, info: EngineInfo, param: str
) -> list[int]:
    """The prompt's ids; RequestError when they are none, too many, or not the vocabulary's."""
    if isinstance(prompt, str):
        chat.check_length(prompt, info.max_seq_len, param)
        prompt = tokenize(chat, prompt, add_special_tokens)
        check_tokens(chat, prompt, info.vocab_size, param)
    else:
        check_tokens(chat, prompt, info.vocab_size, param, are_ids=True)
    if not prompt:
        refuse(param, "the prompt has no tokens; wanted at least one")
    if len(prompt) >= info.max_seq_len:
        raise RequestError(
            f"{param}: the prompt is too long: it has {len(prompt)} tokens, and this model's "
            f"maximum context length is {info.max_seq_len} tokens, the answer included; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    return prompt


def check_tokens(
    chat: Chat, ids: list[int], vocab_size: int, param: str, are_ids: bool = False
) -> None:
    """RequestError for a token that the model has not; are_ids: `param` is the list itself.

    A tokenizer may have more than its model: tokens that were added to it, and not to the model.
    """
    if max(ids, default=0) < vocab_size:
        return
    index = next(i for i, token_id in enumerate(ids) if token_id >= vocab_size)
    name = chat.pieces.name(ids[index])
    if not name:
        problem = f"{ids[index]} is no token id; wanted one below {vocab_size}"
    else:
        problem = (
            f"found the token {found_text(name)} of id {ids[index]}, which is the tokenizer's and "
            f"not the model's, whose vocabulary has {vocab_size} tokens; leave it out"
        )
    refuse(f"{param}[{index}]" if are_ids else param, problem)


def detokenize(chat: Chat, ids: list[int]) -> str:
    """The text with special tokens in it."""

    def decode() -> str:
        text: str = chat.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    return decode() if len(ids) <= MAX_INLINE_CHARS else call_beside_the_loop(decode)


def text_span(chat: Chat, prompt: str | list[int], ids: list[int]) -> range:
    """Which of a prompt's ids stand for its text; the others are the tokenizer's own, as BOS is. Of
    a prompt of ids none do.
    """
    if not isinstance(prompt, str):
        return range(0)
    plain = tokenize(chat, prompt, add_special_tokens=False)
    starts = range(len(ids) - len(plain) + 1)
    first = next((i for i in starts if ids[i : i + len(plain)] == plain), 0)
    return range(first, first + len(plain))


def echo_of(chat: Chat, prompt: str | list[int]) -> str:
    """A prompt as text: as it came, or without its special tokens."""
    if isinstance(prompt, str):
        return prompt
    text: str = chat.tokenizer.decode(prompt, skip_special_tokens=True)
    return text
