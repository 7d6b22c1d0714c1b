"""The gevent side of the engine host: one connection per worker, many requests over it.

All calls come from greenlets of one hub. Loses nothing silently: when the host goes, every
open generation raises HostUnavailable at once. Knows neither text nor HTTP.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import gevent
import zmq.green as zmq
from gevent.queue import SimpleQueue
from zmq.utils.monitor import parse_monitor_message

from enginehouse.runtime.errors import HostUnavailable
from enginehouse.runtime.host import messages
from enginehouse.runtime.host.keys import HostKey
from enginehouse.runtime.request import (
    EngineInfo,
    ExecutorStats,
    Refusal,
    Request,
    SamplingParams,
    TokenOutput,
)

log = logging.getLogger("enginehouse.client")

STILL_S = 20.0
_RECONNECT_MS = 50
_MORE_MESSAGES = 7
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class _Silence:
    """Calls `tell` once what is expected has not come in time.

    A timer for each token would cost more than handing it over: the one that runs is let run, and
    looks when it goes off whether something else is expected since.
    """

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell
        self._timer: Any = None
        self._due_s = self._end_s = math.inf

    def expect(self, timeout_s: float | None) -> None:
        """Within so many seconds from now; None: at any time."""
        self._end_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if self._end_s < self._due_s:
            self._start(self._end_s)

    def is_over(self) -> bool:
        return time.monotonic() >= self._end_s

    def close(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
        self._timer, self._due_s = None, math.inf

    def _start(self, due_s: float) -> None:
        self.close()
        self._due_s = due_s
        self._timer = gevent.get_hub().loop.timer(max(due_s - time.monotonic(), 0.0))
        self._timer.start(self._look, update=True)

    def _look(self) -> None:
        self.close()
        if self.is_over():
            self._tell()
        elif self._end_s < math.inf:
            self._start(self._end_s)


class Generation:
    """The outputs of one HTTP request's choices, in the order they happen."""

    def __init__(self, client: EngineClient, request_ids: list[int]) -> None:
        self._client = client
        self._open = dict(zip(request_ids, range(len(request_ids)), strict=True))
        self._events: SimpleQueue[TokenOutput | HostUnavailable | None] = SimpleQueue()
        self._silence = _Silence(lambda: self._events.put(None))
        self.begun = False  # the prompt of one choice at least is, or was, being computed
        self.preempted: frozenset[int] = frozenset()  # choices that wait to be computed again

    @property
    def finished(self) -> bool:
        """Every choice has finished or was cancelled."""
        return not self._open

    @property
    def has_output(self) -> bool:
        """Whether get() has an output to give without waiting."""
        if self._events.empty():
            return False
        event = self._events.peek_nowait()
        return isinstance(event, TokenOutput) and event.request_id in self._open

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        """The next (choice, output); None after timeout_s, or once all choices were cancelled.

        Raises HostUnavailable when the engine host died.
        """
        self._silence.expect(timeout_s)
        while self._open:
            event = self._events.get()
            if event is None:
                if self._open and self._silence.is_over():
                    return None
                continue
            if isinstance(event, HostUnavailable):
                self._end(list(self._open))
                raise event
            if event.request_id not in self._open:
                continue
            index = self._open[event.request_id]
            if event.finish_reason is not None:
                self._end([event.request_id])
            return index, event
        return None

    def give_way(self, request_ids: Collection[int]) -> None:
        """Those of all that are preempted now."""
        found = (choice for request_id, choice in self._open.items() if request_id in request_ids)
        self.preempted = frozenset(found)

    def _end(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            del self._open[request_id]
        if not self._open:
            self._silence.close()

    def cancel(self, index: int | None = None) -> None:
        """Stop one choice, or all of them. Nothing is sent for a choice seen to finish."""
        ids = [i for i, choice in self._open.items() if index is None or choice == index]
        self._end(ids)
        if ids:
            self._client._cancel(ids)
            self._events.put(None)  # wakes a greenlet that waits in get()

    def _deliver(self, event: TokenOutput | HostUnavailable) -> None:
        self._events.put(event)


class EngineClient:
    """Connects to the host's address and stays: it reconnects whenever the host comes back."""

    def __init__(self, address: str, key: HostKey | None = None) -> None:
        """key: what a host asks for that does not listen on `ipc://`."""
        self.address = address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # Nothing is queued for a host that is not there: the next one would run it for nobody.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _REFUSED
        )
        if key is not None and not address.startswith("ipc://"):
            key.secure_client(self._socket)
        self._was_refused = False
        self._info: EngineInfo | None = None
        self._ready = False
        self._stats = ExecutorStats()
        self._no_room: Refusal | None = None
        self._moved_s = time.monotonic()  # when the host last did something, or had nothing to do
        self._generations: dict[int, Generation] = {}
        self._next_id = itertools.count(1)
        self._socket.connect(address)
        self._greenlets = [gevent.spawn(self._watch), gevent.spawn(self._receive)]

    @property
    def ready(self) -> bool:
        """Whether the host is connected and its engine takes requests."""
        return self._ready

    @property
    def stands_still(self) -> bool:
        """Whether work waits and the host's loop has done nothing for STILL_S seconds."""
        waiting = self._generations or self._stats.num_running or self._stats.num_waiting
        return bool(waiting) and time.monotonic() - self._moved_s > STILL_S

    @property
    def info(self) -> EngineInfo:
        """The engine last seen; HostUnavailable when there was none yet."""
        if self._info is None:
            raise HostUnavailable("the engine host is still loading its engine; try again shortly")
        return self._info

    @property
    def stats(self) -> ExecutorStats:
        return self._stats

    @property
    def num_open(self) -> int:
        """Sequences that this client has there."""
        return len(self._generations)

    def check_room(self) -> None:
        """RequestError while the host's queue is full, as far as this worker has heard."""
        if self._no_room is not None:
            raise self._no_room.error()

    def submit(
        self,
        prompt_ids: list[int],
        samplings: Sequence[SamplingParams],
        priority: int = 0,
        label: str = "",
    ) -> Generation:
        """Start one sequence per SamplingParams; HostUnavailable at once when that cannot be.

        label: what the host's log calls them.
        """
        if not self._ready:
            raise HostUnavailable("the engine host is not ready; try again shortly")
        ids = [next(self._next_id) for _ in samplings]
        generation = Generation(self, ids)
        requests = [
            Request(i, prompt_ids, s, priority, label) for i, s in zip(ids, samplings, strict=True)
        ]
        data = messages.encode(messages.Submit(requests))
        if not self._generations:
            self._moved_s = time.monotonic()
        self._generations.update(dict.fromkeys(ids, generation))
        if not self._send(data):
            self._lose_host("the engine host stopped; it is being restarted")
        return generation

    def close(self) -> None:
        gevent.killall(self._greenlets)
        self._lose_host("the client was closed")
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def _cancel(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self._generations.pop(request_id, None)
        if self._ready:
            self._send(messages.encode(messages.Cancel(request_ids)))

    def _send(self, data: bytes) -> bool:
        """Whether the host was there to be sent to."""
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _watch(self) -> None:
        """Notice the host's going and coming from the socket itself, not from silence."""
        while True:
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event & _REFUSED:
                if not self._was_refused:
                    log.error("the engine host at %s takes another key, or none", self.address)
                self._was_refused = True
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._was_refused = False
                self._send(messages.encode(messages.Hello(messages.PROTOCOL_VERSION)))
            elif event == zmq.EVENT_DISCONNECTED:
                self._lose_host("the engine host stopped; it is being restarted")

    def _lose_host(self, reason: str) -> None:
        self._ready = False
        open_generations = {id(g): g for g in self._generations.values()}
        self._generations.clear()
        for generation in open_generations.values():
            generation._deliver(HostUnavailable(reason))

    def _receive(self) -> None:
        """Steps that have gathered are handed over together, as many as a worker that is behind may
        take before others run: what is new of a stream in them is one write.
        """
        while True:
            gevent.sleep(0)  # a socket that always has more would never let others run
            self._take(self._socket.recv())
            for _ in range(_MORE_MESSAGES):
                try:
                    self._take(self._socket.recv(zmq.NOBLOCK))
                except zmq.Again:
                    break

    def _take(self, data: bytes) -> None:
        try:
            message = messages.decode_to_worker(data)
        except messages.MessageError as error:
            log.error("dropped a message from the engine host: %s", error)
            return
        if isinstance(message, messages.Outputs):
            self._moved_s = time.monotonic()
            self._deliver(message.outputs)
        elif isinstance(message, messages.Stats):
            before, self._stats = self._stats, message.stats
            if message.stats.num_iterations != before.num_iterations or not before.num_running:
                self._moved_s = time.monotonic()
            for request_id in {*before.preempted, *message.stats.preempted}:
                if request_id in self._generations:
                    self._generations[request_id].give_way(message.stats.preempted)
        elif isinstance(message, messages.Begun):
            for request_id in message.request_ids:
                if request_id in self._generations:
                    self._generations[request_id].begun = True
        elif isinstance(message, messages.Ready):
            self._info, self._ready = message.info, True
            self._stats, self._moved_s = ExecutorStats(), time.monotonic()
            self._no_room = None
        elif isinstance(message, messages.Room):
            self._no_room = message.refusal
        else:
            log.error("the engine host refused this worker: %s", message.reason)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            generation = self._generations.get(output.request_id)
            if generation is not None:  # else it was cancelled meanwhile
                if output.finish_reason is not None:
                    del self._generations[output.request_id]
                generation._deliver(output)
