"""Bytes that only resemble HTTP, and bodies of which two readers could make two things: sent by a
socket to a real server, which refuses or answers, ends the connection, and goes on.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makers.fuzzing import damaged, tries
from makers.gunicorn_server import MESSAGES, Server

BODY = json.dumps({"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 1}).encode()
HIDDEN = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"  # what must not be taken for a request
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(BODY), BODY)


class Answer(NamedTuple):
    status: int
    head: bytes
    body: bytes


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(engine, tmp_path_factory.mktemp("raw") / "log")
    yield running
    assert running.stop() == 0
    log = running.log.read_text(encoding="utf-8", errors="replace")
    assert "Traceback" not in log, log[-3000:]


def send(server: Server, data: bytes, ends: bool) -> list[Answer]:
    """Every answer until the server ends the connection; ends: our side does, when all is sent."""
    found = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        try:
            connection.sendall(data)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                found += part
        except OSError as error:  # it ended with bytes of ours unread
            assert not isinstance(error, TimeoutError), data
    return list(answers_in(found, data.startswith(b"HEAD ")))


def answers_in(data: bytes, bodiless: bool) -> Iterator[Answer]:
    """Each is whole, and nothing stands between two."""
    while data:
        head, found, data = data.partition(b"\r\n\r\n")
        if head == b"HTTP/1.1 100 Continue":
            continue
        status = re.match(rb"HTTP/1\.\d (\d{3}) ", head)
        assert found and status, head[:200]
        length = re.search(rb"(?im)^content-length: (\d+)\r?$", head)
        assert length or status[1] == b"204", head
        size = int(length[1]) if length and not bodiless else 0
        assert len(data) >= size, "an answer that was cut"
        yield Answer(int(status[1]), head, data[:size])
        data = data[size:]


def check(server: Server, data: bytes, ends: bool = True) -> list[Answer]:
    answers = send(server, data, ends)
    for status, head, body in answers:
        assert status < 500 or status == 501, (data, body)  # 501: another coding than chunked
        if status >= 400 and body:
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["code"]
            assert b"application/json" in head and b"\n" not in error["message"].encode()
    assert server.get("/health/live")[0] == 200
    return answers


def length(size: object) -> bytes:
    return b"Content-Length: %b\r\n" % str(size).encode()


TE = b"Transfer-Encoding: "
END = b"0\r\n\r\n"
# Each is sent with a second request behind it, which a reader of another opinion would answer.
SMUGGLED: dict[str, bytes] = {
    "both lengths, whole chunks": HEAD + length(4) + TE + b"chunked\r\n\r\n" + CHUNK + END,
    "both lengths, chunked first": HEAD + TE + b"chunked\r\n" + length(len(BODY)) + b"\r\n" + END,
    "two lengths": HEAD + length(len(BODY)) + length(1) + b"\r\n" + BODY,
    "two equal lengths": HEAD + length(len(BODY)) * 2 + b"\r\n" + BODY,
    "lengths in a list": HEAD + length(f"{len(BODY)}, {len(BODY)}") + b"\r\n" + BODY,
    "a length below zero": HEAD + length(-1) + b"\r\n" + BODY,
    "a length with a plus": HEAD + length(f"+{len(BODY)}") + b"\r\n" + BODY,
    "a length in hexadecimal": HEAD + length(hex(len(BODY))) + b"\r\n" + BODY,
    "a length with a fraction": HEAD + length("5.0") + b"\r\n" + BODY,
    "a length of other digits": HEAD + length("١٢") + b"\r\n" + BODY,
    "chunked twice": HEAD + TE + b"chunked, chunked\r\n\r\n" + CHUNK + END,
    "chunked in two headers": HEAD + (TE + b"chunked\r\n") * 2 + b"\r\n" + CHUNK + END,
    "chunked and then identity": HEAD + TE + b"chunked, identity\r\n\r\n" + CHUNK + END,
    "a coding nobody knows": HEAD + TE + b"xchunked\r\n\r\n" + CHUNK + END,
    "a space before the colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNK + END,
    "a folded header": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNK + END,
    "a tab before the name": HEAD + b"\tTransfer-Encoding: chunked\r\n\r\n" + CHUNK + END,
    "a bare line feed": HEAD + b"X: y\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK + END,
    "a bare carriage return": HEAD + b"X: y\rTransfer-Encoding: chunked\r\n\r\n" + CHUNK + END,
    "a NUL": HEAD + b"X: \0\r\n" + length(0) + b"\r\n",
    "an underscore": HEAD + b"Content_Length: 5\r\n" + TE + b"chunked, chunked\r\n\r\n",
    "a size that is none": HEAD + TE + b"chunked\r\n\r\nxyz\r\n" + BODY + END,
    "a size below zero": HEAD + TE + b"chunked\r\n\r\n-5\r\n" + BODY + END,
    "a size with a prefix": HEAD + TE + b"chunked\r\n\r\n0x5\r\nhello\r\n" + END,
    "a size with an underscore": HEAD + TE + b"chunked\r\n\r\n1_0\r\n" + BODY + END,
    "a vast size": HEAD + TE + b"chunked\r\n\r\n" + b"f" * 40 + b"\r\n" + BODY,
    "a chunk that is too long": HEAD + TE + b"chunked\r\n\r\n3\r\nhello\r\n" + END,
    "chunks in HTTP/1.0": HEAD.replace(b"1.1", b"1.0") + TE + b"chunked\r\n\r\n" + CHUNK + END,
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_body_of_two_readings_is_refused_and_nothing_behind_it_is_read(
    server: Server, name: str
) -> None:
    answers = check(server, SMUGGLED[name] + HIDDEN)
    wanted = 501 if name == "a coding nobody knows" else 400
    assert [answer.status for answer in answers] == [wanted], answers


def test_requests_behind_each_other_are_answered_in_order(server: Server) -> None:
    chunked = HEAD + TE + b"chunked\r\n\r\n" + CHUNK + END
    plain = HEAD + length(len(BODY)) + b"\r\n" + BODY
    bad = HEAD + length(2) + b"\r\n{}"
    last = HIDDEN.replace(b"Host: x", b"Host: x\r\nConnection: close")
    answers = check(server, plain + HIDDEN + chunked + bad + last, ends=False)
    assert [answer.status for answer in answers] == [200, 200, 200, 400, 200]
    assert b'"version"' in answers[1].body and b'"version"' in answers[4].body


def test_what_a_refused_request_leaves_of_its_body_is_no_request(server: Server) -> None:
    """A route that reads no body, and a refusal before the body: the rest is thrown away."""
    for head in (b"GET /version HTTP/1.1\r\n", b"POST /nowhere HTTP/1.1\r\n", HEAD[:-2] + b"x\r\n"):
        data = head + b"Host: x\r\n" * (b"Host" not in head) + length(len(HIDDEN)) + b"\r\n"
        answers = check(server, data + HIDDEN)
        assert len(answers) == 1, answers


@pytest.mark.parametrize("cut", [5, 40, len(HEAD), len(HEAD) + 30, -10])
def test_half_a_request_is_let_go(server: Server, cut: int) -> None:
    whole = HEAD + length(len(BODY)) + b"\r\n" + BODY
    assert [answer.status for answer in check(server, whole[:cut])] in ([], [400])


HEADS = [  # the most, and more; whether a line end counts is the release's
    (b"GET /version?%b HTTP/1.1\r\n\r\n" % (b"x" * 4070), 200, None),
    (b"GET /version?%b HTTP/1.1\r\n\r\n" % (b"x" * 4076), 414, "limit_request_line"),
    (b"GET /version HTTP/1.1\r\n%b\r\n" % (b"A: b\r\n" * 100), 200, None),
    (b"GET /version HTTP/1.1\r\n%b\r\n" % (b"A: b\r\n" * 101), 431, "limit_request_headers"),
    (b"GET /version HTTP/1.1\r\nA: %b\r\n\r\n" % (b"x" * 8184), 200, None),
    (b"GET /version HTTP/1.1\r\nA: %b\r\n\r\n" % (b"x" * 8190), 431, "limit_request_headers"),
]


@pytest.mark.parametrize("number", range(len(HEADS)))
def test_a_head_has_its_limits(server: Server, number: int) -> None:
    data, status, code = HEADS[number]
    [answer] = check(server, data)
    assert answer.status == status
    assert code is None or json.loads(answer.body)["error"]["code"] == code


GOOD = [
    HEAD + length(len(BODY)) + b"\r\n" + BODY,
    HEAD + TE + b"chunked\r\n\r\n" + CHUNK + END,
    b"GET /v1/models?a=b HTTP/1.1\r\nHost: x\r\nAccept: */*\r\nExpect: 100-continue\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\nConnection: keep-alive\r\n\r\n",
]


def test_damaged_requests_are_answered_or_let_go(server: Server) -> None:
    @tries(250)
    @given(st.sampled_from(GOOD).flatmap(damaged), st.booleans())
    def send_one(data: bytes, twice: bool) -> None:
        check(server, data * (1 + twice))

    send_one()
