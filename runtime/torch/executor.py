"""The torch backend: a paged KV cache and a torch decoder behind the in-flight batching loop.

Runs on a CPU or on one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from enginehouse.runtime.batching.block_memory import BlockMemory
from enginehouse.runtime.batching.inflight_executor import InflightExecutor
from enginehouse.runtime.batching.kv_cache import BlockPool
from enginehouse.runtime.batching.kv_room import capacity_of, count_blocks
from enginehouse.runtime.batching.logprobs import TorchLogits
from enginehouse.runtime.batching.model_runner import Score
from enginehouse.runtime.batching.prefill_budget import PrefillBudget
from enginehouse.runtime.batching.sequence import Chunk, chosen_rows, scored_rows
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, no_prefill_ms
from enginehouse.runtime.logprobs import ROWS_AT_ONCE
from enginehouse.runtime.machine.device import (
    choose_device,
    choose_dtype,
    free_memory,
    index_tensor,
)
from enginehouse.runtime.torch.attention import PagedKVCache
from enginehouse.runtime.torch.decoder import Decoder
from enginehouse.runtime.torch.linear_attention import StateCache
from enginehouse.runtime.torch.step_plan import plan_attention


class TorchRunner:
    """Satisfies `batching.model_runner.ModelRunner`: every rank's weights merged, on one device."""

    def __init__(self, engine: Engine, options: ExecutorOptions) -> None:
        limits = engine.manifest.limits
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        self.device = choose_device(options.device)
        dtype = choose_dtype(options.compute_dtype or limits.compute_dtype, self.device)
        self.capacity = capacity_of(engine, options)
        self.embedding_size = engine.config.hidden_size
        max_seq_len = self.capacity.max_seq_len
        block_size = limits.kv_block_size
        weights = CheckpointWeights(engine.path, engine.config)
        self.model = Decoder(engine.config, weights, dtype, max_seq_len, self.device)
        block_bytes = block_size * PagedKVCache.bytes_per_token(engine.config, dtype)
        slots = self.capacity.max_batch_size if engine.config.delta is not None else 0
        state_bytes = StateCache.bytes_of(engine.config, slots, dtype)
        free = free_memory(self.device)
        num_blocks = count_blocks(
            engine, options, self.capacity, block_bytes, self.device.type, free, state_bytes
        )
        self.states = StateCache(engine.config, slots, dtype, self.device)
        self.kv_cache_bytes = num_blocks * block_bytes + state_bytes
        scales = weights.kv_scales()
        self.cache = PagedKVCache(engine.config, num_blocks, block_size, dtype, scales, self.device)
        shares = not options.deterministic
        self.memory = BlockMemory(BlockPool(num_blocks), block_size, shares, slots)

    @property
    def pretrained(self) -> int | None:
        return self.model.rotary.pretrained

    @torch.inference_mode()
    def compute(self, chunks: list[Chunk], score: Score) -> TorchLogits:
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [p for c in chunks for p in range(c.start, c.start + c.num_tokens)]
        contexts = [len(c.sequence.token_ids) for c in chunks for _ in range(c.num_tokens)]
        attention = plan_attention(self.cache, self.states, chunks, self.model.traits.windows)
        hidden = self._hidden = self.model.hidden_states(
            index_tensor(token_ids, self.device),
            index_tensor(positions, self.device),
            attention,
            index_tensor(contexts, self.device),
        )
        scored = list(scored_rows(chunks))
        for done in range(0, len(scored), ROWS_AT_ONCE):
            some = scored[done : done + ROWS_AT_ONCE]
            index = index_tensor([row for row, _ in some], self.device)
            score([told for _, told in some], TorchLogits(self.model.logits(hidden[index])))
        rows = list(chosen_rows(chunks))
        if not rows:
            return TorchLogits(torch.empty(0, self.model.config.vocab_size, device=self.device))
        return TorchLogits(self.model.logits(hidden[index_tensor(rows, self.device)]))

    @torch.inference_mode()
    def hidden_states(self, rows: Sequence[int]) -> np.ndarray:
        states = self.model.normed(self._hidden[index_tensor(rows, self.device)])
        found: np.ndarray = states.float().cpu().numpy()
        return found

    def close(self) -> None:
        self.cache.layers.clear()
        self.states.layers.clear()
        self.model.layers.clear()


class TorchExecutor(InflightExecutor[TorchRunner]):
    """In-flight batching for engines built with `--backend torch`."""

    def __init__(self, engine: Engine, options: ExecutorOptions) -> None:
        runner = TorchRunner(engine, options)
        on_cpu = runner.device.type == "cpu"
        if options.prefill_ms is not None and not on_cpu:
            raise EngineError(no_prefill_ms("a CUDA device"))
        prefill = PrefillBudget(options.prefill_ms) if on_cpu else None
        super().__init__(engine, runner, options, prefill)
