"""What an engine takes at once, and how many KV blocks it gets: as asked, else what suits the model
and the free memory.

Knows bytes and counts; no tensor, and not what is kept in a block.
"""

from __future__ import annotations

from enginehouse.runtime.batching.model_runner import Capacity
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, limit_within

# Of the memory that is free once the weights are loaded. A GPU's is nobody else's; what is left of
# it holds a step's activations, and its copies of the keys and values of one layer.
_KV_SHARE = {"cpu": 0.25, "cuda": 0.6}
# A CPU's memory is everyone's: no more than so many sequences of the full context take there, or as
# much as the weights' files, if that is more.
_FULL_SEQUENCES = 4


def capacity_of(engine: Engine, options: ExecutorOptions) -> Capacity:
    """As asked, else as built; EngineError for a longer context than the engine was built for."""
    limits = engine.manifest.limits
    max_batch_size = options.max_batch_size or limits.max_batch_size
    return Capacity(
        limit_within("max_seq_len", options.max_seq_len, limits.max_seq_len),
        max_batch_size,
        max(options.max_num_tokens or limits.max_num_tokens, max_batch_size),
    )


def count_blocks(
    engine: Engine,
    options: ExecutorOptions,
    capacity: Capacity,
    block_bytes: int,
    device: str,
    free: int,
    state_bytes: int = 0,
) -> int:
    """KV blocks to hold: as asked, else what suits the model and the free memory, at most what the
    batch can ever use.

    device: cpu or cuda. free: its bytes that can still be taken, once the weights are loaded.
    state_bytes: of these, what linear attention keeps of all sequences of the batch.
    """
    if state_bytes > free:
        raise EngineError(
            f"linear attention keeps {state_bytes / 2**30:.2f} GiB of max_batch_size="
            f"{capacity.max_batch_size} sequences, and {free / 2**30:.2f} GiB are free on the "
            f"{device}: lower max_batch_size"
        )
    free -= state_bytes
    limits = engine.manifest.limits
    block_size, kv_cache_gib = limits.kv_block_size, options.kv_cache_gib or limits.kv_cache_gib
    needed = -(-capacity.max_seq_len // block_size)
    if kv_cache_gib is None:
        memory_bytes = int(free * _KV_SHARE[device])
        if device == "cpu":
            suited = max(_FULL_SEQUENCES * needed * block_bytes, _weight_bytes(engine))
            memory_bytes = min(memory_bytes, suited)
        num_blocks = min(memory_bytes // block_bytes, needed * capacity.max_batch_size)
    else:
        num_blocks = int(kv_cache_gib * 2**30) // block_bytes
    if num_blocks < needed:
        raise EngineError(
            f"the KV cache holds {num_blocks * block_size} tokens; one sequence of "
            f"max_seq_len={capacity.max_seq_len} needs {needed * block_bytes / 2**30:.2f} GiB: "
            "raise kv_cache_gib or lower max_seq_len"
        )
    if num_blocks * block_bytes > free:
        raise EngineError(
            f"kv_cache_gib={kv_cache_gib:g} was asked for and {free / 2**30:.2f} GiB are free on "
            f"the {device}; ask for less, or leave it out"
        )
    return num_blocks


def _weight_bytes(engine: Engine) -> int:
    """Of every rank's file, as the engine keeps its weights."""
    files = engine.manifest.files
    return sum(record.bytes for name, record in files.items() if name.startswith("rank"))
