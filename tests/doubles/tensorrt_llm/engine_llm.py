"""The LLM of compiled engines: its arguments, its rules for an engine, its methods."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import Engine, Limits, Manifest, ModelRecord
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.executor import TorchExecutor
from tensorrt_llm.build_command import gpu
from tensorrt_llm.contract import CLASSES, accepts
from tensorrt_llm.engine_thread import EngineThread, wants
from tensorrt_llm.llmapi import KvCacheConfig, SamplingParams
from tensorrt_llm.result import RequestOutput

_FIELDS = CLASSES["LLM(engine) ctor"]["fields"]
_RANK = (
    "import sys, time; print('[TRT-LLM] [RANK {rank}] [I] engine {what}', file=sys.stderr, "
    "flush=True); time.sleep(3600)"
)


class LLM:
    """Strict where 1.2.1 forgives: a limit above the engine's is refused, not clamped.

    calls: every (method, arguments) in order, of all of them. For tests in the same process.
    """

    calls: list[tuple[str, Any]] = []
    fields: dict[str, Any] = _FIELDS

    def __init__(self, model: str, **arguments: Any) -> None:
        type(self).calls.append(("LLM", {"model": model, **arguments}))
        if "PMI_RANK" in os.environ and "TLLM_SPAWN_PROXY_PROCESS" not in os.environ:
            raise RuntimeError("PMI: this process is a rank, and no other answers")  # 1.2.1 waits
        for name, value in arguments.items():
            if name not in self.fields:
                raise ValueError(f"LLM got invalid argument: {name}")
            if not accepts(self.fields[name]["type"], value) and name != "tokenizer":
                raise ValueError(f"LLM: {name}={value!r} is no {self.fields[name]['type']}")
        self.model, self.args = model, arguments
        self.kv_cache_config = arguments.get("kv_cache_config") or KvCacheConfig()
        tokenizer = Path(arguments.get("tokenizer") or model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (tokenizer / name).is_file():
                raise OSError(f"Can't load tokenizer for {tokenizer!s}: no {name}")
        self._workers: list[subprocess.Popen[bytes]] = []
        self._temporary = tempfile.TemporaryDirectory()
        self._caller: int | None = None
        self._num_requests = 0
        self._shut = False
        try:
            executor = self._open(Path(model))
        except BaseException:
            self._temporary.cleanup()
            self._end_workers()
            raise
        limit = arguments.get("iter_stats_max_iterations") or 1000
        self._engine = EngineThread(executor, limit, wants("SHOWS_END_ID"))

    def _open(self, path: Path) -> TorchExecutor:
        """Check the engine as its loading does, start the ranks, and open the CPU backend."""
        built = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not {"pretrained_config", "build_config"} <= built.keys():
            raise ValueError(f"{path} is no engine: config.json has no build_config")
        config, limits = built["pretrained_config"], built["build_config"]
        if built["version"] != version("tensorrt_llm"):
            raise RuntimeError(f"engine of version {built['version']}")
        mapping = config["mapping"]
        for kind in ("tensor", "pipeline"):
            asked = self.args.get(f"{kind}_parallel_size", 1)
            found = mapping["tp_size" if kind == "tensor" else "pp_size"]
            if asked not in (1, found):
                raise ValueError(f"{kind}_parallel_size {asked} is not the engine's {found}")
        for name in ("max_batch_size", "max_num_tokens"):
            if (self.args.get(name) or 0) > limits[name]:
                raise ValueError(f"{name} [{self.args[name]}] is greater than the engine's")
        if self.kv_cache_config.dtype != "auto":
            raise ValueError("KvCacheConfig.dtype must be auto for an engine")
        backend = self.args.get("guided_decoding_backend")
        if backend not in (None, "xgrammar"):
            raise ValueError(f"Unsupported guided decoding backend {backend}")
        paged = limits["plugin_config"]["use_paged_context_fmha"]
        if self.args.get("enable_chunked_prefill") and not paged:
            raise RuntimeError("chunked context needs paged context FMHA")
        if self.kv_cache_config.enable_block_reuse and not paged:
            raise RuntimeError("KV cache reuse needs paged context FMHA")
        self.max_seq_len, self.max_input_len = limits["max_seq_len"], limits["max_input_len"]
        self.vocab_size = config["vocab_size"]
        self.context_logits = limits["gather_context_logits"]
        self._start_ranks(mapping["world_size"])
        checkpoint = Path(self._temporary.name)
        self._link_tokenizer(checkpoint)
        for rank in range(mapping["world_size"]):
            self._check_rank(path / f"rank{rank}.engine")
            (checkpoint / f"rank{rank}.safetensors").symlink_to(path / f"rank{rank}.engine")
        return open_torch(
            checkpoint,
            ModelConfig.from_dict(config),
            max_seq_len=self.max_seq_len,
            max_batch_size=self.args.get("max_batch_size") or limits["max_batch_size"],
            max_num_tokens=self.args.get("max_num_tokens") or limits["max_num_tokens"],
            block_size=limits["plugin_config"]["tokens_per_block"],
            eos_token_ids=self.eos_token_ids,
        )

    def _link_tokenizer(self, checkpoint: Path) -> None:
        """For grammars; and the ids that end a text, as generation_config.json has them."""
        tokenizer = Path(self.args.get("tokenizer") or self.model)
        (checkpoint / "tokenizer.json").symlink_to(tokenizer / "tokenizer.json")
        generation = json.loads((tokenizer / "generation_config.json").read_text("utf-8"))
        found = generation["eos_token_id"]
        self.eos_token_ids = tuple(found if isinstance(found, list) else [found])

    def _check_rank(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        if header.get("tensorrt") != version("tensorrt") or header.get("sm") != str(gpu()[1]):
            raise RuntimeError("Serialization assertion: the engine is of another TensorRT or SM")

    def _start_ranks(self, world_size: int) -> None:
        """Processes in sessions of their own, as MPI's daemon starts them; where mpirun has started
        them already, as many as there are to be.
        """
        if "TLLM_SPAWN_PROXY_PROCESS" in os.environ:
            size = os.environ.get("OMPI_COMM_WORLD_SIZE", str(world_size))
            if size != str(world_size):
                raise RuntimeError(f"MPI has {size} tasks for {world_size} ranks")
            return
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if world_size > 1 and spec is not None and not spec.name.startswith("pytest"):
            raise RuntimeError("MPI's pool imports the main module again: no python -m")
        what = "hangs" if wants("START_HANGS") else "loaded"
        for rank in range(world_size):
            command = [sys.executable, "-S", "-c", _RANK.format(rank=rank, what=what)]
            self._workers.append(subprocess.Popen(command, start_new_session=True))
        while wants("START_HANGS"):
            time.sleep(0.01)

    def _end_workers(self) -> None:
        for worker in self._workers:
            if wants("LEAVES_WORKERS") or wants("START_HANGS"):
                worker.returncode = -1  # else Popen warns of a process that nobody waits for
            else:
                worker.kill()
                worker.wait()

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: None = None,
        prompt_adapter_request: None = None,
        streaming: bool = False,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        self._check_thread()
        params = sampling_params or SamplingParams()
        more = {"streaming": streaming, "cache_salt": cache_salt}
        type(self).calls.append(("generate_async", {"inputs": inputs, **params.given, **more}))
        self._check_request(inputs, params)
        self._num_requests += 1
        result = RequestOutput(self._num_requests, list(inputs), params, self._abort)
        self._engine.submit(result, streaming, cache_salt)
        return result

    def _check_request(self, prompt: list[int], params: SamplingParams) -> None:
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise TypeError("The inputs must be type str or list of int")
        if params.end_id is None:
            raise ValueError("end_id: this double's tokenizer names no end-of-sequence token")
        if len(prompt) > self.max_input_len:
            raise ValueError(f"prompt length {len(prompt)} exceeds max_input_len")
        if len(prompt) + params.max_tokens > self.max_seq_len:
            raise ValueError(
                f"The sum of prompt length ({len(prompt)}) and max_tokens "
                f"({params.max_tokens}) should not exceed max_seq_len ({self.max_seq_len})"
            )
        if params.logprobs and not self.args.get("gather_generation_logits"):
            raise ValueError("logprobs requires gather_generation_logits=True")
        if params.prompt_logprobs:
            raise ValueError("prompt_logprobs requires a BuildConfig that no engine is given")
        if params.return_context_logits and not self.context_logits:
            raise RuntimeError("Return context logit need an engine with gather_context_logits")
        if params.guided_decoding and not self.args.get("guided_decoding_backend"):
            raise RuntimeError("Assertion failed: guided decoding is not configured (issue 2624)")
        bias = params.embedding_bias
        if bias is not None:
            right = bias.dtype == torch.float32 and tuple(bias.shape) == (self.vocab_size,)
            assert right, "embedding_bias must be float32 [vocab_size]"

    def _abort(self, request_id: int) -> None:
        self._check_thread()
        type(self).calls.append(("abort", request_id))
        self._engine.abort(request_id)

    def _check_thread(self) -> None:
        """The sockets to the ranks belong to the thread that used them first."""
        if self._engine.failure:
            raise RuntimeError(self._engine.failure)
        if self._shut:
            raise RuntimeError("LLM is shutting down")
        self._caller = self._caller or threading.get_ident()
        assert self._caller == threading.get_ident(), "requests from two threads"

    def get_stats(self, timeout: float | None = 2) -> list[str]:
        found = list(self._engine.stats)
        self._engine.stats.clear()
        return found

    async def get_stats_async(self, timeout: float | None = 2) -> AsyncIterator[str]:
        """What there is, and what comes until nothing has come for timeout seconds."""
        self._check_thread()
        deadline = time.monotonic() + (timeout or 0)
        while time.monotonic() < deadline:
            while self._engine.stats:
                yield self._engine.stats.popleft()
                deadline = time.monotonic() + (timeout or 0)
            await asyncio.sleep(0.01)

    def shutdown(self) -> None:
        if self._shut:
            return
        self._shut = True
        self._engine.stop()
        self._temporary.cleanup()
        self._end_workers()


def open_torch(
    path: Path,
    config: ModelConfig,
    *,
    max_seq_len: int,
    max_batch_size: int,
    max_num_tokens: int,
    block_size: int,
    eos_token_ids: tuple[int, ...],
) -> TorchExecutor:
    """The CPU backend over a checkpoint folder without a manifest."""
    limits = Limits(max_seq_len, max_batch_size, max_num_tokens, block_size)
    manifest = Manifest(
        format=1,
        name="double",
        created="2026-01-01T00:00:00+00:00",
        backend="torch",
        model=ModelRecord("double", eos_token_ids),
        limits=limits,
        source={},
        choices={},
        versions={},
        files={},
        digest="",
    )
    options = ExecutorOptions(compute_dtype="float32", kv_cache_gib=0.03)
    return TorchExecutor(Engine(path, config, manifest), options)
