"""What TensorRT-LLM is given to open: a compiled engine, or a quantised Hugging Face checkpoint.

Reads the directory, checks it against the installed TensorRT-LLM and this machine, and says the
arguments of `LLM`. Imports no TensorRT-LLM.
Source: TensorRT-LLM 1.2.1, `_tensorrt_engine.LLM`, `KvCacheConfig`, `SchedulerConfig`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import (
    Manifest,
    check_end_tokens,
    is_hf_checkpoint,
    read_engine,
    read_manifest,
    verify_digests,
)
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, limit_within
from enginehouse.runtime.machine.binding import (
    check_machine,
    has_engines,
    installed_version,
    record_machine,
)
from enginehouse.runtime.request import EngineInfo

# Of what is free once the engine is loaded. The default of 0.9 leaves nothing for peaks.
_FREE_GPU_MEMORY_FRACTION = 0.85
_STATS_ITERATIONS = 1000  # how many iterations' statistics are kept until they are read
_KV_BYTES = {None: 2, "FP8": 1, "INT8": 1}


@dataclass(frozen=True, slots=True)
class Deployment:
    """A directory that can be opened here, and the limits it is opened with.

    compiled: an engine for `_tensorrt_engine.LLM`; else a checkpoint for `tensorrt_llm.LLM`,
    whose backend is PyTorch. Limits are the engine's or smaller.
    """

    path: Path
    manifest: Manifest
    compiled: bool
    quantization: str
    vocab_size: int
    tp_size: int
    pp_size: int
    max_seq_len: int
    max_input_len: int
    max_batch_size: int
    max_num_tokens: int
    kv_block_size: int
    paged_context: bool  # paged context FMHA: what block reuse and chunked prefill need
    kv_bytes_per_token: int  # on each GPU
    context_logits: bool  # whether logits of a prompt can be had
    deterministic: bool = False
    kv_cache_gib: float | None = None  # of each GPU; None: what is free there

    @property
    def kv_cache_tokens(self) -> int | None:
        """How many tokens' keys and values kv_cache_gib holds."""
        if self.kv_cache_gib is None:
            return None
        return int(self.kv_cache_gib * 2**30) // self.kv_bytes_per_token

    def info(self, num_kv_blocks: int) -> EngineInfo:
        manifest = self.manifest
        return EngineInfo(
            name=manifest.name,
            model=manifest.model.name,
            quantization=self.quantization,
            backend="tensorrt_llm",
            tp_size=self.tp_size,
            pp_size=self.pp_size,
            max_seq_len=self.max_seq_len,
            max_batch_size=self.max_batch_size,
            max_num_tokens=self.max_num_tokens,
            vocab_size=self.vocab_size,
            kv_block_size=self.kv_block_size,
            num_kv_blocks=num_kv_blocks,
            kv_cache_bytes=num_kv_blocks * self.kv_block_size * self.kv_bytes_per_token,
            eos_token_ids=manifest.model.eos_token_ids,
            digest=manifest.digest,
            created=int(datetime.fromisoformat(manifest.created).timestamp()),
            scores_prompts=self.context_logits,
        )


def open_deployment(directory: Path, options: ExecutorOptions) -> Deployment:
    """Read, verify and size a directory; nothing is loaded.

    Raises EngineError in one sentence: which artifact, version, machine or limit is wanted.
    """
    manifest = read_manifest(directory)
    compiled = not is_hf_checkpoint(manifest)
    check_version(directory, compiled)
    if compiled:
        engine = read_engine(directory)
        if manifest.machine is not None:
            check_machine(
                manifest.machine, record_machine(), rebuild_command(engine.path, manifest)
            )
        found = _of_engine(engine.path, engine.config, manifest, options)
    else:
        found = _of_checkpoint(directory, manifest, options)
    verify_digests(directory, manifest)
    return found


def check_version(directory: Path, compiled: bool) -> None:
    """EngineError when the installed TensorRT-LLM cannot open this kind of directory."""
    version = installed_version("tensorrt_llm")
    wanted = "1.2.1" if compiled else "1.2.1 or later"
    if version is None:
        raise EngineError(
            f"{directory} needs TensorRT-LLM {wanted}, which is not installed here; install "
            "enginehouse[trtllm] on Python 3.10 or 3.12, or build with --backend torch"
        )
    if compiled and not has_engines(version):
        raise EngineError(
            f"{directory} is a compiled engine and TensorRT-LLM {version} loads none any more; "
            "install tensorrt-llm==1.2.1, or serve a checkpoint built with --format hf"
        )
    if not compiled and int(version.partition(".")[0]) < 1:
        raise EngineError(
            f"{directory} is a Hugging Face checkpoint and TensorRT-LLM {version} runs engines "
            "only; install tensorrt-llm 1.2.1 or later"
        )


def rebuild_command(directory: Path, manifest: Manifest) -> str:
    """The command that makes this engine again: the manifest's own, or one from its choices."""
    if "rebuild" in manifest.source:
        return str(manifest.source["rebuild"])
    words = ["enginehouse-build", str(manifest.source.get("name", manifest.model.name))]
    words += ["--backend", "tensorrt_llm", "-o", str(directory)]
    for choice in ("quant", "tp", "pp"):
        if choice in manifest.choices:
            words += [f"--{choice}", str(manifest.choices[choice])]
    return shlex.join(words)


