"""RequestOutput and CompletionOutput: token ids that accumulate, and what is new in them."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


class Response(NamedTuple):
    """What one iteration gave a sequence; finish_reason None while it goes on."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None


@dataclass
class CompletionOutput:
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    _tokens_seen: int = 0
    _logprobs_seen: int = 0

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._tokens_seen :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]]:
        return self.logprobs[self._logprobs_seen :]

    def take(self, response: Response) -> None:
        self._tokens_seen, self._logprobs_seen = len(self.token_ids), len(self.logprobs)
        self.token_ids += response.token_ids
        self.logprobs += response.logprobs
        self.finish_reason, self.stop_reason = response.finish_reason, response.stop_reason


class RequestError(RuntimeError):
    """tensorrt_llm.executor.utils.RequestError: one request failed in the engine."""


class RequestOutput:
    """To be awaited, or iterated once where it was made: in a running loop, or in a thread."""

    def __init__(
        self, request_id: int, prompt: list[int], params: Any, abort: Callable[[int], None]
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt
        self.sampling_params = params
        self.outputs = [CompletionOutput()]
        self.context_logits: Any = None
        self._abort = abort
        self._aborted = self._done = False
        self._queue: queue.Queue[Response] = queue.Queue()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._aqueue: asyncio.Queue[Response] = asyncio.Queue()

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._abort(self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def put(self, response: Response) -> None:
        """From the engine's thread."""
        if self._loop is None:
            self._queue.put(response)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._aqueue.put_nowait, response)

    def _take(self, response: Response) -> None:
        self._done = response.finish_reason is not None or response.error is not None
        if response.error is not None:
            raise RequestError(response.error)
        self.outputs[0].take(response)

    def __iter__(self) -> RequestOutput:
        return self

    def __next__(self) -> RequestOutput:
        if self._done:
            raise StopIteration
        assert self._loop is None, "made in a running loop: to be awaited"
        self._take(self._queue.get())
        return self

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        assert self._loop is not None, "made outside of a loop: to be iterated"
        self._take(await self._aqueue.get())
        return self

    def result(self) -> RequestOutput:
        for _ in self:
            pass
        return self
