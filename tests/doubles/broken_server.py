"""A proxy that stands before a server and breaks one thing of it, by name; `none` breaks nothing.

    with breaking("http://127.0.0.1:8000", "seed_ignored") as url: ...

Streams are passed on event by event. A client that leaves closes the connection behind it too. What
is not the mutation's goes through byte by byte.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

JSON = dict[str, Any]
Schedule = Callable[[float, float, float], float]
_TIMEOUT_S = 600.0
_GENERATES = ("/completions",)  # of both endpoints
_CHAT = "/chat/completions"
_GRAMMARS = {"response_format", "structured_outputs", "regex", "ebnf", "tools"} | {
    f"guided_{kind}" for kind in ("json", "regex", "grammar", "choice")
}


def same(path: str, body: JSON) -> JSON:
    return body


class Told:
    """What one answer goes through on its way back: the whole of it, or a stream's events."""

    def whole(self, path: str, answer: JSON) -> JSON:
        return answer

    def event(self, path: str, event: JSON) -> JSON | None:
        """What is passed on when an event comes, if anything is."""
        return self.whole(path, event)


@dataclass(frozen=True)
class Mutation:
    """asked: a request's body as it is sent on. told: makes what its answer goes through. schedule:
    when an event is passed on, of the moments at which it came, was asked for, and the first came.
    """

    asked: Callable[[str, JSON], JSON] = same
    told: Callable[[], Told] = Told
    schedule: Schedule | None = None


def seed_ignored(path: str, body: JSON) -> JSON:
    seed = body.get("seed")
    legal = isinstance(seed, int) and seed >= 0
    return {name: value for name, value in body.items() if name != "seed" or not legal}


def stop_strings_off(path: str, body: JSON) -> JSON:
    """They are looked for, and never found."""

    def unfound(stop: Any) -> Any:
        return f"\ue000{stop}" if isinstance(stop, str) and stop else stop

    if "stop" not in body:
        return body
    stop = body["stop"]
    return {**body, "stop": list(map(unfound, stop)) if isinstance(stop, list) else unfound(stop)}


def json_mode_ignored(path: str, body: JSON) -> JSON:
    if body.get("response_format") != {"type": "json_object"}:
        return body
    return {**body, "response_format": {"type": "text"}}


def eos_lost(path: str, body: JSON) -> JSON:
    """The model's end token ends nothing; a grammar's end does."""
    if not path.endswith(_GENERATES) or "ignore_eos" in body or _GRAMMARS & body.keys():
        return body
    return {**body, "ignore_eos": True}


