"""Log probabilities on their way out: cut where the text is cut, in OpenAI's two shapes.

A token's bytes are its own, also where one character takes several tokens. Knows no HTTP.
Source: OpenAI's chat completion reference (`logprobs.content`) and its older completions shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from enginehouse.runtime.request import TokenLogprobs
from enginehouse.server.text.detokenizer import TokenPieces

LOWEST = -9999.0  # OpenAI's number for what has no probability: JSON has no infinity


class TokenEntry(NamedTuple):
    """One token: start is where its text begins, in characters of the choice's text.

    first: no text came before it, which changes how a sentencepiece token is spelled. logprobs
    None: not known, as of a prompt's first token.
    """

    token_id: int
    start: int
    first: bool
    logprobs: TokenLogprobs | None


class LogprobQueue:
    """Holds tokens back as long as their text is held back, and drops those that are cut off."""

    def __init__(self) -> None:
        self._held: list[TokenEntry] = []

    def push(self, entry: TokenEntry) -> None:
        self._held.append(entry)

    def release(self, num_chars_sent: int) -> list[TokenEntry]:
        """Those that have part in the text that was sent."""
        count = next(
            (i for i, entry in enumerate(self._held) if entry.start >= num_chars_sent),
            len(self._held),
        )
        released, self._held = self._held[:count], self._held[count:]
        return released

    def end(self, num_chars_sent: int, was_cut: bool) -> list[TokenEntry]:
        """The last of them; was_cut: a stop string took the rest of the text away."""
        released = self.release(num_chars_sent)
        rest, self._held = self._held, []
        return released if was_cut else released + rest


def chat_logprobs(entries: list[TokenEntry], pieces: TokenPieces) -> dict[str, Any]:
    """OpenAI's `logprobs` of a chat choice."""
    content = []
    for entry in entries:
        assert entry.logprobs is not None, "an answer's token"
        top = [
            _chat_item(token_id, logprob, entry.first, pieces)
            for token_id, logprob in entry.logprobs.top
        ]
        item = _chat_item(entry.token_id, entry.logprobs.logprob, entry.first, pieces)
        content.append({**item, "top_logprobs": top})
    return {"content": content, "refusal": None}


def text_logprobs(entries: list[TokenEntry], pieces: TokenPieces, offset: int) -> dict[str, Any]:
    """OpenAI's `logprobs` of a text choice; offset: characters of the prompt that was echoed.

    The chosen token is among top_logprobs even if it is not among the likeliest. Of tokens that
    have one name the likeliest is told: who looks for the greedy token compares values.
    """
    known = [entry.logprobs for entry in entries]
    return {
        "tokens": [_name(entry.token_id, entry.first, pieces) for entry in entries],
        "token_logprobs": [None if own is None else _finite(own.logprob) for own in known],
        "top_logprobs": [_text_top(entry, pieces) for entry in entries],
        "text_offset": [offset + entry.start for entry in entries],
    }


def _text_top(entry: TokenEntry, pieces: TokenPieces) -> dict[str, float] | None:
    if entry.logprobs is None:
        return None
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.logprobs.top, (entry.token_id, entry.logprobs.logprob)):
        top.setdefault(_name(token_id, entry.first, pieces), _finite(logprob))
    return top


def _chat_item(token_id: int, logprob: float, first: bool, pieces: TokenPieces) -> dict[str, Any]:
    """A special token stands for no bytes: it is told by its name."""
    if token_id in pieces.special_ids:
        return {"token": pieces.name(token_id), "logprob": _finite(logprob), "bytes": None}
    data = pieces.piece(token_id, first)
    text = data.decode(errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _name(token_id: int, first: bool, pieces: TokenPieces) -> str:
    """Part of a character is named by its bytes, as OpenAI's completions do."""
    if token_id in pieces.special_ids:
        return pieces.name(token_id)
    data = pieces.piece(token_id, first)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(_escaped(data))


def _escaped(data: bytes) -> Iterator[str]:
    return (f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
