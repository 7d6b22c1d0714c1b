"""TensorRT-LLM's in-flight batching behind the Executor protocol.

A thread runs one asyncio loop, and every call into TensorRT-LLM after its start is made there, as
its results want to be awaited and its sockets belong to one thread; `poll` takes what the loop
has put into a queue. Knows no text. What is said to TensorRT-LLM stands in `deployment.py`
(at start) and `sampling.py` (for each request).
Source: TensorRT-LLM 1.2.1, `llmapi`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple

from msgspec.structs import replace

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.grammar.compiler import DEFAULT_TIMEOUT_S, Grammar, GrammarCompiler
from enginehouse.runtime.grammar.support import TENSORRT_LLM, doubt_beside_tensorrt_llm
from enginehouse.runtime.request import ExecutorStats, Request, SamplingParams, TokenOutput
from enginehouse.runtime.tensorrt_llm.deployment import Deployment
from enginehouse.runtime.tensorrt_llm.loading import load_llm
from enginehouse.runtime.tensorrt_llm.output import (
    bias_tensor,
    failed_output,
    prompt_logprobs,
    token_output,
)
from enginehouse.runtime.tensorrt_llm.sampling import check_for_trtllm, sampling_fields
from enginehouse.runtime.tensorrt_llm.waiting import Waiting, is_scored
from enginehouse.runtime.tensorrt_llm.workers import RankLog, WorkerGuard, start_deadline

log = logging.getLogger("enginehouse.trtllm")

_START_S = 1200.0
_PAUSE_S = 0.001  # the shortest wait of a poll: the host asks again at once
_STATS_S = 1.0
_ABORT_S = 10.0
_SHUTDOWN_S = 20.0
_AHEAD = 8  # sequences given beyond the batch, so that a place is filled in the next iteration


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request that TensorRT-LLM has. result: its RequestOutput, on the loop's thread only."""

    request: Request
    result: Any = None
    cancelled: bool = False
    has_begun: bool = False  # its first tokens have been seen


class _Ended(NamedTuple):
    """TensorRT-LLM has let go of a sequence."""

    sequence: _Sequence


class _Compiled(NamedTuple):
    """A request's constraint has been tried: the future holds its RequestError, if any."""

    request: Request
    grammar: Grammar


_Event = TokenOutput | _Ended | _Compiled


