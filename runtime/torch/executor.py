"""The torch backend: a paged KV cache and a torch decoder behind the in-flight batching loop.

Runs on a CPU or on one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from enginehouse.runtime.batching.block_memory import BlockMemory
from enginehouse.runtime.batching.inflight_executor import InflightExecutor
from enginehouse.runtime.batching.kv_cache import BlockPool
from enginehouse.runtime.batching.model_runner import Capacity, Score
from enginehouse.runtime.batching.sequence import Chunk, ScoredRow
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, limit_within
from enginehouse.runtime.logprobs import ROWS_AT_ONCE
from enginehouse.runtime.machine.device import (
    choose_device,
    choose_dtype,
    free_memory,
    index_tensor,
)
from enginehouse.runtime.torch.attention import PagedKVCache
from enginehouse.runtime.torch.decoder import PREFIX, Decoder
from enginehouse.runtime.torch.step_plan import plan_attention

# Of the memory that is free once the weights are loaded. A GPU's is nobody else's; what is left of
# it holds a step's activations, and its copies of the keys and values of one layer.
_KV_SHARE = {"cpu": 0.25, "cuda": 0.6}
# A CPU's memory is everyone's: no more than so many sequences of the full context take there, or as
# much as the weights' files, if that is more.
_FULL_SEQUENCES = 4


class TorchRunner:
    """Satisfies `batching.model_runner.ModelRunner`: every rank's weights merged, on one device."""

    def __init__(self, engine: Engine, options: ExecutorOptions) -> None:
        limits = engine.manifest.limits
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        self.device = choose_device(options.device)
        dtype = choose_dtype(options.compute_dtype or limits.compute_dtype, self.device)
        max_seq_len = limit_within("max_seq_len", options.max_seq_len, limits.max_seq_len)
        max_batch_size = options.max_batch_size or limits.max_batch_size
        max_num_tokens = options.max_num_tokens or limits.max_num_tokens
        self.capacity = Capacity(max_seq_len, max_batch_size, max(max_num_tokens, max_batch_size))
        block_size = limits.kv_block_size
        weights = CheckpointWeights(engine.path, engine.config)
        self.model = Decoder(engine.config, weights, dtype, max_seq_len, self.device)
        block_bytes = block_size * PagedKVCache.bytes_per_token(engine.config, dtype)
        num_blocks = _num_blocks(
            self.capacity,
            block_size,
            block_bytes,
            kv_cache_gib=options.kv_cache_gib or limits.kv_cache_gib,
            weight_bytes=_weight_bytes(engine),
            device=self.device,
        )
        self.kv_cache_bytes = num_blocks * block_bytes
        scales = _kv_scales(engine.config, weights)
        self.cache = PagedKVCache(engine.config, num_blocks, block_size, dtype, scales, self.device)
        shares = not options.deterministic
        self.memory = BlockMemory(BlockPool(num_blocks), block_size, shares)

    @property
    def pretrained(self) -> int | None:
        return self.model.rotary.pretrained

    def compute(self, chunks: list[Chunk], score: Score) -> Tensor:
        token_ids = [
            token
            for sequence, start, count in chunks
            for token in sequence.token_ids[start : start + count]
        ]
        positions = [p for _, start, count in chunks for p in range(start, start + count)]
        contexts = [len(c.sequence.token_ids) for c in chunks for _ in range(c.num_tokens)]
        attention = plan_attention(self.cache, chunks, self.model.traits.windows)
        hidden = self.model.hidden_states(
            index_tensor(token_ids, self.device),
            index_tensor(positions, self.device),
            attention,
            index_tensor(contexts, self.device),
        )
        scored = list(_scored_rows(chunks))
        for done in range(0, len(scored), ROWS_AT_ONCE):
            some = scored[done : done + ROWS_AT_ONCE]
            index = index_tensor([row for row, _ in some], self.device)
            score([told for _, told in some], self.model.logits(hidden[index]))
        rows = [row for row, chunk in _last_rows(chunks) if chunk.completes]
        if not rows:
            return torch.empty(0, self.model.config.vocab_size, device=self.device)
        return self.model.logits(hidden[index_tensor(rows, self.device)])

    def close(self) -> None:
        self.cache.layers.clear()
        self.model.layers.clear()


class TorchExecutor(InflightExecutor[TorchRunner]):
    """In-flight batching for engines built with `--backend torch`."""

    def __init__(self, engine: Engine, options: ExecutorOptions) -> None:
        super().__init__(engine, TorchRunner(engine, options), options)


def _num_blocks(
    capacity: Capacity,
    block_size: int,
    block_bytes: int,
    *,
    kv_cache_gib: float | None,
    weight_bytes: int,
    device: torch.device,
) -> int:
    """KV blocks to hold: as asked, else what suits the model and the free memory, at most what the
    batch can ever use.
    """
    free = free_memory(device)
    needed = -(-capacity.max_seq_len // block_size)
    if kv_cache_gib is None:
        memory_bytes = int(free * _KV_SHARE[device.type])
        if device.type == "cpu":
            suited = max(_FULL_SEQUENCES * needed * block_bytes, weight_bytes)
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
            f"the {device.type}; ask for less, or leave it out"
        )
    return num_blocks


def _weight_bytes(engine: Engine) -> int:
    """Of every rank's file, as the engine keeps its weights."""
    files = engine.manifest.files
    return sum(record.bytes for name, record in files.items() if name.endswith(".safetensors"))


def _kv_scales(config: ModelConfig, weights: CheckpointWeights) -> list[float]:
    """The multiplier of each layer's keys and values, when the engine's KV cache is quantised."""
    if config.quantization.kv_cache_quant_algo is None:
        return []
    names = (
        PREFIX.format(layer) + "attention.kv_cache_scaling_factor"
        for layer in range(config.num_hidden_layers)
    )
    return [float(weights(name)[""]) for name in names]


def _last_rows(chunks: list[Chunk]) -> Iterator[tuple[int, Chunk]]:
    """Each chunk with the row of its last token in the step."""
    row = -1
    for chunk in chunks:
        row += chunk.num_tokens
        yield row, chunk


def _scored_rows(chunks: list[Chunk]) -> Iterator[tuple[int, ScoredRow]]:
    """The rows of a step that score a prompt's tokens, each with its place in the step."""
    first = 0
    for chunk in chunks:
        for position in chunk.scored:
            yield first + position - chunk.start, ScoredRow(chunk.sequence, position)
        first += chunk.num_tokens
