"""Requests to a server on this machine: `run_http_load.py PORT MODEL`, asked by lines.

One thread, one epoll, bare sockets, connections that are kept: an answer's end is looked for with
bytes.find and events are counted with bytes.count, so that the server and not this is measured.
Of every connection the first answer is read in full, and every later one must have as many events.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from typing import Any

from child import Operation, answer

_SILENCE_S = 60.0
_END_OF_STREAM = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_EVENT = b"data: "
_LONG = 4000  # tokens of a stream that stays open


class LoadFailed(Exception):
    """A server that does not answer as the API promises."""


class Wire:
    """One kept connection: a request is sent, its answer read as it comes."""

    def __init__(self, port: int, data: bytes) -> None:
        self.data = data
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.num_events = 0
        self.second_s: float | None = None  # when its second event had come: the first has no text
        self._seen = b""
        self._wanted = -1

    def send(self) -> None:
        self.num_events, self.second_s, self._seen, self._wanted = 0, None, b"", -1
        sent = self.socket.send(self.data)
        if sent != len(self.data):
            raise LoadFailed("the request does not fit the socket's buffer")

    def read_plain(self) -> bool:
        """Take what is there; whether the answer is whole."""
        self._seen += self._receive()
        if self._wanted < 0:
            end = self._seen.find(b"\r\n\r\n")
            if end < 0:
                return False
            head = self._seen[:end].lower()
            self._check(head)
            at = head.find(b"content-length: ")
            if at < 0:
                raise LoadFailed("an answer has no Content-Length")
            self._wanted = end + 4 + int(head[at + 16 :].split(b"\r\n", 1)[0])
        return len(self._seen) >= self._wanted

    def read_stream(self) -> bool:
        data = self._receive()
        if not self._seen:
            self._check(data[:64])
        joined = self._seen + data  # an event's beginning may be cut in two
        self.num_events += joined.count(_EVENT) - self._seen.count(_EVENT)
        self._seen = joined[-32:]
        if self.second_s is None and self.num_events >= 2:
            self.second_s = time.perf_counter()
        return self._seen.endswith(_END_OF_STREAM)

    def _receive(self) -> bytes:
        data = self.socket.recv(1 << 16)
        if not data:
            raise LoadFailed("the server closed a connection within an answer")
        return data

    @staticmethod
    def _check(head: bytes) -> None:
        if not head.lower().startswith(b"http/1.1 200"):
            raise LoadFailed(head[:64].decode(errors="replace"))


class Loader:
    def __init__(self, port: int, model: str) -> None:
        self._port, self._model = port, model
        self._open: list[Wire] = []
        self._poll = select.epoll()
        self._wires: dict[int, Wire] = {}

    def request(self, tokens: int, stream: bool) -> bytes:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "Tell me what a steam engine does, in one sentence."},
            ],
            "max_tokens": tokens,
            "temperature": 0.7,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        data = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer -\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def plain(self, connections: int, seconds: float, tokens: int) -> dict[str, Any]:
        done = self._load([self._wire(tokens, False) for _ in range(connections)], seconds, False)
        return {"per_s": done[0] / seconds, "count": done[0]}

    def stream(self, connections: int, seconds: float, tokens: int) -> dict[str, Any]:
        """Events of whole streams; [DONE] is one."""
        wires = [self._wire(tokens, True) for _ in range(connections)]
        num_streams, num_events = self._load(wires, seconds, True)
        return {"per_s": num_events / seconds, "count": num_events, "streams": num_streams}

    def open(self, streams: int) -> dict[str, Any]:
        """Begin streams that stay, and wait until each has begun to answer."""
        for _ in range(streams):
            wire = self._wire(_LONG, True)
            wire.send()
            self._open.append(wire)
            self._turn(0.0)
        self._until(lambda: all(wire.second_s is not None for wire in self._open))
        return {"open": len(self._open)}

    def probe(self, count: int, tokens: int) -> dict[str, Any]:
        """Seconds to the first text of short streams, one after the other, beside what is open."""
        wire, seconds = self._wire(tokens, True), []
        for _ in range(count):
            began = time.perf_counter()
            wire.send()
            while wire not in self._turn(_SILENCE_S):
                pass
            assert wire.second_s is not None
            seconds.append(wire.second_s - began)
        self._close([wire])
        return {"seconds": seconds}

    def watch(self, seconds: float) -> dict[str, Any]:
        """Only read what is open."""
        before, end = sum(wire.num_events for wire in self._open), time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            self._turn(left)
        return {"events": sum(wire.num_events for wire in self._open) - before}

    def close(self) -> dict[str, Any]:
        self._close(self._open)
        self._open = []
        return {}

    def _wire(self, tokens: int, stream: bool) -> Wire:
        wire = Wire(self._port, self.request(tokens, stream))
        self._wires[wire.socket.fileno()] = wire
        self._poll.register(wire.socket, select.EPOLLIN)
        return wire

    def _close(self, wires: list[Wire]) -> None:
        for wire in wires:
            del self._wires[wire.socket.fileno()]
            self._poll.unregister(wire.socket)
            wire.socket.close()

    def _load(self, wires: list[Wire], seconds: float, stream: bool) -> tuple[int, int]:
        """Closed loop: each connection asks again at once. Answers, and their events."""
        read = Wire.read_stream if stream else Wire.read_plain
        answers = events = expected = 0
        for wire in wires:
            wire.send()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            ready = self._poll.poll(_SILENCE_S)
            if not ready:
                raise LoadFailed(f"nothing came for {_SILENCE_S:.0f} s")
            for number, _ in ready:
                wire = self._wires[number]
                if read(wire):
                    answers += 1
                    events += wire.num_events
                    expected = expected or wire.num_events
                    if wire.num_events != expected:
                        raise LoadFailed(f"{wire.num_events} events; wanted {expected}")
                    wire.send()
        self._close(wires)
        return answers, events

    def _turn(self, timeout_s: float) -> list[Wire]:
        """Read what is there; those that have ended."""
        ready = [self._wires[number] for number, _ in self._poll.poll(timeout_s)]
        ended = [wire for wire in ready if wire.read_stream()]
        if any(wire in self._open for wire in ended):
            raise LoadFailed("a stream that was to stay open has ended")
        return ended

    def _until(self, holds: Any) -> None:
        end = time.perf_counter() + _SILENCE_S
        while not holds():
            if time.perf_counter() > end:
                raise LoadFailed("the streams did not begin")
            self._turn(1.0)


def open_all() -> dict[str, Operation]:
    loader = Loader(int(sys.argv[1]), sys.argv[2])
    names = ("plain", "stream", "open", "probe", "watch", "close")
    return {name: getattr(loader, name) for name in names}


if __name__ == "__main__":
    answer(open_all)
