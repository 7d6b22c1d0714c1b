"""A server of OpenAI's chat API over a real socket, whose every answer is a script of the test's.

A script is a function of a request's body; it returns what is sent behind `data: `, a refusal, or
data that ends with WAIT: the server then stands still until the client closes the connection.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

WAIT = "wait"


class Refusal(NamedTuple):
    status: int
    body: bytes


Script = Callable[[dict[str, Any]], "list[str] | Refusal"]


class Page(NamedTuple):
    """What a GET is answered."""

    content: bytes
    status: int = 200


class ScriptedServer:
    """url; pages: by path; bodies: of every POST, in order; keys: of every request but for pages
    of models; closed: set when a client left a WAIT.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.closed = threading.Event()
        self.ignored_fields = ""
        self.pages = {"/v1/models": Page(b'{"data": [{"id": "scripted"}]}')}
        self.url = ""


def chunks(
    *texts: str, id: str = "chatcmpl-1", reason: str = "stop", **delta: str
) -> Iterator[str]:
    """A whole stream: the role, each text, the reason, usage of a token for each text, [DONE]."""

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return json.dumps({"object": "chat.completion.chunk", "id": id, "choices": [choice]})

    yield chunk({"role": "assistant", "content": "", **delta})
    for text in texts:
        yield chunk({"content": text})
    yield chunk({}, reason)
    usage = {"completion_tokens": len(texts), "estimated_cost": 0.0000125}
    yield json.dumps({"object": "chat.completion.chunk", "id": id, "choices": [], "usage": usage})
    yield "[DONE]"


@contextmanager
def serving(script: Script) -> Iterator[ScriptedServer]:
    scripted = ScriptedServer(script)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content, status = scripted.pages[self.path]
            if self.path != "/v1/models":
                scripted.keys.append(self.headers["Authorization"])
            self.answer(status, "application/json", content)

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scripted.bodies.append(body)
            scripted.keys.append(self.headers["Authorization"])
            said = scripted.script(body)
            if isinstance(said, Refusal):
                self.answer(said.status, "application/json", said.body)
            elif not body.get("stream"):
                self.answer(200, "application/json", b"{}")
            else:
                data = b"".join(f"data: {text}\n\n".encode() for text in said if text != WAIT)
                self.answer(200, "text/event-stream", b": keep-alive\n\n" + data)
                if said[-1:] == [WAIT]:
                    assert self.connection.recv(1) == b""
                    scripted.closed.set()

        def answer(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("X-Ignored-Fields", scripted.ignored_fields)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        scripted.url = f"http://127.0.0.1:{server.server_port}"
        yield scripted
        server.shutdown()
        thread.join()
