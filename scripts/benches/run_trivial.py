"""A server that does nothing: `run_trivial.py PORT`. What loads it shows how fast it can load.

Each request of POST is answered with the same bytes, in one write: SSE events of 16 tokens where it
asks for a stream, else a JSON answer.
"""

from __future__ import annotations

import json
import select
import socket
import sys

_CHUNK = {
    "id": "chatcmpl-0",
    "object": "chat.completion.chunk",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}],
}
_EVENT = b"data: " + json.dumps(_CHUNK).encode() + b"\n\n"
_BODY = json.dumps({"object": "chat.completion", "text": " word" * 16}).encode()
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


PLAIN = _HEAD % b"application/json" + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY
STREAM = (
    _HEAD % b"text/event-stream"
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + _chunked(_EVENT) * 17
    + _chunked(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)


def main() -> None:
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024) as listener:
        listener.setblocking(False)
        poll, open_ones = select.epoll(), {}
        poll.register(listener, select.EPOLLIN)
        while True:
            for number, _ in poll.poll():
                if number == listener.fileno():
                    one, _ = listener.accept()
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    open_ones[one.fileno()] = one
                    poll.register(one, select.EPOLLIN)
                    continue
                one = open_ones[number]
                try:
                    data = one.recv(1 << 16)
                except ConnectionError:
                    data = b""
                if not data:
                    poll.unregister(number)
                    open_ones.pop(number).close()
                else:
                    one.sendall(STREAM if b'"stream": true' in data else PLAIN)


if __name__ == "__main__":
    main()
