from __future__ import annotations

import socket
from collections.abc import Iterator

import gevent
import pytest
from gevent import socket as gsocket

from doubles.scripted_client import Script, ScriptedGeneration
from enginehouse.runtime.errors import HostUnavailable
from enginehouse.server.answer.completion import Completion
from enginehouse.server.answer.framing import KEEPALIVE
from enginehouse.server.http import sse
from makers.api_client import data_of
from makers.completions import completion
from makers.token_outputs import STOP, tokens


def stream(answer: Completion, script: Script) -> tuple[list[bytes], ScriptedGeneration]:
    generation = ScriptedGeneration(script, len(answer.choices))
    return list(sse.events(sse.Stream(answer, generation, 15.0), "req-1")), generation


def test_a_stream_is_role_then_text_then_reason_then_done() -> None:
    frames, generation = stream(completion(), tokens("the dog", STOP))
    *chunks, done = data_of(frames)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert done == "[DONE]"
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "the dog"
    assert (deltas[-1], chunks[-1]["choices"][0]["finish_reason"]) == ({}, "stop")
    assert generation.cancels == []


def test_a_newline_in_the_text_does_not_break_an_event() -> None:
    frames, _ = stream(completion(), tokens("a\n\nb\r\n", STOP))
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in data_of(frames)[:-1]]
    assert "".join(texts) == "a\n\nb\r\n"


def test_silence_becomes_comments() -> None:
    frames, _ = stream(completion(), [None, None, *tokens("a", STOP)])
    assert [frame.endswith(KEEPALIVE) for frame in frames] == [True, True, False]


def test_what_is_there_at_once_is_one_write() -> None:
    frames, _ = stream(completion(), tokens("the dog", STOP))
    assert len(frames) == 1 and len(data_of(frames)) > 4
    frames, _ = stream(completion(), [*tokens("a"), None, *tokens("b"), HostUnavailable("gone")])
    assert [frame.count(b"data: ") for frame in frames] == [2, 0, 1, 2]
    assert frames[1] == KEEPALIVE


def test_an_error_in_mid_stream_is_an_event_then_done() -> None:
    frames, _ = stream(completion(), [*tokens("a"), HostUnavailable("it stopped")])
    *_, error, done = data_of(frames)
    assert done == "[DONE]"
    assert error["error"]["type"] == "service_unavailable"
    assert "it stopped" in error["error"]["message"]


def test_a_bug_in_mid_stream_tells_the_request_id_and_nothing_else() -> None:
    frames, generation = stream(completion(), [*tokens("a"), ZeroDivisionError("secret")])
    *_, error, done = data_of(frames)
    assert (error["error"]["type"], done) == ("api_error", "[DONE]")
    assert "req-1" in error["error"]["message"] and "secret" not in error["error"]["message"]
    assert generation.finished


def test_a_reader_that_stops_reading_cancels() -> None:
    answer, generation = completion(), ScriptedGeneration(tokens("ab"))
    frames = sse.events(sse.Stream(answer, generation, 0.01), "req-1")
    next(frames), next(frames)
    frames.close()
    assert generation.cancels == [None]
    assert answer.unfinished_reason == "cancelled"


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's and a server's end of one TCP connection."""
    with gsocket.create_server(("127.0.0.1", 0)) as listener:
        client = gsocket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            yield client, server


@pytest.mark.parametrize("pipelined", [b"", b"POST /"], ids=["quiet", "pipelining"])
def test_a_closed_connection_becomes_a_cancel(
    connection: tuple[socket.socket, socket.socket], pipelined: bytes
) -> None:
    client, server = connection
    generation = ScriptedGeneration([])
    with sse.DisconnectWatch(server, generation):
        client.sendall(pipelined)
        gevent.idle()
        assert not generation.finished
        client.close()
        assert generation.ended.wait(5)
    assert generation.cancels == [None]


def test_the_watch_ends_with_the_request_and_leaves_the_next_request_s_bytes(
    connection: tuple[socket.socket, socket.socket],
) -> None:
    client, server = connection
    generation = ScriptedGeneration([])
    with sse.DisconnectWatch(server, generation):
        client.sendall(b"next")
        gevent.idle()
    client.close()
    assert server.recv(10) == b"next"
    assert generation.cancels == []