class TrtllmExecutor:
    """Satisfies `executor.Executor` for what `--backend tensorrt_llm` and `--format hf` make."""

    def __init__(self, deployment: Deployment, options: ExecutorOptions) -> None:
        self.deployment = deployment
        self._eos_token_ids = deployment.manifest.model.eos_token_ids
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._active: dict[int, Request | _Sequence] = {}  # a Request while it waits here
        self._waiting = Waiting()
        self.on_planned: Callable[[], None] = lambda: None  # TensorRT-LLM plans by itself
        self._given: set[_Sequence] = set()  # cancelled ones too, until TensorRT-LLM lets go
        self._counts = dict.fromkeys(("prompt", "generated", "paused"), 0)
        self._iterations: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._latest: dict[str, Any] = {}
        self._overfull_since_s: float | None = None
        self._next_look_s = 0.0
        self._grammars = GrammarCompiler(
            deployment.path,
            deployment.vocab_size,
            self._eos_token_ids,
            options.grammar_timeout_s or DEFAULT_TIMEOUT_S,
            TENSORRT_LLM,
        )
        if (doubt := doubt_beside_tensorrt_llm()) is not None:
            log.warning(doubt)
        self._ranks, self._guard = RankLog(), WorkerGuard()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trtllm", daemon=True)
        self._llm: Any = None
        try:
            with start_deadline(options.start_s or _START_S, self._ranks, self._guard):
                if deployment.deterministic:
                    os.environ["FORCE_DETERMINISTIC"] = "1"  # read here too, beside the ranks
                self._llm, self._make_params, self._make_guide = load_llm(deployment)
                self._thread.start()
                stats = self._wait(self._warm_up())
        except BaseException:
            self.close()
            raise
        self._guard.settle()
        self.info = deployment.info(int(stats.get("kvCacheStats", {}).get("maxNumBlocks", 0)))

    async def _warm_up(self) -> dict[str, Any]:
        """One token, so that a start-up that hangs at the first all-reduce hangs here; the stats.

        Its iterations are read so that they are no one's afterwards.
        """
        prompt = list(self._eos_token_ids[:1]) or [0]
        request = Request(0, prompt, SamplingParams(1, temperature=0.0, ignore_eos=True))
        result = self._generate(request)
        async for _ in result:
            pass
        latest: dict[str, Any] = {}
        async for stats in self._llm.get_stats_async(timeout=_STATS_S):
            latest = _as_dict(stats)
        self._loop.create_task(self._follow_stats())
        return latest

    def submit(self, request: Request) -> None:
        """A constraint is compiled here first, aside: one that takes minutes, or kills its
        compiler, would hold up every rank.
        """
        check_for_trtllm(
            request,
            max_seq_len=self.deployment.max_seq_len,
            max_input_len=self.deployment.max_input_len,
            vocab_size=self.deployment.vocab_size,
            num_eos=len(self._eos_token_ids),
            context_logits=self.deployment.context_logits,
        )
        if not self._given:
            self._overfull_since_s = None  # the last statistics are of another time
        if request.request_id in self._active:
            raise RequestError(f"request_id {request.request_id} is already running")
        constraint = request.sampling.constraint
        if constraint is None:
            self._active[request.request_id] = request
            self._queue(request)
            return
        grammar = self._grammars.compile(constraint)
        self._active[request.request_id] = request
        grammar.add_done_callback(lambda done: self._events.put(_Compiled(request, done)))

    def _queue(self, request: Request) -> None:
        self._waiting.push(request)
        self._fill()

    def _fill(self) -> None:
        """Give TensorRT-LLM the next sequences it has places for."""
        while len(self._given) < self.deployment.max_batch_size + _AHEAD:
            request = self._waiting.pop([sequence.request for sequence in self._given])
            if request is None:
                return
            if self._active.get(request.request_id) is request:  # else it was cancelled
                sequence = _Sequence(request)
                self._active[request.request_id] = sequence
                self._given.add(sequence)
                asyncio.run_coroutine_threadsafe(self._follow(sequence), self._loop)

    def cancel(self, request_id: int) -> None:
        """Stop a sequence. One with logprobs, also of its prompt, runs on unheard: aborting a
        stream with logprobs kills the rank that computes them (NVIDIA/TensorRT-LLM issue 10810).
        """
        sequence = self._active.pop(request_id, None)
        if isinstance(sequence, _Sequence):
            self._loop.call_soon_threadsafe(self._abort, sequence)

    def _abort(self, sequence: _Sequence) -> None:
        sequence.cancelled = True
        request = sequence.request
        silent = request.sampling.num_logprobs is None and not is_scored(request)
        if sequence.result is not None and silent:
            sequence.result.abort()

    @property
    def busy(self) -> bool:
        """Also while a cancelled sequence is not let go: somebody must see that it is."""
        return bool(self._active or self._given)

    def poll(self, timeout_s: float = 0.0) -> list[TokenOutput]:
        """What has come since the last poll; waits a moment even at 0, as the engine runs alone.

        Raises EngineError when a rank has died: every sequence is lost.
        """
        outputs: list[TokenOutput] = []
        timeout: float | None = max(timeout_s, _PAUSE_S)
        while True:
            try:
                event = self._events.get(timeout=timeout) if timeout else self._events.get_nowait()
            except queue.Empty:
                break
            timeout = None
            self._handle(event, outputs)
        self._read_iterations()
        self._look_after_ranks()
        return outputs

    def _handle(self, event: _Event, outputs: list[TokenOutput]) -> None:
        if isinstance(event, _Ended):
            self._given.discard(event.sequence)
            self._fill()
        elif isinstance(event, _Compiled):
            request_id = event.request.request_id
            if self._active.get(request_id) is not event.request:
                return
            error = event.grammar.exception()
            if error is None:
                self._queue(event.request)
            else:
                del self._active[request_id]
                outputs.append(failed_output(event.request, error))
        elif event.request_id in self._active:
            self._count(event)
            outputs.append(event)

    def _read_iterations(self) -> None:
        """TensorRT-LLM's statistics, of which the last come after the last sequence has ended."""
        while not self._iterations.empty():
            self._latest = latest = self._iterations.get_nowait()
            paused = latest.get("inflightBatchingStats", {}).get("numPausedRequests", 0)
            self._counts["paused"] += paused
            self._verify_aborts(latest.get("numActiveRequests", 0))

    def _count(self, output: TokenOutput) -> None:
        sequence = self._active[output.request_id]
        assert isinstance(sequence, _Sequence), "a request that waits has no output"
        if not sequence.has_begun and output.error is None:
            sequence.has_begun = True
            prompt_ids = sequence.request.prompt_ids
            self._counts["prompt"] += len(prompt_ids) - output.num_cached_tokens
        self._counts["generated"] += len(output.token_ids)
        if output.finish_reason is not None:
            del self._active[output.request_id]

    def _verify_aborts(self, num_active: int) -> None:
        """An abort is believed when the engine's active count falls to what it was given."""
        if num_active <= len(self._given):
            self._overfull_since_s = None
        elif self._overfull_since_s is None:
            self._overfull_since_s = time.monotonic()
        elif time.monotonic() - self._overfull_since_s > _ABORT_S:
            self._overfull_since_s = None
            log.error(
                "TensorRT-LLM runs %d sequences and was given %d: an abort had no effect",
                num_active,
                len(self._given),
            )

    def _look_after_ranks(self) -> None:
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + _STATS_S
        if dead := self._guard.dead():
            raise EngineError(
                f"TensorRT-LLM's process {dead[0]} died; {self._ranks.report()}; "
                "the engine must be opened again"
            )

    def waits(self, request_id: int) -> bool:
        """Until its first token: TensorRT-LLM does not tell when a prompt is begun."""
        return request_id in self._active

    def stats(self) -> ExecutorStats:
        """Counts are this class's; blocks, iterations and pauses are TensorRT-LLM's own."""
        self._read_iterations()
        cache = self._latest.get("kvCacheStats", {})
        num_blocks = int(cache.get("maxNumBlocks", self.info.num_kv_blocks))
        running = len(self._given)
        if running:  # its last statistics may be from before the last sequence ended
            running = min(running, int(self._latest.get("numActiveRequests", running)))
        return ExecutorStats(
            num_running=running,
            num_waiting=len(self._given) - running + self._num_held(),
            num_kv_blocks=num_blocks,
            num_free_kv_blocks=int(cache.get("freeNumBlocks", num_blocks)),
            num_iterations=int(self._latest.get("iter", 0)),
            num_prompt_tokens=self._counts["prompt"],
            num_generated_tokens=self._counts["generated"],
            num_cached_tokens=int(cache.get("reusedBlocks", 0)) * self.info.kv_block_size,
            num_preemptions=self._counts["paused"],
        )

    def _num_held(self) -> int:
        """Requests that TensorRT-LLM has not been given yet."""
        return sum(isinstance(entry, Request) for entry in self._active.values())

    def close(self) -> None:
        """Shut TensorRT-LLM down, and end every process of it that is still there afterwards."""
        if self._loop.is_closed():
            return
        self._active.clear()
        self._waiting.clear()
        self._grammars.close()
        if self._thread.is_alive():
            self._wait(_cancel_tasks(), _SHUTDOWN_S)
        if self._llm is not None:
            ending = threading.Thread(target=self._llm.shutdown, name="shutdown", daemon=True)
            ending.start()
            ending.join(_SHUTDOWN_S)
            if ending.is_alive():
                log.error("TensorRT-LLM did not shut down in %.0f s; it is killed", _SHUTDOWN_S)
            self._llm = None
        self._guard.close()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_SHUTDOWN_S)
        if not self._loop.is_running() and not self._loop.is_closed():
            self._loop.close()
        self._ranks.close()

    def _wait(self, work: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def _generate(self, request: Request) -> Any:
        fields = sampling_fields(
            request,
            max_seq_len=self.deployment.max_seq_len,
            eos_token_ids=self._eos_token_ids,
        )
        if "embedding_bias" in fields:
            fields["embedding_bias"] = bias_tensor(
                fields["embedding_bias"], self.deployment.vocab_size
            )
        if "guided_decoding" in fields:
            fields["guided_decoding"] = self._make_guide(**fields["guided_decoding"])
        params, prompt = self._make_params(**fields), request.prompt_ids
        if not is_scored(request):
            return self._llm.generate_async(prompt, sampling_params=params, streaming=True)
        # Each response of a stream would bring all of the prompt's logits again. A cached prefix
        # has none: what is salted finds nobody's, and nobody finds it.
        salt = secrets.token_hex(16)
        return self._llm.generate_async(prompt, sampling_params=params, cache_salt=salt)

    async def _follow(self, sequence: _Sequence) -> None:
        """One sequence from its submission to its end; whatever fails ends this sequence only."""
        request = sequence.request
        try:
            if not sequence.cancelled:
                sequence.result = self._generate(request)
                async for result in sequence.result:
                    if not sequence.cancelled:
                        self._events.put(await self._read(sequence, result))
        except Exception as error:  # TensorRT-LLM raises what it likes
            self._events.put(failed_output(request, error))
        finally:
            self._events.put(_Ended(sequence))

    async def _read(self, sequence: _Sequence, result: Any) -> TokenOutput:
        """One response; where it cannot be read the sequence is stopped, as nobody will hear it."""
        try:
            output = token_output(sequence.request, result, self._eos_token_ids)
            if is_scored(sequence.request):
                output = await asyncio.to_thread(self._with_scores, sequence, output)
            return output
        except Exception as error:  # of whatever TensorRT-LLM has put there
            log.exception("a response cannot be read; the other sequences go on")
            self._abort(sequence)
            return failed_output(sequence.request, error)

    def _with_scores(self, sequence: _Sequence, output: TokenOutput) -> TokenOutput:
        """Takes long for a long prompt, and so runs beside the loop."""
        scores = prompt_logprobs(sequence.request, sequence.result, self.deployment.vocab_size)
        return replace(output, prompt_logprobs=scores)

    async def _follow_stats(self) -> None:
        while True:
            try:
                async for stats in self._llm.get_stats_async(timeout=_STATS_S):
                    self._iterations.put(_as_dict(stats))
            except asyncio.CancelledError:
                raise
            except Exception as error:  # metrics must not end the engine
                log.error("TensorRT-LLM gives no statistics: %s", error)
                return
            await asyncio.sleep(_STATS_S)


async def _cancel_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _as_dict(stats: Any) -> dict[str, Any]:
    """One iteration's statistics, which come as a dictionary or as its JSON."""
    found: dict[str, Any] = json.loads(stats) if isinstance(stats, str | bytes) else stats
    return found