def _of_engine(
    directory: Path, config: ModelConfig, manifest: Manifest, options: ExecutorOptions
) -> Deployment:
    built = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("build_config")
    if built is None:
        raise EngineError(
            f"{directory} holds a checkpoint that was never compiled; compile it with "
            f"{rebuild_command(directory, manifest)}"
        )
    mapping = config.mapping
    if options.tp_size not in (None, mapping.tp_size):
        raise EngineError(
            f"{directory} was compiled for tp={mapping.tp_size} and tp={options.tp_size} was asked "
            "for; leave it out, or build the engine for it"
        )
    plugins = built.get("plugin_config", {})
    return Deployment(
        path=directory,
        manifest=manifest,
        compiled=True,
        quantization=config.quantization.quant_algo or config.dtype,
        vocab_size=config.vocab_size,
        tp_size=mapping.tp_size,
        pp_size=mapping.pp_size,
        max_seq_len=limit_within("max_seq_len", options.max_seq_len, built["max_seq_len"]),
        max_input_len=built["max_input_len"],
        max_batch_size=limit_within(
            "max_batch_size", options.max_batch_size, built["max_batch_size"]
        ),
        max_num_tokens=limit_within(
            "max_num_tokens", options.max_num_tokens, built["max_num_tokens"]
        ),
        kv_block_size=plugins.get("tokens_per_block", 32),
        paged_context=bool(plugins.get("use_paged_context_fmha", True)),
        context_logits=bool(built.get("gather_context_logits", False)),
        deterministic=options.deterministic,
        kv_cache_gib=options.kv_cache_gib or manifest.limits.kv_cache_gib,
        kv_bytes_per_token=_bytes_per_token(
            layers=-(-config.num_hidden_layers // mapping.pp_size),
            kv_heads=-(-config.num_key_value_heads // mapping.tp_size),
            head_size=config.head_size,
            kv_algo=config.quantization.kv_cache_quant_algo,
        ),
    )


def _of_checkpoint(directory: Path, manifest: Manifest, options: ExecutorOptions) -> Deployment:
    """The PyTorch backend cuts while it loads, so tp is chosen here; limits are the manifest's."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    check_end_tokens(directory, manifest, config["vocab_size"])
    limits = manifest.limits
    tp_size = options.tp_size or 1
    if config["num_attention_heads"] % tp_size:
        raise EngineError(
            f"num_attention_heads={config['num_attention_heads']} cannot be cut over tp={tp_size}; "
            "choose a divisor of it"
        )
    max_seq_len = limit_within("max_seq_len", options.max_seq_len, limits.max_seq_len)
    return Deployment(
        path=directory,
        manifest=manifest,
        compiled=False,
        quantization=str(manifest.choices.get("quant", "none")),
        vocab_size=config["vocab_size"],
        tp_size=tp_size,
        pp_size=1,
        max_seq_len=max_seq_len,
        max_input_len=max_seq_len,
        max_batch_size=options.max_batch_size or limits.max_batch_size,
        max_num_tokens=options.max_num_tokens or limits.max_num_tokens,
        kv_block_size=32,
        paged_context=True,
        context_logits=True,
        deterministic=options.deterministic,
        kv_cache_gib=options.kv_cache_gib or limits.kv_cache_gib,
        kv_bytes_per_token=_bytes_per_token(
            layers=config["num_hidden_layers"],
            kv_heads=-(-(config.get("num_key_value_heads") or 1) // tp_size),
            head_size=config.get("head_dim")
            or config["hidden_size"] // config["num_attention_heads"],
            kv_algo=None,
        ),
    )


def _bytes_per_token(*, layers: int, kv_heads: int, head_size: int, kv_algo: str | None) -> int:
    """What a token's keys and values take on each GPU."""
    return 2 * layers * kv_heads * head_size * _KV_BYTES.get(kv_algo, 1)


def llm_arguments(deployment: Deployment) -> dict[str, Any]:
    """The keyword arguments of `LLM`; kv_cache_config and scheduler_config are their classes'.

    gather_generation_logits is what logprobs are computed from, and only can be set here.
    """
    windows = deployment.manifest.limits.max_attention_window
    kv_cache: dict[str, Any] = {
        "enable_block_reuse": deployment.paged_context and not deployment.deterministic,
        "free_gpu_memory_fraction": _FREE_GPU_MEMORY_FRACTION,
    }
    if deployment.kv_cache_tokens is not None:
        kv_cache["max_tokens"] = deployment.kv_cache_tokens
    if windows is not None:
        kv_cache["max_attention_window"] = [
            min(window, deployment.max_seq_len) for window in windows
        ]
    arguments: dict[str, Any] = {
        "model": str(deployment.path),
        "tokenizer": str(deployment.path),
        "tensor_parallel_size": deployment.tp_size,
        "pipeline_parallel_size": deployment.pp_size,
        "kv_cache_config": kv_cache,
        "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        "enable_chunked_prefill": deployment.paged_context,
        "guided_decoding_backend": "xgrammar",
        "gather_generation_logits": True,
        "max_batch_size": deployment.max_batch_size,
        "max_num_tokens": deployment.max_num_tokens,
        "iter_stats_max_iterations": _STATS_ITERATIONS,
    }
    if deployment.deterministic:
        arguments["env_overrides"] = {"FORCE_DETERMINISTIC": "1"}  # reaches the ranks
    if not deployment.compiled:
        arguments["max_seq_len"] = deployment.max_seq_len
        arguments["enable_iter_performance_stats"] = True  # off by default there
    return arguments
