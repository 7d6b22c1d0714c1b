"""What a stream may not hold, one fault at a time."""

from __future__ import annotations

import pytest

from doubles.scripted_http import chunks
from enginehouse.server.client.stream_reader import BrokenStream, StreamReader, read_stream

FIRST, TEXT, LAST, USAGE, DONE = chunks("hello")
BROKEN = [
    ([TEXT], "wanted the assistant's role"),
    ([FIRST, FIRST], "the role came twice"),
    ([FIRST, TEXT.replace("chatcmpl-1", "chatcmpl-2")], "two ids in one stream"),
    ([FIRST, LAST, TEXT], "a choice came after its finish_reason"),
    ([FIRST, USAGE], "usage came before finish_reason"),
    ([FIRST, TEXT, LAST, DONE, DONE], "came after [DONE]"),
    ([FIRST, TEXT.replace("chat.completion.chunk", "text_completion")], "object is"),
    (["no JSON"], "is no chat.completion.chunk"),
    (["[1]"], "is no chat.completion.chunk"),
    (['{"error": {"message": "the engine is gone"}}'], "the engine is gone"),
    (['{"error": "gone"}'], "error in the stream: gone"),
    ([FIRST, TEXT], "ended without finish_reason, usage, [DONE]"),
    ([FIRST, TEXT, LAST, DONE], "ended without usage"),
]


@pytest.mark.parametrize(("data", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_what_no_stream_may_hold_is_named(data: list[str], message: str) -> None:
    reader = StreamReader()
    with pytest.raises(BrokenStream) as caught:
        for text in data:
            reader.push(f"data: {text}")
        reader.check_end()
    assert message in str(caught.value)


def test_a_line_that_is_no_data_breaks_a_stream() -> None:
    with pytest.raises(BrokenStream, match="'event: x' is no data line"):
        StreamReader().push("event: x")


def test_a_whole_stream_is_its_texts_tokens_and_reason() -> None:
    stream = read_stream([f"data: {text}" for text in chunks("a", "b", reason="length")], 0)
    assert (stream.id, stream.text, stream.num_tokens) == ("chatcmpl-1", "ab", 2)
    assert stream.finish_reason == "length" and len(stream.piece_times_s) == 2