def template_newline(path: str, body: JSON) -> JSON:
    """Behind the last message of the user."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body
    changed = list(messages)
    for index in reversed(range(len(messages))):
        message = messages[index]
        if isinstance(message, dict) and message.get("role") == "user":
            changed[index] = {**message, "content": _with_newline(message.get("content"))}
            break
    return {**body, "messages": changed}


def _with_newline(content: Any) -> Any:
    if isinstance(content, str):
        return content + "\n"
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        last = {**content[-1], "text": str(content[-1].get("text")) + "\n"}
        return [*content[:-1], last]
    return content


class UsageOffByOne(Told):
    def whole(self, path: str, answer: JSON) -> JSON:
        usage = answer.get("usage")
        if not usage:
            return answer
        counts = {name: usage[name] + 1 for name in ("completion_tokens", "total_tokens")}
        return {**answer, "usage": {**usage, **counts}}


class FieldVanished(Told):
    """Of plain answers of a chat."""

    def whole(self, path: str, answer: JSON) -> JSON:
        if answer.get("object") != "chat.completion":
            return answer
        return {name: value for name, value in answer.items() if name != "system_fingerprint"}


class LogprobOffByOnePosition(Told):
    """Each token of a chat tells the numbers of the one before; the first keeps its own."""

    def __init__(self) -> None:
        self._before: dict[int, JSON] = {}

    def whole(self, path: str, answer: JSON) -> JSON:
        if not path.endswith(_CHAT):
            return answer
        return {**answer, "choices": list(map(self._shifted, answer.get("choices", [])))}

    def _shifted(self, choice: JSON) -> JSON:
        logprobs = choice.get("logprobs")
        if not logprobs or not logprobs.get("content"):
            return choice
        content = []
        for entry in logprobs["content"]:
            numbers = {name: entry[name] for name in ("logprob", "top_logprobs")}
            content.append({**entry, **self._before.get(choice["index"], numbers)})
            self._before[choice["index"]] = numbers
        return {**choice, "logprobs": {**logprobs, "content": content}}


class StreamMissesLastDelta(Told):
    """Of a chat: what has text is held until the next that has some, and dropped at the end."""

    def __init__(self) -> None:
        self._held: JSON | None = None

    def event(self, path: str, event: JSON) -> JSON | None:
        deltas = [choice.get("delta", {}) for choice in event.get("choices", [])]
        if path.endswith(_CHAT) and any(delta.get("content") for delta in deltas):
            held, self._held = self._held, event
            return held
        return event


def steps_10_percent_slower(came_s: float, asked_s: float, first_s: float) -> float:
    return first_s + 1.1 * (came_s - first_s)


def ttft_doubled(came_s: float, asked_s: float, first_s: float) -> float:
    return came_s + (first_s - asked_s)


MUTATIONS: dict[str, Mutation] = {
    "none": Mutation(),
    "seed_ignored": Mutation(asked=seed_ignored),
    "stop_strings_off": Mutation(asked=stop_strings_off),
    "json_mode_ignored": Mutation(asked=json_mode_ignored),
    "eos_lost": Mutation(asked=eos_lost),
    "template_newline": Mutation(asked=template_newline),
    "usage_off_by_one": Mutation(told=UsageOffByOne),
    "field_vanished": Mutation(told=FieldVanished),
    "logprob_off_by_one_position": Mutation(told=LogprobOffByOnePosition),
    "stream_misses_last_delta": Mutation(told=StreamMissesLastDelta),
    "steps_10_percent_slower": Mutation(schedule=steps_10_percent_slower),
    "ttft_doubled": Mutation(schedule=ttft_doubled),
}


@contextmanager
def breaking(url: str, name: str) -> Iterator[str]:
    """The address of a server that is the one at `url`, but for what `name` breaks."""
    address, mutation = urlsplit(url), MUTATIONS[name]

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True

        def answer(self) -> None:
            asked_s = time.monotonic()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {
                key: value
                for key, value in self.headers.items()
                if key.lower() not in ("host", "content-length", "connection")
            }
            sent = _changed(body, lambda data: mutation.asked(self.path, data))
            behind = http.client.HTTPConnection(
                address.hostname or "", address.port, timeout=_TIMEOUT_S
            )
            try:
                behind.request(self.command, self.path, sent, headers)
                response = behind.getresponse()
                self._pass_on(response, asked_s)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                behind.close()

        do_GET = do_POST = do_HEAD = do_OPTIONS = answer

        def _pass_on(self, response: http.client.HTTPResponse, asked_s: float) -> None:
            told = mutation.told()
            streams = response.headers.get("Content-Type", "").startswith("text/event-stream")
            content = b"" if streams else response.read()
            if response.status == 200:
                content = _changed(content, lambda data: told.whole(self.path, data))
            self.send_response(response.status)
            for key, value in response.headers.items():
                if key.lower() not in ("content-length", "connection", "transfer-encoding", "date"):
                    self.send_header(key, value)
            if not streams:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            if streams:
                events = _events(response)
                for event in _on_time(events, mutation.schedule, asked_s):
                    self.wfile.write(_told_instead(event, told, self.path))

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _changed(content: bytes, change: Callable[[JSON], JSON]) -> bytes:
    """The same bytes where they are no object, or nothing of it changes."""
    try:
        data = json.loads(content)
    except ValueError:
        return content
    if not isinstance(data, dict) or (changed := change(data)) == data:
        return content
    return json.dumps(changed).encode()


def _events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Each with the empty line behind it, as it comes."""
    event = b""
    while line := response.readline():
        event += line
        if not line.strip():
            yield event
            event = b""


def _told_instead(event: bytes, told: Told, path: str) -> bytes:
    data = event.removeprefix(b"data: ").strip()
    if not event.startswith(b"data: ") or data == b"[DONE]":
        return event
    given = json.loads(data)
    instead = told.event(path, given)
    if instead == given:
        return event
    return b"" if instead is None else b"data: " + json.dumps(instead).encode() + b"\n\n"


def _on_time(events: Iterator[bytes], schedule: Schedule | None, asked_s: float) -> Iterator[bytes]:
    """Events, each not before its time; meanwhile a thread notes when the others came."""
    if schedule is None:
        yield from events
        return
    came: queue.Queue[tuple[float, bytes] | None] = queue.Queue()

    def read() -> None:
        try:
            for event in events:
                came.put((time.monotonic(), event))
        finally:
            came.put(None)

    threading.Thread(target=read, daemon=True).start()
    first_s: float | None = None
    while (item := came.get()) is not None:
        came_s, event = item
        first_s = came_s if first_s is None else first_s
        time.sleep(max(0.0, schedule(came_s, asked_s, first_s) - time.monotonic()))
        yield event
