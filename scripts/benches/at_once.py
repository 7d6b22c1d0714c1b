"""Our server over an engine that answers at once: `gunicorn ... "benches.at_once:create_app()"`.

The engine is a double of the client, in the worker: what is measured is HTTP, JSON, templates and
text, and no core is shared with a host. Its outputs pass through the real client's queues, one for
each token and sequence. An answer of LONG tokens or more comes at a pace, as a model's does: a
token every BENCH_PERIOD_S, all sequences in one step; its first comes at once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import gevent
from flask import Flask
from gevent.event import Event

from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.host.client import EngineClient, Generation
from enginehouse.runtime.request import (
    EngineInfo,
    ExecutorStats,
    FinishReason,
    SamplingParams,
    TokenOutput,
)
from enginehouse.server import app

LONG = 1000
TEXT = " The engine answers at once, and says so in the plainest of words it has."


class AtOnce:
    """The client's double. token_ids: what every answer repeats."""

    ready, stands_still = True, False

    def __init__(self, info: EngineInfo, token_ids: Sequence[int], period_s: float) -> None:
        self.info, self.stats = info, ExecutorStats()
        self._token_ids, self._period_s = token_ids, period_s
        self._next_id = itertools.count(1)
        self._fast: dict[int, _Running] = {}
        self._slow: dict[int, _Running] = {}
        self._wake = Event()
        gevent.spawn(self._run_fast)
        gevent.spawn(self._run_slow)

    def check_room(self) -> None:
        pass

    def submit(
        self,
        prompt_ids: list[int],
        samplings: Sequence[SamplingParams],
        priority: int = 0,
        label: str = "",
    ) -> Generation:
        ids = [next(self._next_id) for _ in samplings]
        generation = Generation(cast(EngineClient, self), ids)
        for request_id, sampling in zip(ids, samplings, strict=True):
            running = _Running(generation, request_id, sampling.max_tokens)
            is_long = sampling.max_tokens >= LONG
            if is_long:
                running.step(self._token_ids)
            (self._slow if is_long else self._fast)[request_id] = running
        self._wake.set()
        return generation

    def _cancel(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self._fast.pop(request_id, None)
            self._slow.pop(request_id, None)

    def _run_fast(self) -> None:
        while True:
            if not self._fast:
                self._wake.clear()
                self._wake.wait()
            self._step(self._fast)
            gevent.sleep(0)

    def _run_slow(self) -> None:
        while True:
            gevent.sleep(self._period_s)
            self._step(self._slow)

    def _step(self, running: dict[int, _Running]) -> None:
        for request_id, each in list(running.items()):
            if each.step(self._token_ids):
                running.pop(request_id, None)


class _Running:
    def __init__(self, generation: Generation, request_id: int, num_tokens: int) -> None:
        self._generation, self._id = generation, request_id
        self._num_tokens, self._done = num_tokens, 0

    def step(self, token_ids: Sequence[int]) -> bool:
        """Give the next token; whether it was the last."""
        token_id = token_ids[self._done % len(token_ids)]
        self._done += 1
        last = self._done == self._num_tokens
        reason = FinishReason.LENGTH if last else None
        self._generation._deliver(TokenOutput(self._id, [token_id], reason))
        return last


def info_of(engine: Path) -> EngineInfo:
    manifest = read_engine(engine).manifest
    return EngineInfo(
        name=manifest.name,
        model=manifest.model.name,
        quantization="none",
        backend="double",
        tp_size=1,
        pp_size=1,
        max_seq_len=8192,
        max_batch_size=4096,
        max_num_tokens=8192,
        vocab_size=1 << 20,
        kv_block_size=32,
        num_kv_blocks=1,
        kv_cache_bytes=1,
        eos_token_ids=tuple(manifest.model.eos_token_ids),
        digest=cast(str, manifest.digest),
        created=0,
    )


def create_app() -> Flask:
    engine = Path(os.environ["ENGINEHOUSE_ENGINE"])
    period_s = float(os.environ["BENCH_PERIOD_S"])
    double: Any = AtOnce(info_of(engine), [0], period_s)
    made = app.create_app(client=double)
    tokenizer = made.extensions["enginehouse"].chat.tokenizer
    double._token_ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    return made
