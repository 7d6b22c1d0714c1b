"""What gunicorn's workers and the engine host say to each other: versioned, bounded, typed.

MessagePack through msgspec: unknown types and wrong shapes are refused, nothing is executed.
Knows no socket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
from msgspec.structs import replace

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.request import EngineInfo, ExecutorStats, Refusal, Request, TokenOutput

PROTOCOL_VERSION = 8
MAX_MESSAGE_BYTES = 16 << 20
MAX_SCORES = 4096  # log probabilities of prompts in a message: 2 MB with 20 alternatives each
_SCORE_BYTES = 512  # what one takes at most


class MessageError(EnginehouseError):
    """Bytes that are no message of this protocol."""


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Worker -> host, first on every connection. Answered by Ready."""

    version: int


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """Worker -> host: run these sequences. Outputs follow until each has a finish_reason."""

    requests: list[Request]


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Worker -> host: stop these sequences; no further output of them is wanted."""

    request_ids: list[int]


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Host -> worker: the engine is loaded and takes requests."""

    version: int
    info: EngineInfo


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """Host -> worker: what one iteration produced for this worker's sequences."""

    outputs: list[TokenOutput]


class Begun(msgspec.Struct, tag="begun", frozen=True):
    """Host -> worker: the prompts of these sequences are being computed; each is told once."""

    request_ids: list[int]


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """Host -> worker, about once a second."""

    stats: ExecutorStats


class Room(msgspec.Struct, tag="room", frozen=True):
    """Host -> worker: whether the queue has room, each time that changes; and about once a second
    while it has none. refusal: what is answered meanwhile.
    """

    refusal: Refusal | None


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Host -> worker: the connection cannot be used (another protocol version)."""

    reason: str


ToHost = Hello | Submit | Cancel
ToWorker = Ready | Outputs | Begun | Stats | Room | Refused
Message = ToHost | ToWorker

_encoder = msgspec.msgpack.Encoder()
_to_host: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)


def encode(message: Message) -> bytes:
    """Bytes of a message; MessageError when they exceed MAX_MESSAGE_BYTES."""
    data = _encoder.encode(message)
    _check_size(data)
    return data


def in_messages(outputs: Iterable[TokenOutput]) -> Iterator[Outputs]:
    """What one iteration produced, in its order: one message, more where prompts of any length are
    scored, or many are pooled.
    """
    gathered: list[TokenOutput] = []
    room = MAX_SCORES
    for output in outputs:
        if output.embedding is not None:
            if room <= 0:
                yield Outputs(gathered)
                gathered, room = [], MAX_SCORES
            room -= -(-len(output.embedding) // _SCORE_BYTES)
        if output.prompt_logprobs is None:  # nearly every one
            gathered.append(output)
            continue
        scores = output.prompt_logprobs
        while len(scores) > room:
            gathered.append(TokenOutput(output.request_id, prompt_logprobs=scores[:room]))
            yield Outputs(gathered)
            scores, gathered, room = scores[room:], [], MAX_SCORES
        room -= len(scores)
        gathered.append(replace(output, prompt_logprobs=scores or None))
    if gathered:
        yield Outputs(gathered)


def decode_to_host(data: bytes) -> ToHost:
    """A message a worker sent; MessageError when it is none."""
    _check_size(data)
    try:
        return _to_host.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MessageError(f"not a message to the host: {error}") from None


def decode_to_worker(data: bytes) -> ToWorker:
    """A message the host sent; MessageError when it is none."""
    _check_size(data)
    try:
        return _to_worker.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MessageError(f"not a message to a worker: {error}") from None


def _check_size(data: bytes) -> None:
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
