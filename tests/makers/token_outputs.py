"""What an engine sends: a tiny tokenizer's tokens, one by one, with their scores and without."""

from __future__ import annotations

import math
from typing import Any

from enginehouse.runtime.request import FinishReason, TokenLogprobs, TokenOutput
from enginehouse.server.text.detokenizer import TokenPieces
from makers.text_engine import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
PIECES = TokenPieces(TOKENIZER)
IDS = {PIECES.piece(token_id, False): token_id for token_id in range(300)}
END_ID = TOKENIZER.token_to_id("<|im_end|>")
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def output(text: str | list[int], finish: FinishReason | None = None) -> TokenOutput:
    ids = TOKENIZER.encode(text).ids if isinstance(text, str) else text
    return TokenOutput(1, list(ids), finish)


def tokens(text: str, finish: FinishReason | None = None, index: int = 0) -> list[Any]:
    """One output per token, then the end, as an engine sends them."""
    steps = [(index, output([token_id])) for token_id in TOKENIZER.encode(text).ids]
    return [*steps, (index, output([], finish))] if finish else steps


def scored(ids: list[int], finish: FinishReason | None = None, index: int = 0) -> tuple[int, Any]:
    """One output; each token's logprob is -id / 100, with the end token as the likeliest other."""
    logprobs = [TokenLogprobs(-i / 100, ((i, -i / 100), (END_ID, -math.inf))) for i in ids]
    return index, TokenOutput(1, ids, finish, logprobs=logprobs)


def bytes_ids(text: str) -> list[int]:
    return [IDS[bytes([byte])] for byte in text.encode()]
