"""Load on a running server: the same prompts alone and at once, and what each client was sent.

Inter-token time is between two pieces of text: where the server holds a token back (half a
character), it counts with the next one. The prompts are short and return in every round, so the
time to the first token is that of a prefix already known to the engine. Every loop here has an
end: of clients, of tokens, and of seconds. What the figures come to is levels.py's business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import CHAT, Address, Connection, ServerRefused
from enginehouse.server.client.stream_reader import BrokenStream, Stream, read_stream

MAX_CLIENTS = 32
_SUBJECTS = (
    *("a lighthouse", "a steam engine", "a baker", "a river", "a clockmaker", "a fox"),
    *("a violin", "a glacier", "a market", "an old bridge", "a beekeeper", "a sailor"),
    *("a library", "a comet", "a gardener", "a windmill", "a painter", "a desert"),
    *("a postman", "a whale", "a chess player", "a castle", "a doctor", "a volcano"),
    *("a weaver", "a kite", "a farmer", "a submarine", "a forest", "a teacher"),
    *("a coal mine", "an orchestra"),
)
PROMPTS = tuple(f"Write a long story about {subject}." for subject in _SUBJECTS)


def connect_for_load(address: Address, *, allow_remote: bool, seconds: float) -> Connection:
    """A connection that may be loaded, and only for so long.

    Raises EnginehouseError for another machine, unless that is allowed.
    """
    if not allow_remote and not address.is_loopback:
        raise EnginehouseError(
            f"{address.host} is not this machine; give --allow-remote if it is yours to load"
        )
    end_s = time.monotonic() + seconds

    def remaining_s() -> float:
        remaining = end_s - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("--timeout is over")
        return remaining

    return Connection(address, remaining_s)


class LoadClient:
    """Asks one model of one server, always for so many tokens at temperature 0."""

    def __init__(self, connection: Connection, model: str | None, num_tokens: int) -> None:
        self._connection = connection
        self._num_tokens = num_tokens
        self.model = model or connection.first_model()
        self.ignore_eos = self._accepts_ignore_eos()

    def _accepts_ignore_eos(self) -> bool:
        """Ask once: a server that does not know the field refuses it or reports it as ignored."""
        try:
            answer = self._connection.fetch("POST", CHAT, self._body("Hello.", ignore_eos=True))
        except ServerRefused as error:
            if error.status == 400 and b"ignore_eos" in error.content:
                return False
            raise
        return "ignore_eos" not in answer.ignored_fields

    def _body(self, prompt: str, **fields: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._num_tokens,
            "temperature": 0,
            **fields,
        }

    def stream(self, prompt: str) -> Stream:
        """Stream one answer. Raises BrokenStream, whatever went wrong."""
        body = self._body(prompt, stream=True, stream_options={"include_usage": True})
        body |= {"ignore_eos": True} if self.ignore_eos else {}
        asked_s = time.monotonic()
        try:
            with self._connection.stream(CHAT, body) as lines:
                return read_stream(lines, asked_s)
        except BrokenStream:
            raise
        except EnginehouseError as error:
            raise BrokenStream(str(error)) from None


class Round(NamedTuple):
    """Streams of one burst by client (None: it failed), and its seconds from start to last end."""

    streams: list[Stream | None]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(s.num_tokens for s in self.streams if s is not None) / self.wall_s


def run_round(ask: Callable[[str], Stream], prompts: Sequence[str], faults: list[str]) -> Round:
    """All prompts at once, a thread for each; what goes wrong is added to `faults`."""
    streams: list[Stream | None] = [None] * len(prompts)
    start = threading.Barrier(len(prompts) + 1)

    def client(index: int) -> None:
        start.wait()
        try:
            streams[index] = ask(prompts[index])
        except BrokenStream as error:
            faults.append(f"{len(prompts)} clients, client {index}: {error}")

    threads = [
        threading.Thread(target=client, args=(index,), daemon=True) for index in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    start.wait()
    started_s = time.monotonic()
    for thread in threads:
        thread.join()
    ends = [stream.end_s for stream in streams if stream is not None]
    return Round(streams, max(ends, default=time.monotonic()) - started_s)


def mix_ups(streams: Sequence[Stream | None], alone: Sequence[Stream], seen: set[str]) -> list[str]:
    """Ids that came twice in the run, and texts that are exactly another client's."""
    found = []
    owner = {stream.text: index for index, stream in enumerate(alone)}
    for index, stream in enumerate(streams):
        if stream is None:
            continue
        if stream.id in seen:
            found.append(f"client {index}: id {stream.id} was another stream's")
        seen.add(stream.id)
        if stream.text != alone[index].text and stream.text in owner:
            found.append(f"client {index} was sent the text of client {owner[stream.text]}")
    return found
