"""Clients of a server that is being broken: what each of them saw, and those that misbehave."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

TIMEOUT_S = 90
_PATH = "/v1/chat/completions"


class Seen(NamedTuple):
    """what: the status with an error's code or a stream's end; seconds: until then."""

    what: str
    seconds: float


def body_of(max_tokens: int, *, prompt: str = "What is the time?", **fields: Any) -> bytes:
    messages = [{"role": "user", "content": prompt}]
    asked = {"model": "faults", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return json.dumps({**asked, "ignore_eos": True, **fields}).encode()


def ask(port: int, max_tokens: int = 8, **fields: Any) -> Seen:
    """One request to its end, plain or (stream=True) a stream."""
    began_s = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", _PATH, body_of(max_tokens, **fields), headers)
        response = connection.getresponse()
        text = response.read().decode()
        what = _end_of(response.status, text, bool(fields.get("stream")))
    except (OSError, http.client.HTTPException) as error:
        what = type(error).__name__
    finally:
        connection.close()
    return Seen(what, time.monotonic() - began_s)


def _end_of(status: int, text: str, stream: bool) -> str:
    if status != 200:
        error = json.loads(text)["error"]
        return f"{status} {error['code'] or error['type']}"
    if not stream:
        return "200"
    events = [line.removeprefix("data: ") for line in text.splitlines() if line[:6] == "data: "]
    if not events or events[-1] != "[DONE]":
        return "200, cut"
    error = json.loads(events[-2]).get("error")
    return "200" if error is None else f"200, then {error['code'] or error['type']}"


class Crowd:
    """So many clients that ask one after another until they are told to stop."""

    def __init__(self, port: int, clients: int, max_tokens: int, **fields: Any) -> None:
        self.seen: list[Seen] = []
        self._ends = threading.Event()
        self._ask = lambda: ask(port, max_tokens, **fields)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ends.is_set():
            found = self._ask()
            self.seen.append(found)
            if found.what != "200":
                self._ends.wait(0.1)  # as clients do, which would else ask without end

    def stop(self) -> list[Seen]:
        self._ends.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        return self.seen


class Open:
    """A connection that has asked, and does no more by itself. receive_bytes: of its buffer."""

    def __init__(self, port: int, body: bytes, receive_bytes: int | None = None) -> None:
        self.sock = socket.socket()
        if receive_bytes is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(("127.0.0.1", port))
        head = f"POST {_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self.sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def begin(self) -> None:
        """Wait for the first bytes of the answer."""
        self.sock.recv(16)

    def rest(self) -> str:
        """How it ended: with the answer's last byte, or cut."""
        data = b""
        try:
            while not data.endswith(b"0\r\n\r\n"):
                piece = self.sock.recv(65536)
                if not piece:
                    return "cut"
                data = (data + piece)[-64:]
        except OSError as error:
            return type(error).__name__
        return "whole"

    def vanish(self) -> None:
        self.sock.close()


def summary(seen: Iterable[Seen]) -> str:
    """`200 x12, 503 engine_unavailable x3, at most 1.2 s`."""
    seen = list(seen)
    if not seen:
        return "nothing"
    counts = Counter(each.what for each in seen)
    told = ", ".join(what + (f" x{n}" if n > 1 else "") for what, n in sorted(counts.items()))
    return f"{told}; at most {max(each.seconds for each in seen):.1f} s"
