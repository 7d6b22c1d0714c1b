"""The engine behind the double's LLM: the CPU backend's executor in a thread of its own."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from enginehouse.runtime import errors as ours_errors
from enginehouse.runtime import request as ours
from enginehouse.runtime.torch.decoder import causal_attention
from enginehouse.runtime.torch.executor import TorchExecutor
from tensorrt_llm.llmapi import SamplingParams
from tensorrt_llm.result import Logprob, RequestOutput, Response

_GUIDES = {
    "json": ours.ConstraintKind.JSON_SCHEMA,
    "regex": ours.ConstraintKind.REGEX,
    "grammar": ours.ConstraintKind.EBNF,
    "structural_tag": ours.ConstraintKind.STRUCTURAL_TAG,
}


@dataclass
class _Running:
    result: RequestOutput
    params: SamplingParams
    streaming: bool
    tokens: list[int] = field(default_factory=list)  # not told yet
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


def our_params(params: SamplingParams, prompt_len: int, salted: bool) -> ours.SamplingParams:
    """What the CPU backend is asked for; what it cannot do as asked is refused here.

    salted: it shares no prefix with others, as sequences with a seed do not.
    """
    if params.presence_penalty or params.frequency_penalty:
        assert params.prompt_ignore_length == prompt_len, "the CPU backend ignores the prompt"
    bias: tuple[tuple[int, float], ...] = ()
    if params.embedding_bias is not None:
        bias = tuple(
            (int(i), float(params.embedding_bias[i])) for i in params.embedding_bias.nonzero()
        )
    constraint = None
    if params.guided_decoding is not None:
        ((name, value),) = params.guided_decoding.given.items()
        constraint = (
            ours.Constraint(ours.ConstraintKind.JSON_OBJECT, "")
            if name == "json_object"
            else ours.Constraint(_GUIDES[name], value)
        )
    temperature = 1.0 if params.temperature is None else params.temperature
    if params.greedy:
        temperature = 0.0
    return ours.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=temperature,
        top_p=1.0 if params.top_p is None else params.top_p,
        top_k=params.top_k or 0,
        min_p=params.min_p or 0.0,
        presence_penalty=params.presence_penalty or 0.0,
        frequency_penalty=params.frequency_penalty or 0.0,
        repetition_penalty=params.repetition_penalty or 1.0,
        seed=None if params.greedy and not salted else params.seed or 0,  # the C++ default
        stop_token_ids=tuple(params.stop_token_ids or ())
        + (() if params.ignore_eos else (params.end_id,)),
        ignore_eos=constraint is None or params.ignore_eos,  # else only what was asked for ends it
        min_tokens=params.min_tokens or 0,
        logit_bias=bias,
        num_logprobs=params.logprobs,
        constraint=constraint,
    )


class EngineThread:
    """Steps the executor while it is busy, and hands every iteration to its RequestOutput."""

    def __init__(self, executor: TorchExecutor, max_stats: int, show_end_id: bool) -> None:
        self.executor = executor
        self.stats: deque[str] = deque(maxlen=max_stats)
        self.failure: str | None = None
        self._show_end_id = show_end_id
        self._commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._thread = threading.Thread(target=self._run, name="trtllm-double", daemon=True)
        self._thread.start()

    def submit(self, result: RequestOutput, streaming: bool, salt: str | None) -> None:
        self._commands.put(("submit", (result, streaming, salt)))

    def abort(self, request_id: int) -> None:
        self._commands.put(("abort", request_id))

    def stop(self) -> None:
        self._commands.put(("stop", None))
        self._thread.join()
        self.executor.close()

    def _run(self) -> None:
        while True:
            try:
                while True:
                    command, value = self._commands.get(block=not self.executor.busy)
                    if command == "stop":
                        return
                    getattr(self, f"_{command}")(value)
            except queue.Empty:
                pass
            for output in self.executor.poll():
                self._give(output)
            self._note_stats()

    def _submit(self, value: tuple[RequestOutput, bool, str | None]) -> None:
        result, streaming, salt = value
        params = result.sampling_params
        self._running[result.request_id] = _Running(result, params, streaming)
        sampling = our_params(params, len(result.prompt_token_ids), salt is not None)
        try:
            self.executor.submit(ours.Request(result.request_id, result.prompt_token_ids, sampling))
        except ours_errors.RequestError as error:
            del self._running[result.request_id]
            result.put(Response([], [], error=error.message))

    def _abort(self, request_id: int) -> None:
        running = self._running.pop(request_id, None)
        if running is None:
            return
        if running.streaming and running.params.logprobs:
            self.failure = "abort + streaming + logprobs: the worker crashed (issue 10810)"
        self.executor.cancel(request_id)
        running.result.put(Response([], [], "cancelled"))

    def _give(self, output: ours.TokenOutput) -> None:
        running = self._running[output.request_id]
        logprobs = [
            {token: Logprob(value) for token, value in (*entry.top, (chosen, entry.logprob))}
            for chosen, entry in zip(output.token_ids, output.logprobs or (), strict=False)
        ]
        tokens, finish, stop_reason = list(output.token_ids), None, None
        if output.finish_reason is not None:
            finish = output.finish_reason.value
        ends = output.stop_token_id == running.params.end_id and not running.params.ignore_eos
        if finish == "stop" and ends:  # END_ID, which has no stop_reason
            tokens += [running.params.end_id] if self._show_end_id else []
        elif finish == "stop":
            stop_reason = output.stop_token_id
        if finish is not None:
            del self._running[output.request_id]
        error = output.error or (output.refusal.message if output.refusal else None)
        if running.params.return_context_logits and running.result.context_logits is None:
            prompt = running.result.prompt_token_ids
            running.result.context_logits = self._context_logits(prompt, output.num_cached_tokens)
        running.tokens += tokens
        running.logprobs += logprobs
        if running.streaming or finish is not None:
            found = Response(running.tokens, running.logprobs, finish, stop_reason, error)
            running.tokens, running.logprobs = [], []
            running.result.put(found)

    def _context_logits(self, prompt: list[int], num_cached: int) -> torch.Tensor:
        """Of the whole prompt, computed once more by itself. Padded to more columns than there are
        tokens; what a cached prefix left out is garbage (1.2.1 warns of it, and goes on).
        """
        model = self.executor.runner.model
        with torch.inference_mode():
            ids = torch.tensor(prompt)
            hidden = model.hidden_states(ids, torch.arange(len(ids)), causal_attention)
            logits = model.logits(hidden)
            logits[:num_cached] = float("nan")
            return torch.nn.functional.pad(logits, (0, 3))

    def _note_stats(self) -> None:
        found = self.executor.stats()
        self.stats.append(
            json.dumps(
                {
                    "iter": found.num_iterations,
                    "numActiveRequests": found.num_running,
                    "numQueuedRequests": found.num_waiting,
                    "gpuMemUsage": 0,
                    "kvCacheStats": {
                        "maxNumBlocks": found.num_kv_blocks,
                        "freeNumBlocks": found.num_free_kv_blocks,
                        "usedNumBlocks": found.num_kv_blocks - found.num_free_kv_blocks,
                        "reusedBlocks": found.num_cached_tokens // self.executor.info.kv_block_size,
                    },
                    "inflightBatchingStats": {
                        "numGenRequests": found.num_running,
                        "numPausedRequests": 0,
                    },
                }
            )
        )


def wants(name: str) -> bool:
    return os.environ.get(f"DOUBLE_{name}") == "1"
