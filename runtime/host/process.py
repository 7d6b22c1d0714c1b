"""The engine host process: a ROUTER socket on one side, an executor on the other.

Spawned, never forked, one per engine; gunicorn's workers are its clients. Console script
`enginehouse-host`. Knows no text: token ids come in and go out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import zmq
from msgspec import structs

from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.errors import EnginehouseError, RequestError
from enginehouse.runtime.executor import Executor, ExecutorOptions, unexpected
from enginehouse.runtime.host import messages
from enginehouse.runtime.host.admission import Admission, QueueLimits
from enginehouse.runtime.host.arguments import options_of, parse
from enginehouse.runtime.host.heartbeat import Heartbeat
from enginehouse.runtime.host.keys import HostKey, read_key
from enginehouse.runtime.host.listening import Listening
from enginehouse.runtime.host.log_lines import TRAFFIC, last_words, log_to_stderr
from enginehouse.runtime.host.mapped_files import MappedFiles
from enginehouse.runtime.host.throughput import Throughput
from enginehouse.runtime.request import (
    EngineInfo,
    FinishReason,
    Refusal,
    Request,
    TokenOutput,
    log_fields,
)

log = logging.getLogger("enginehouse.host")
traffic = logging.getLogger(TRAFFIC)

_STATS_PERIOD_S = 1.0
_IDLE_POLL_MS = 500
_LONGEST_POLL_S = 0.01  # while nothing but grammars is under way
_MAX_UNREAD_MESSAGES = 100_000


class EngineHost:
    """Owns the executor and which client each sequence belongs to.

    Clients number their requests themselves; the executor's ids are this class's own.
    """

    def __init__(
        self,
        executor: Executor,
        socket: zmq.Socket[bytes],
        limits: QueueLimits = QueueLimits(),  # noqa: B008
        heartbeat_fd: int | None = None,
    ) -> None:
        self.executor = executor
        executor.on_planned = self._tell_begun
        self.socket = socket
        self.admission = Admission(limits, executor.info.max_batch_size)
        self.heartbeat = Heartbeat(heartbeat_fd, time.monotonic())
        self._was_full = False
        self._ids: dict[tuple[bytes, int], int] = {}  # (client, its id) -> executor's id
        self._owners: dict[int, tuple[bytes, int]] = {}  # and back
        self._not_begun: set[int] = set()  # executor's ids
        self._clients: set[bytes] = set()
        self._next_id = 0
        self._next_stats_s = 0.0
        self._throughput = Throughput(time.monotonic())

    def run(self, wanted: Callable[[], bool]) -> None:
        """Serve as long as `wanted()`: take messages, step, hand out tokens."""
        while wanted():
            self._receive(0 if self.executor.busy else _IDLE_POLL_MS)
            if self.executor.busy:
                self._hand_out(self.executor.poll(_LONGEST_POLL_S))
            self._end_overdue()
            self._tell_room()
            self._report_stats()

    def _receive(self, timeout_ms: int) -> None:
        """Handle every message that is there; wait for a first one at most timeout_ms."""
        while self.socket.poll(timeout_ms):
            timeout_ms = 0
            client, data = self.socket.recv_multipart()
            try:
                self._handle(client, messages.decode_to_host(data))
            except messages.MessageError as error:
                log.error("dropped a message: %s", error)

    def _handle(self, client: bytes, message: messages.ToHost) -> None:
        if isinstance(message, messages.Submit):
            self._submit_all(client, message.requests)
        elif isinstance(message, messages.Cancel):
            for request_id in message.request_ids:
                self._cancel(client, request_id)
        elif message.version != messages.PROTOCOL_VERSION:
            reason = (
                f"protocol version {message.version}; this host speaks "
                f"{messages.PROTOCOL_VERSION}: run both from one installation"
            )
            self._send(client, messages.Refused(reason))
        else:
            self._clients.add(client)
            self._send(client, messages.Ready(messages.PROTOCOL_VERSION, self._info()))

    def _info(self) -> EngineInfo:
        limits = self.admission.limits
        return dataclasses.replace(
            self.executor.info,
            max_queue_requests=limits.max_requests,
            max_queue_tokens=limits.max_tokens,
            max_queue_s=limits.max_wait_s,
        )

    def _submit_all(self, client: bytes, requests: list[Request]) -> None:
        """All of one answer's sequences, or none."""
        num_tokens = sum(len(request.prompt_ids) for request in requests)
        refusal = self.admission.refusal(len(requests), num_tokens)
        for request in requests:
            if refusal is None:
                self._submit(client, request)
            else:
                error = refusal.error()
                self._tell(client, [_failed(request.request_id, error, refusal)])

    def _submit(self, client: bytes, request: Request) -> None:
        self._next_id += 1
        try:
            self.executor.submit(dataclasses.replace(request, request_id=self._next_id))
        except RequestError as error:
            refusal = Refusal(error.message, error.param, error.code)
            self._tell(client, [_failed(request.request_id, error, refusal)])
            return
        except Exception as error:  # of one request, whatever it is: the others go on
            log.exception("a request was not taken; the others go on", extra=log_fields(request))
            self.executor.cancel(self._next_id)
            self._tell(client, [_failed(request.request_id, unexpected(error))])
            return
        self._ids[client, request.request_id] = self._next_id
        self._owners[self._next_id] = (client, request.request_id)
        self._not_begun.add(self._next_id)
        self.admission.join(self._next_id, len(request.prompt_ids))

    def _cancel(self, client: bytes, request_id: int) -> None:
        own_id = self._ids.pop((client, request_id), None)
        if own_id is not None:
            del self._owners[own_id]
            self._not_begun.discard(own_id)
            self.admission.leave(own_id)
            self.executor.cancel(own_id)

    def _tell_begun(self) -> None:
        """Workers know then whether a client that leaves had waited, or was being served. The
        executor is at work: a worker that is gone is noticed later.
        """
        begun = [own_id for own_id in self._not_begun if not self.executor.waits(own_id)]
        self._not_begun.difference_update(begun)
        for client, request_ids in self._by_client(begun).items():
            with contextlib.suppress(zmq.ZMQError):
                data = messages.encode(messages.Begun(request_ids))
                self.socket.send_multipart([client, data], zmq.NOBLOCK)

    def _by_client(self, own_ids: Iterable[int]) -> dict[bytes, list[int]]:
        """The executor's ids as each client's own; of those that are owned."""
        found: dict[bytes, list[int]] = {}
        for client, request_id in filter(None, map(self._owners.get, own_ids)):
            found.setdefault(client, []).append(request_id)
        return found

    def _hand_out(self, outputs: list[TokenOutput]) -> None:
        """One message per client and iteration, or few."""
        by_client: dict[bytes, list[TokenOutput]] = {}
        for output in outputs:
            client, request_id = self._owners[output.request_id]
            self.admission.begin(output.request_id)
            if output.finish_reason is not None:
                self.admission.leave(output.request_id)
                self._not_begun.discard(output.request_id)
                del self._owners[output.request_id], self._ids[client, request_id]
            translated = structs.replace(output, request_id=request_id)
            by_client.setdefault(client, []).append(translated)
        for client, translated_outputs in by_client.items():
            for message in messages.in_messages(translated_outputs):
                self._tell(client, message.outputs)

    def _tell(self, client: bytes, outputs: list[TokenOutput]) -> None:
        """One message; an output that makes none is its sequence's end, and no other's."""
        try:
            data = messages.encode(messages.Outputs(outputs))
        except Exception as error:  # too long, or of types that no message has
            if len(outputs) > 1:
                for output in outputs:
                    self._tell(client, [output])
                return
            log.exception("an output cannot be sent; the others go on")
            request_id = outputs[0].request_id
            self._cancel(client, request_id)
            data = messages.encode(messages.Outputs([_failed(request_id, unexpected(error))]))
        self._send_bytes(client, data)

    def _send(self, client: bytes, message: messages.ToWorker) -> None:
        self._send_bytes(client, messages.encode(message))

    def _send_bytes(self, client: bytes, data: bytes) -> None:
        """Never waits: a client that is gone, or that reads nothing, loses its sequences."""
        try:
            self.socket.send_multipart([client, data], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.info("a worker is gone (%s); its sequences are cancelled", error)
            self._clients.discard(client)
            for owner, request_id in [key for key in self._ids if key[0] == client]:
                self._cancel(owner, request_id)

    def _end_overdue(self) -> None:
        """Those that wait for too long are told so, and run for nobody."""
        for own_id in self.admission.overdue():
            if own_id not in self._owners or not self.executor.waits(own_id):
                continue  # its client was lost a moment ago, or its prompt is being computed
            client, request_id = self._owners[own_id]
            self._cancel(client, request_id)
            refusal = self.admission.timeout()
            self._tell(client, [_failed(request_id, refusal.error(), refusal)])

    def _tell_room(self, again: bool = False) -> None:
        """Workers refuse what would find no room before they read its prompt."""
        refusal = self.admission.refusal(1, 1)
        if (refusal is not None) != self._was_full or (again and self._was_full):
            self._was_full = refusal is not None
            for client in list(self._clients):
                self._send(client, messages.Room(refusal))

    def _report_stats(self) -> None:
        now = time.monotonic()
        if now >= self._next_stats_s:
            self._next_stats_s = now + _STATS_PERIOD_S
            stats = self.executor.stats()
            # Tokens too: an engine's own statistics may end, and it goes on.
            tokens = stats.num_prompt_tokens, stats.num_generated_tokens
            is_running = bool(self._owners) and stats.num_running > 0
            self.heartbeat.beat(now, is_running, (stats.num_iterations, *tokens))
            self._tell_room(again=True)
            preempted = self._by_client(stats.preempted)
            for client in list(self._clients):
                told = dataclasses.replace(stats, preempted=tuple(preempted.get(client, ())))
                self._send(client, messages.Stats(told))
            if line := self._throughput.line(stats, now):
                traffic.info(line)


def _failed(
    request_id: int, error: EnginehouseError, refusal: Refusal | None = None
) -> TokenOutput:
    return TokenOutput(
        request_id, finish_reason=FinishReason.ERROR, error=str(error), refusal=refusal
    )


def report(ready_fd: int | None, line: dict[str, Any]) -> None:
    """Tell the parent, if there is one, how loading ended: one line of JSON."""
    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)
        os.write(ready_fd, json.dumps(line).encode() + b"\n")


