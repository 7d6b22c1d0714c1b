"""Structural tags, followed by xgrammar itself: whole texts, and what a model of noise makes."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
import xgrammar

from enginehouse.runtime.grammar.constraint import check
from enginehouse.runtime.grammar.support import installed
from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.server.tools.tool_choice import as_constraint

VOCABULARY = [chr(code) for code in range(32, 127)] + [
    "\n",
    "é",
    "｜",
    "▁",
    "<tool_call>",
    "[TOOL_CALLS]",
    "",
]
STOP = len(VOCABULARY) - 1


@cache
def compiler() -> xgrammar.GrammarCompiler:
    info = xgrammar.TokenizerInfo(
        VOCABULARY, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[STOP]
    )
    return xgrammar.GrammarCompiler(info, max_threads=1)


def matcher(constraint: Constraint) -> xgrammar.GrammarMatcher:
    checked = check(constraint, installed())
    assert checked.kind is ConstraintKind.STRUCTURAL_TAG
    return xgrammar.GrammarMatcher(compiler().compile_structural_tag(checked.value))


def allows(tag: dict[str, Any] | None, text: str) -> bool:
    """The whole text is one the grammar takes."""
    assert tag is not None
    state = matcher(as_constraint(tag))
    return state.accept_string(text) and state.accept_token(STOP)


def noise(constraint: Constraint, seed: int) -> str:
    """The text of a model that has no idea: any token the mask allows, the grammar's end included.

    Quotes and brackets that close are preferred, so that strings end some day.
    """
    choose = random.Random(seed)
    state = matcher(constraint)
    mask = xgrammar.allocate_token_bitmask(1, len(VOCABULARY))
    text: list[str] = []
    for _ in range(3000):
        state.fill_next_token_bitmask(mask)
        bits = mask.view(torch.int32)[0].tolist()
        allowed = [i for i in range(len(VOCABULARY)) if bits[i // 32] >> (i % 32) & 1]
        closing = [i for i in allowed if VOCABULARY[i] in '"}]' or i == STOP]
        token = choose.choice(closing if closing and choose.random() < 0.5 else allowed)
        assert state.accept_token(token)
        if token == STOP:
            return "".join(text)
        text.append(VOCABULARY[token])
    raise AssertionError("".join(text))
