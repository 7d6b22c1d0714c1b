"""The bytes that grammars see of each token, and which special tokens they may choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import xgrammar
from tokenizers import AddedToken, Tokenizer

from enginehouse.runtime.grammar.child import build_grammar, tokenizer_info
from enginehouse.runtime.grammar.constraint import check
from enginehouse.runtime.grammar.support import installed
from enginehouse.runtime.grammar.vocabulary import SHOWN_TOKENS, read_vocabulary
from enginehouse.server.tools.tool_choice import ToolUse, as_constraint
from makers.text_engine import tokenizer_with_marks
from makers.tool_texts import CLOCK, FORMATS, TIME

HIDDEN = "<|im_end|>"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """One in which every mark that a model may write is a special token."""
    made = tokenizer_with_marks()
    made.add_special_tokens([AddedToken(text, special=True) for text in SHOWN_TOKENS])
    made.save(str(tmp_path / "tokenizer.json"))
    return made


def test_marks_of_calls_and_thoughts_are_written_and_other_special_tokens_are_not(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    pieces = read_vocabulary(tmp_path, size + 3)
    assert pieces is not None and len(pieces) == size + 3
    for text in SHOWN_TOKENS:
        assert pieces[tokenizer.token_to_id(text)] == text.encode()
    assert [pieces[tokenizer.token_to_id(text)] for text in ("<|im_start|>", HIDDEN)] == [b"", b""]
    assert pieces[size:] == [b"", b"", b""]
    ids = tokenizer.encode("Ça va? 🙂", add_special_tokens=False).ids
    assert b"".join(pieces[token_id] for token_id in ids).decode() == "Ça va? 🙂"


@pytest.mark.parametrize(
    ("name", "mark"),
    [("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]"), ("mistral_named", "[TOOL_CALLS]")],
)
def test_a_forced_call_may_begin_with_the_special_token_that_marks_it(
    tokenizer: Tokenizer, tmp_path: Path, name: str, mark: str
) -> None:
    form = FORMATS[name]
    tag = ToolUse((CLOCK,), "required", parallel=False).tag(form)
    assert tag is not None
    constraint = check(as_constraint(tag), installed())
    stop_id = tokenizer.token_to_id(HIDDEN)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    info = tokenizer_info(tmp_path, size, [stop_id])
    assert info is not None
    compiled = build_grammar(info, constraint.kind, constraint.value)
    matcher = xgrammar.GrammarMatcher(compiled.grammar)
    mask = xgrammar.allocate_token_bitmask(1, size)
    ids = tokenizer.encode(form.call_text([TIME]), add_special_tokens=False).ids
    assert ids[0] == tokenizer.token_to_id(mark)
    for token_id in [*ids, stop_id]:
        matcher.fill_next_token_bitmask(mask)
        allowed = {i for i in range(size) if int(mask[0, i // 32]) >> (i % 32) & 1}
        assert token_id in allowed
        assert (stop_id in allowed) == (token_id == stop_id), "the end is allowed at the end only"
        assert matcher.accept_token(token_id)
    assert matcher.is_terminated()
