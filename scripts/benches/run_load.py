"""Streams from a server on this machine: `run_load.py PORT chat|llama`, asked by lines.

Light, as it shares the cores: one thread, bare sockets; what comes is kept with its time, and read
once all streams have ended. chat: our POST /v1/chat/completions. llama: llama.cpp's POST
/completion, which takes token ids.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from typing import Any, NamedTuple

from child import Operation, answer

_TIMEOUT_S = 300.0
_CHAT, _LLAMA = "/v1/chat/completions", "/completion"


class Dialect(NamedTuple):
    """What a server is asked, and how its events are read."""

    path: str

    def body(self, prompt: dict[str, Any], tokens: int) -> dict[str, Any]:
        if self.path == _LLAMA:
            return {
                "prompt": prompt["ids"],
                "n_predict": tokens,
                "stream": True,
                "ignore_eos": True,
                "temperature": 0,
                "cache_prompt": False,
            }
        return {
            "model": prompt["model"],
            "messages": [{"role": "user", "content": prompt["text"]}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def text(self, event: dict[str, Any]) -> str:
        if self.path == _LLAMA:
            return str(event.get("content") or "")
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])

    def counted(self, event: dict[str, Any]) -> tuple[int, int] | None:
        """Tokens of the prompt and of the answer, in the one event that tells them."""
        if self.path == _LLAMA:
            return (event["tokens_evaluated"], event["tokens_predicted"]) if event["stop"] else None
        usage = event.get("usage")
        return usage and (usage["prompt_tokens"], usage["completion_tokens"])


class Stream:
    """One request: sent when it is made, read as it comes."""

    def __init__(self, port: int, path: str, data: bytes) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + data)
        self.socket.setblocking(False)

    def read(self) -> bool:
        """Take what is there; whether that was the end."""
        data = self.socket.recv(1 << 16)
        self.pieces.append((time.perf_counter(), data))
        return not data


def events(pieces: list[tuple[float, bytes]]) -> list[tuple[float, dict[str, Any]]]:
    """Each event with the time of the piece that ended its line. Raises ValueError for no stream.

    Lines of chunked transfer and of the head are none that begin with `data: `.
    """
    found, rest = [], b""
    status = pieces[0][1].split(b"\r\n", 1)[0] if pieces else b"nothing"
    if b" 200 " not in status:
        said = b"".join(data for _, data in pieces)[-300:]
        raise ValueError(f"{status.decode(errors='replace')}: {said.decode(errors='replace')}")
    for when, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                found.append((when, json.loads(line[6:])))
    return found


def open_all() -> dict[str, Operation]:
    port, dialect = int(sys.argv[1]), Dialect(_LLAMA if sys.argv[2] == "llama" else _CHAT)

    def ask(prompt: dict[str, Any], tokens: int) -> Stream:
        return Stream(port, dialect.path, json.dumps(dialect.body(prompt, tokens)).encode())

    def told(stream: Stream, prompt: dict[str, Any], tokens: int, began: float) -> list[float]:
        found = events(stream.pieces)
        counts = [count for _, event in found if (count := dialect.counted(event))]
        if counts != [(len(prompt["ids"]), tokens)]:
            raise ValueError(f"{counts} tokens; wanted {len(prompt['ids'])} and {tokens}")
        return [when - began for when, event in found if dialect.text(event)]

    def steps(
        prompts: list[dict[str, Any]],
        tokens: int,
        late: dict[str, Any] | None = None,
        after: int = 32,
    ) -> dict[str, Any]:
        """As run_ours.py's; tokens are counted by what came at once, until all have come."""
        began = time.perf_counter()
        streams = [ask(prompt, tokens) for prompt in prompts]
        late_stream, late_at = None, None
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            while selector.get_map():
                if late and not late_stream and min(len(s.pieces) for s in streams) >= after:
                    late_at = time.perf_counter() - began
                    late_stream = ask(late, 1)
                    selector.register(late_stream.socket, selectors.EVENT_READ, late_stream)
                if time.perf_counter() - began > _TIMEOUT_S:
                    raise TimeoutError(f"no end in {_TIMEOUT_S:.0f} s")
                for key, _ in selector.select(1.0):
                    if key.data.read():
                        selector.unregister(key.fileobj)
                        key.data.socket.close()
        wall = time.perf_counter() - began
        pairs = zip(streams, prompts, strict=True)
        times = [told(stream, prompt, tokens, began) for stream, prompt in pairs]
        late_done = None
        if late is not None and late_stream is not None:
            [late_done, *_] = told(late_stream, late, 1, began)
        return {"wall_s": wall, "times": times, "late": [late_at, late_done]}

    return {"run": steps, "steps": steps}


if __name__ == "__main__":
    answer(open_all)
