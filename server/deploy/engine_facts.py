"""What a cluster must know of an engine, from its manifest: GPUs, nodes, SM, memory.

What the manifest does not say is not guessed: an engine whose SM nobody recorded asks for any GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import msgspec

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import Manifest, is_hf_checkpoint, read_engine, read_manifest
from enginehouse.runtime.errors import EngineError
from enginehouse.server.launch.launcher import GPUS_PER_NODE, plan_launch, read_served
from enginehouse.server.nodes.tensorrt_ranks import ranks_per_node

GIB = 2**30
_FULL_SEQUENCES = 4  # whose keys and values a CPU's cache holds where the engine names no size
_CPU_BASE_BYTES = 3 * GIB  # interpreters, libraries, a step's activations
_GPU_BASE_BYTES = 8 * GIB  # of which CUDA and TensorRT-LLM take most


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine's needs.

    kind: the manifest's backend, or hf for a checkpoint of `--format hf`. num_gpus: of all nodes;
    0: it runs on CPUs. sms: any of these runs it; none: not recorded. gpu_bytes: what each GPU must
    hold beside the KV cache; None: not recorded. memory_bytes, peak_bytes: of a node, at least and
    at most; estimates. kv_cache_gib: what a CPU engine is told to keep, as a pod does not see its
    own limit; None on GPUs.
    """

    name: str
    digest: str
    kind: str
    num_gpus: int
    num_nodes: int
    sms: tuple[int, ...]
    gpu_bytes: int | None
    memory_bytes: int
    peak_bytes: int
    kv_cache_gib: float | None

    @property
    def gpus_per_node(self) -> int:
        return self.num_gpus // self.num_nodes


def read_facts(path: Path, *, nodes: int | None = None, tp_size: int | None = None) -> EngineFacts:
    """Of an engine directory, or of a checkpoint of `--format hf` over tp_size GPUs.

    nodes None: as few as hold its GPUs, eight each. Raises EngineError for what is neither, and for
    GPUs that cannot be laid on so many nodes.
    """
    manifest = read_manifest(path)
    is_hf = is_hf_checkpoint(manifest)
    if tp_size is not None and not is_hf:
        raise EngineError(f"{path} was cut when it was built; leave --tp-size out")
    served = read_served(path, {"ENGINEHOUSE_TP_SIZE": str(tp_size or 1)})
    kind, num_gpus = "hf" if is_hf else manifest.backend, served.num_ranks or served.num_plans
    config = None if is_hf else read_engine(path).config
    num_nodes = max(1, -(-num_gpus // GPUS_PER_NODE)) if nodes is None else nodes
    if served.num_plans:
        ranks_per_node(path, num_gpus, num_nodes)  # refuses
    else:
        launcher = "mpirun" if num_nodes > 1 else "spawn"
        plan_launch(served, {}, gunicorn=(), nodes=num_nodes, launcher=launcher)  # refuses
    weights = sum(file.bytes for file in manifest.files.values()) // num_nodes
    if not num_gpus:
        assert config is not None
        kv_cache_gib = _kv_cache_gib(manifest, config)
        memory = _CPU_BASE_BYTES + _cpu_weight_bytes(manifest) + _state_bytes(manifest, config)
        memory += int(kv_cache_gib * GIB)
        return EngineFacts(
            *(manifest.name, manifest.digest, kind, 0, 1, (), None),
            *(memory, memory + memory // 2, kv_cache_gib),
        )
    record = None if is_hf else manifest.build
    planned = None if record is None else record.memory
    return EngineFacts(
        *(manifest.name, manifest.digest, kind, num_gpus, num_nodes, _sms(manifest)),
        gpu_bytes=planned.weights + planned.activations + planned.runtime if planned else None,
        memory_bytes=_GPU_BASE_BYTES + weights,
        peak_bytes=2 * (_GPU_BASE_BYTES + weights),
        kv_cache_gib=None,
    )


def _sms(manifest: Manifest) -> tuple[int, ...]:
    """What the engine was compiled for; an engine of TensorRT-LLM runs on that SM alone."""
    if manifest.tensorrt is not None:
        try:
            targets = msgspec.convert(manifest.tensorrt.get("targets"), list[int])
        except msgspec.ValidationError as error:
            raise EngineError(
                f"{manifest.name}'s manifest does not say for which SMs its plans are: {error}; "
                "build it again"
            ) from None
        return tuple(sorted(targets))
    sm = (manifest.machine or {}).get("sm")
    return (int(sm),) if sm is not None and sm.isdecimal() else ()


def _cpu_weight_bytes(manifest: Manifest) -> int:
    """What a CPU engine keeps of its files: packed where it has been packed, else its ranks'."""
    files = manifest.files
    ranks = sum(file.bytes for name, file in files.items() if name.startswith("rank"))
    packed = sum(file.bytes for name, file in files.items() if name.startswith("packed"))
    return max(ranks, packed)


def _kv_cache_gib(manifest: Manifest, config: ModelConfig) -> float:
    """As built, else what the host would choose on a machine that is large enough, in quarters."""
    limits = manifest.limits
    if limits.kv_cache_gib is not None:
        return limits.kv_cache_gib
    width = 1 if config.quantization.kv_cache_quant_algo else 2
    if manifest.backend == "torch" and width == 2:
        width = 4  # float32, where the CPU has no fast bfloat16
    numbers = 0
    for layer in range(config.num_hidden_layers):
        own = config.of_layer(layer)
        if config.has_keys(layer):
            numbers += 2 * own.num_key_value_heads * own.head_size
    blocks = -(-limits.max_seq_len // limits.kv_block_size)
    sequence = blocks * limits.kv_block_size * numbers * width
    suited = max(_FULL_SEQUENCES * sequence, _cpu_weight_bytes(manifest))
    suited = max(sequence, min(suited, limits.max_batch_size * sequence))
    return ceil(4 * suited / GIB) / 4 or 0.25


def _state_bytes(manifest: Manifest, config: ModelConfig) -> int:
    """What linear attention keeps of all sequences of a batch."""
    if config.delta is None:
        return 0
    layers = sum(map(config.is_linear, range(config.num_hidden_layers)))
    return manifest.limits.max_batch_size * layers * config.delta.state_bytes(4)
