"""Token ids -> text, piece by piece, and stop strings found in that text.

Plain objects: push what arrives, flush at the end. Half a character and half a stop string are
held back, so that nothing is sent which would have to be taken back. This file does not know
where tokens come from, who reads the text, or why a sequence ended.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from enginehouse.runtime.grammar.vocabulary import BYTE_TOKEN, byte_level_alphabet, decoder_kinds


class TokenPieces:
    """The bytes each token stands for: one table for all requests of a worker.

    A byte-level token is its characters mapped back to bytes; `<0xE2>` is one byte; any other
    token is what the tokenizer's own decoder makes of it, at the start of a text or within one
    (sentencepiece drops the space before the first word only). Special tokens are empty; some
    are the marks of a tool call, and have their `name` as text where they are asked for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = decoder_kinds(tokenizer)
        self._byte_of = byte_level_alphabet() if "ByteLevel" in kinds else {}
        self._has_byte_tokens = "ByteFallback" in kinds
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token_id for token_id, token in added.items() if token.special}
        self._anchor_id = None if self._byte_of else self._find_anchor()
        self._known: dict[tuple[int, bool], bytes] = {}

    def piece(self, token_id: int, first: bool) -> bytes:
        """The token's bytes; first: no text came before it. Unknown ids are empty."""
        key = (token_id, first and not self._byte_of)
        piece = self._known.get(key)
        if piece is None:
            piece = self._known[key] = self._make(token_id, first)
        return piece

    def name(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for unknown ids."""
        return self._tokenizer.id_to_token(token_id) or ""

    def ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """The special tokens that are written so: what a Detokenizer is told to keep."""
        found = {self._tokenizer.token_to_id(text) for text in texts}
        return frozenset(self.special_ids & found)

    def _make(self, token_id: int, first: bool) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self.special_ids:
            return b""
        if self._byte_of:
            try:
                return bytes(self._byte_of[char] for char in token)
            except KeyError:  # an added token, kept as plain text
                return token.encode()
        if self._has_byte_tokens and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        if first or self._anchor_id is None:
            return self._decode([token_id]).encode()
        before = self._decode([self._anchor_id])
        both = self._decode([self._anchor_id, token_id])
        return both[len(before) :].encode()

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _find_anchor(self) -> int | None:
        """Any plain word: what follows it is seen as the decoder shows it within a text."""
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if token.isascii() and token.isalnum() and token_id not in self.special_ids:
                return int(token_id)
        return None


class Detokenizer:
    """The text of one sequence. An incomplete character at the end is never sent.

    keep: special tokens whose text is shown, as the parser of an answer looks for it.
    """

    def __init__(self, pieces: TokenPieces, keep: Collection[int] = ()) -> None:
        self._pieces = pieces
        self._keep = keep
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = True

    @property
    def first(self) -> bool:
        """No token with text has been pushed yet."""
        return self._first

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that are complete now; bytes that are no UTF-8 become U+FFFD at once."""
        return "".join(map(self.push_one, token_ids))

    def push_one(self, token_id: int) -> str:
        if token_id not in self._pieces.special_ids:
            data = self._pieces.piece(token_id, self._first)
            self._first = False
            return self._decoder.decode(data)
        if token_id in self._keep:
            return self._decoder.decode(self._pieces.name(token_id).encode())
        return ""

    def flush(self) -> str:
        """Forget the bytes of an unfinished character: they never were text."""
        self._decoder.reset()
        return ""


class StopResult(NamedTuple):
    """text may be sent; stop is the stop string that ended it, not part of text."""

    text: str
    stop: str | None


class StopMatcher:
    """Cut a text at its earliest stop string, however the text is split on arrival.

    The match that starts first wins; of two that start together, the one that ends first. A
    found match waits while an earlier start could still become a longer stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> StopResult:
        """What may be sent now. After a match nothing more may be pushed."""
        if not self._stops:
            return StopResult(text, None)
        self._held += text
        match = self._earliest_match()
        partial = self._earliest_partial()
        if match is not None and match[0] <= partial:
            return self._end_at(*match)
        text, self._held = self._held[:partial], self._held[partial:]
        return StopResult(text, None)

    def flush(self) -> StopResult:
        """The text has ended: what was held is a match that waited, or plain text."""
        match = self._earliest_match()
        if match is not None:
            return self._end_at(*match)
        text, self._held = self._held, ""
        return StopResult(text, None)

    def _end_at(self, start: int, stop: str) -> StopResult:
        text, self._held = self._held[:start], ""
        return StopResult(text, stop)

    def _earliest_match(self) -> tuple[int, str] | None:
        found = [(self._held.find(stop), len(stop), stop) for stop in self._stops]
        matches = [match for match in found if match[0] >= 0]
        if not matches:
            return None
        start, _, stop = min(matches)
        return start, stop

    def _earliest_partial(self) -> int:
        """Where the longest tail starts that is the beginning of a stop string, else the end."""
        held = self._held
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            num_chars = len(held) - start
            for stop in self._stops:
                # The last character is compared first: it settles nearly all, without a copy.
                if (
                    len(stop) > num_chars
                    and stop[num_chars - 1] == held[-1]
                    and held.endswith(stop[:num_chars])
                ):
                    return start
        return len(held)
