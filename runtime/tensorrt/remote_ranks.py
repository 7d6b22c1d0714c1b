"""Ranks on other machines come to the leader over TCP, and are followers like those beside it.

Both sides prove that they have the same secret (multiprocessing's challenge, an HMAC each way),
then a rank says which one it is and what engine it has. What follows is not encrypted, as what NCCL
exchanges is not: it is for a network that the ranks have to themselves. Knows no command.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Collection
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from enginehouse.runtime.errors import EngineError

_TALK_S = 10  # a stranger that says nothing holds nobody up for longer
_RETRY_S = 0.5
_BACKLOG = 64
# A machine that is gone without a word is noticed after 10 + 3 x 5 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class LeaderLost(EngineError):
    """The leader is not there, or cannot take the rank now: to come back to it may help."""


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT; of IPv6 in brackets. EngineError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise EngineError(f"{address} is no address of the ranks' leader; wanted HOST:PORT")
    return host.strip("[]"), int(port)


def accept_ranks(
    address: str, secret: bytes, ranks: Collection[int], digest: str, told: Any, seconds: float
) -> dict[int, Connection]:
    """Each rank's pipe, once all have come.

    digest: of the engine, which theirs must be. told: JSON, what a rank is told when it is taken.
    EngineError names those that have not come in time.
    """
    found: dict[int, Connection] = {}
    deadline_s = time.monotonic() + seconds
    host, port = split_address(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise EngineError(f"ranks cannot be waited for at {address}: {error}") from None
    try:
        with listener:
            while missing := sorted(set(ranks) - found.keys()):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise EngineError(
                        f"ranks {', '.join(map(str, missing))} have not come to {address} in "
                        f"{seconds:g} s; start `enginehouse-rank` for each of them"
                    )
                listener.settimeout(left_s)
                with suppress(TimeoutError):
                    peer = listener.accept()[0]
                    taken = _take(peer, secret, missing, found.keys(), digest, told)
                    found.update(taken)
    except BaseException:
        for pipe in found.values():
            pipe.close()
        raise
    return found


def join_leader(
    address: str, secret: bytes, rank: int, digest: str, seconds: float
) -> tuple[Connection, Any]:
    """A rank's pipe, and what it is told.

    Raises LeaderLost where the leader is not there in `seconds`, goes away, or has the rank
    already; EngineError where it has another secret or engine, or wants no such rank.
    """
    deadline_s = time.monotonic() + seconds
    while True:
        try:
            peer = socket.create_connection(split_address(address), timeout=_TALK_S)
            break
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise LeaderLost(
                    f"no leader listens at {address} after {seconds:g} s ({error})"
                ) from None
            time.sleep(_RETRY_S)
    pipe = _pipe_of(peer)
    try:
        answer_challenge(pipe, secret)
        deliver_challenge(pipe, secret)
        pipe.send_bytes(json.dumps({"rank": rank, "digest": digest}).encode())
        answer = json.loads(pipe.recv_bytes())
    except AuthenticationError:
        pipe.close()
        raise EngineError(f"the leader at {address} has another secret in its key file") from None
    except (OSError, EOFError, ValueError) as error:
        pipe.close()
        raise LeaderLost(f"{address} is no leader that wants ranks: {error!r}") from None
    if "error" in answer:
        pipe.close()
        refused = LeaderLost if answer["again"] else EngineError
        raise refused(f"the leader at {address}: {answer['error']}")
    _wait_for_ever(pipe)
    return pipe, answer["told"]


def _take(
    peer: socket.socket,
    secret: bytes,
    missing: Collection[int],
    taken: Collection[int],
    digest: str,
    told: Any,
) -> dict[int, Connection]:
    """The rank that has come, where it is one; whoever else is sent away, and told whether to come
    again.
    """
    pipe = _pipe_of(peer)
    try:
        deliver_challenge(pipe, secret)
        answer_challenge(pipe, secret)
        said = json.loads(pipe.recv_bytes())
        rank, theirs = said["rank"], said["digest"]
        if theirs != digest:
            refusal = f"rank {rank} has the engine {theirs[:19]}, and the leader {digest[:19]}"
        elif rank in taken:
            refusal = f"rank {rank} has come already, and its place is not free yet"
        elif rank not in missing:
            refusal = f"rank {rank} is not waited for; wanted one of {', '.join(map(str, missing))}"
        else:
            pipe.send_bytes(json.dumps({"told": told}).encode())
            _wait_for_ever(pipe)
            return {rank: pipe}
        again = theirs == digest and rank in taken
        pipe.send_bytes(json.dumps({"error": refusal, "again": again}).encode())
    except (AuthenticationError, OSError, EOFError, ValueError, KeyError, TypeError):
        pass  # a stranger
    pipe.close()
    return {}


def _pipe_of(peer: socket.socket) -> Connection:
    """As multiprocessing's pipes are, with a time limit for each read and write."""
    peer.setblocking(True)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _limit(peer, _TALK_S)
    return Connection(peer.detach())


def _wait_for_ever(pipe: Connection) -> None:
    with socket.socket(fileno=pipe.fileno()) as peer:
        _limit(peer, 0)
        peer.detach()


def _limit(peer: socket.socket, seconds: int) -> None:
    """Of a read or a write; 0: none. A struct timeval."""
    for which in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        peer.setsockopt(socket.SOL_SOCKET, which, struct.pack("@ll", seconds, 0))
