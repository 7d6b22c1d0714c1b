from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.server.text.detokenizer import Detokenizer, StopMatcher, TokenPieces
from makers.text_engine import byte_level_tokenizer, sentencepiece_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
BYTE_PIECES = TokenPieces(BYTE_LEVEL)
SENTENCE_PIECES = TokenPieces(SENTENCEPIECE)

QUICK = settings(max_examples=60, deadline=None, database=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = st.lists(st.text("hela", min_size=1, max_size=5), min_size=1, max_size=5).map(" ".join)


def split(items: list[int], cuts: list[int]) -> list[list[int]]:
    """The items in runs whose lengths are `cuts`, then one by one."""
    parts = []
    for cut in cuts:
        parts.append(items[:cut])
        items = items[cut:]
    return parts + [[item] for item in items]


def detokenize(pieces: TokenPieces, token_ids: list[int], cuts: list[int]) -> str:
    detokenizer = Detokenizer(pieces)
    parts = [detokenizer.push(part) for part in split(token_ids, cuts)]
    return "".join(parts) + detokenizer.flush()


@QUICK
@given(TEXT, st.lists(st.integers(0, 4), max_size=8))
def test_any_text_comes_back_whatever_the_split_of_its_tokens(text: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    assert detokenize(BYTE_PIECES, ids, cuts) == text


@QUICK
@given(st.one_of(WORDS, st.text("he \u2581é你🙂", max_size=9)), st.lists(st.integers(0, 4)))
def test_sentencepiece_text_equals_its_decoder_s(text: str, cuts: list[int]) -> None:
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False).ids
    assert detokenize(SENTENCE_PIECES, ids, cuts) == SENTENCEPIECE.decode(ids)


@QUICK
@given(st.lists(st.integers(0, 301), max_size=12), st.lists(st.integers(0, 4), max_size=8))
def test_any_ids_are_a_prefix_of_the_whole_decoding(ids: list[int], cuts: list[int]) -> None:
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=True)
    text = detokenize(BYTE_PIECES, ids, cuts)
    assert whole.startswith(text)
    assert whole[len(text) :] in ("", *("\ufffd" * n for n in (1, 2, 3))), "an unfinished character"


def test_the_space_before_the_first_word_depends_on_the_tokenizer() -> None:
    assert detokenize(BYTE_PIECES, BYTE_LEVEL.encode(" the").ids, []) == " the"
    ids = [SENTENCEPIECE.token_to_id(piece) for piece in ("\u2581he", "ll", "\u2581a")]
    assert detokenize(SENTENCE_PIECES, ids, []) == "hell a"


@pytest.mark.parametrize("pieces", [BYTE_PIECES, SENTENCE_PIECES], ids=["byte", "sentencepiece"])
def test_half_a_character_is_held_and_at_the_end_dropped(pieces: TokenPieces) -> None:
    ids = {pieces.piece(token_id, False): token_id for token_id in range(300)}
    smile = [ids[bytes([byte])] for byte in "🙂".encode()]
    detokenizer = Detokenizer(pieces)
    assert [detokenizer.push([token_id]) for token_id in smile] == ["", "", "", "🙂"]
    assert detokenizer.push(smile[:3]) == ""
    assert detokenizer.flush() == ""


def test_bytes_that_are_no_text_come_out_at_once_and_hide_nothing_after_them() -> None:
    ids = {BYTE_PIECES.piece(token_id, False): token_id for token_id in range(300)}
    detokenizer = Detokenizer(BYTE_PIECES)
    broken = [bytes([byte]) for byte in b"\xff\xf0\x9f"] + [b"o"]
    assert [detokenizer.push([ids[piece]]) for piece in broken] == ["\ufffd", "", "", "\ufffdo"]
    real = "".join(detokenizer.push([ids[bytes([byte])]]) for byte in "\ufffd".encode())
    assert real == "\ufffd"


def test_special_and_unknown_tokens_are_never_shown_and_plain_added_ones_are() -> None:
    added = BYTE_LEVEL.token_to_id("<think> é")
    assert detokenize(BYTE_PIECES, [0, added, 1, 99_999], []) == "<think> é"


def test_special_tokens_are_shown_where_they_are_asked_for() -> None:
    pieces = TokenPieces(BYTE_LEVEL)
    start, end = (BYTE_LEVEL.token_to_id(text) for text in ("<|im_start|>", "<|im_end|>"))
    assert pieces.ids_of(["<|im_start|>", "<think> é", "nowhere"]) == {start}
    ids = [start, *BYTE_LEVEL.encode("hé", add_special_tokens=False).ids, end]
    detokenizer = Detokenizer(pieces, pieces.ids_of(["<|im_start|>"]))
    assert "".join(detokenizer.push([token_id]) for token_id in ids) == "<|im_start|>hé"
    begun = Detokenizer(TokenPieces(SENTENCEPIECE), {SENTENCEPIECE.token_to_id("<s>")})
    first = SENTENCEPIECE.encode("he", add_special_tokens=False).ids
    assert begun.push([SENTENCEPIECE.token_to_id("<s>"), *first]) == "<s>he"


def match(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    """The text sent and the stop found, as a completion drives the matcher."""
    matcher, sent = StopMatcher(stops), ""
    for part in parts:
        result = matcher.push(part)
        sent += result.text
        if result.stop is not None:
            return sent, result.stop
    result = matcher.flush()
    return sent + result.text, result.stop


def first_match(stops: list[str], text: str) -> tuple[str, str | None]:
    """The same by str.find over the whole text."""
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    start, _, stop = min(found)
    return text[:start], stop


@QUICK
@given(
    st.text("ab", max_size=14),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 4), max_size=10),
)
def test_stops_are_found_as_by_find_however_the_text_is_split(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    parts, rest = [], text
    for cut in cuts:
        parts.append(rest[:cut])
        rest = rest[cut:]
    assert match(stops, [*parts, *rest]) == first_match(stops, text)


@pytest.mark.parametrize(
    ("stops", "pushed", "sent"),
    [
        ([], ["a", "b"], ["a", "b"]),
        (["END"], ["xE", "N", "x"], ["x", "", "ENx"]),
        (["END"], ["EE", "ND"], ["E", ""]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
        (["abcd", "bc"], ["abc", "x"], ["", "a"]),
    ],
)
def test_half_a_stop_string_is_held_until_it_is_certain(
    stops: list[str], pushed: list[str], sent: list[str]
) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.push(text).text for text in pushed] == sent


def test_what_was_held_is_sent_at_the_end() -> None:
    matcher = StopMatcher(["END", "xyEz"])
    assert matcher.push("xyEN").text == "xy"
    assert matcher.flush() == ("EN", None)


def test_a_match_that_waited_for_a_longer_one_ends_the_text() -> None:
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.push("-abc") == ("-", None)
    assert matcher.flush() == ("a", "bc")