def serve(
    engine_dir: Path,
    address: str,
    options: ExecutorOptions,
    ready_fd: int | None,
    limits: QueueLimits = QueueLimits(),  # noqa: B008
    key: HostKey | None = None,
) -> None:
    """Load an engine and serve it at a ZeroMQ address until SIGTERM, or until the parent dies.

    ready_fd: a pipe that gets one JSON line (EngineInfo, and the `address` that port 0 became) once
    the engine takes requests, then its heartbeat; with it the host ends when its parent does. key:
    what clients must have. Raises EngineError when the engine cannot be opened, and when one of its
    files is changed while it is served.
    """
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is gunicorn's to handle
    parent = os.getppid()
    executor = open_executor(engine_dir, options)
    files = MappedFiles(engine_dir, time.monotonic())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A worker that stands still for a while must find every token when it goes on; gunicorn
    # ends one that stands still for good, long before so many messages have gathered.
    socket.setsockopt(zmq.SNDHWM, _MAX_UNREAD_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
    door = None if key is None else key.secure_host(socket)
    listening = Listening(socket, address, time.monotonic())
    report(ready_fd, {**msgspec.to_builtins(executor.info), "address": listening.address})

    def wanted() -> bool:
        now_s = time.monotonic()
        files.check(now_s)
        listening.keep(now_s)
        orphaned = ready_fd is not None and os.getppid() != parent
        return not stopped and not orphaned

    try:
        EngineHost(executor, socket, limits, ready_fd).run(wanted)
    finally:
        executor.close()
        files.close()
        socket.close()
        if door is not None:
            door.stop()
        context.term()


def main(argv: list[str] | None = None) -> int:
    """Command line of `enginehouse-host`; exit status 2 when the engine cannot be served."""
    args = parse(argv)
    log_to_stderr(args.log_level, args.log_traffic, args.log_format)
    try:
        limits = QueueLimits(args.max_queue_requests, args.max_queue_tokens, args.max_queue_s)
        key = None if args.key_file is None else read_key(args.key_file)
        serve(args.engine, args.address, options_of(args), args.ready_fd, limits, key)
    except EnginehouseError as error:
        last_words("enginehouse-host", str(error), args.log_format)
        report(args.ready_fd, {"error": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
