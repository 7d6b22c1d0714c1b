"""The compiled backend: our C++ kernels behind the in-flight batching loop.

What a sequence is answered depends on that sequence alone: the kernels sum in one order whatever
runs beside it, however its prompt is cut, and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

import numpy as np

from enginehouse.runtime.batching.block_memory import BlockMemory
from enginehouse.runtime.batching.drafts import speculation_of
from enginehouse.runtime.batching.inflight_executor import InflightExecutor
from enginehouse.runtime.batching.kv_cache import BlockPool
from enginehouse.runtime.batching.kv_room import capacity_of, count_blocks
from enginehouse.runtime.batching.model_runner import Logits, Score
from enginehouse.runtime.batching.prefill_budget import PrefillBudget
from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.batching.sequence import (
    Chunk,
    ScoredRow,
    Sequence,
    chosen_rows,
    scored_rows,
)
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.cpu.compiler import compiled_library
from enginehouse.runtime.cpu.instructions import choose_instructions
from enginehouse.runtime.cpu.kernel_sizes import LANES
from enginehouse.runtime.cpu.packed_model import load_model, native_shape, open_packed
from enginehouse.runtime.cpu.sampler import NativeLogits
from enginehouse.runtime.cpu.support import cpu_refusal
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.machine.cpu import default_threads, free_memory
from enginehouse.runtime.request import Request, SamplingParams

_SCORED_ROWS = 64  # of a prompt's logits, made and reduced: 32 MiB where 128 Ki tokens are known
_SHORT = 2  # longrope's second rotary table
_KEPT_BYTES = {None: 2, "FP8": 1, "INT8": 1}  # of one number of a key or value


class CpuRunner:
    """Satisfies `batching.model_runner.ModelRunner`: every rank's weights merged and packed.

    instructions: of `instructions.INSTRUCTIONS`; None for the best of this CPU.
    """

    def __init__(
        self, engine: Engine, options: ExecutorOptions, instructions: str | None = None
    ) -> None:
        config, limits = engine.config, engine.manifest.limits
        kv_algo = config.quantization.kv_cache_quant_algo
        block_size = limits.kv_block_size
        asked = options.compute_dtype or limits.compute_dtype
        refusal = cpu_refusal(config, block_size, asked)
        if refusal is not None:
            raise EngineError(refusal)
        if options.device not in ("auto", "cpu"):
            raise EngineError(f"device {options.device!r}; backend=cpu wants auto or cpu")
        library = compiled_library(instructions or choose_instructions())
        self.capacity = capacity_of(engine, options)
        packed = open_packed(engine, shared=options.shared_weights)
        block_bytes = block_size * _kept_numbers(config) * _KEPT_BYTES[kv_algo]
        slots = self.capacity.max_batch_size if config.delta is not None else 0
        state_bytes = slots * _state_bytes(config)
        num_blocks = count_blocks(
            engine, options, self.capacity, block_bytes, "cpu", free_memory(), state_bytes
        )
        self.kv_cache_bytes = num_blocks * block_bytes + state_bytes
        self.block_size = block_size
        self.memory = BlockMemory(BlockPool(num_blocks), block_size, num_slots=slots)
        self.pretrained = packed.network.pretrained
        self.embedding_size = packed.network.normed
        shape = native_shape(
            packed.network,
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=slots,
            max_tokens=self.capacity.max_num_tokens,
            threads=options.num_threads or default_threads(),
        )
        self.model = load_model(library, shape, packed, self.capacity.max_seq_len)

    def compute(self, chunks: list[Chunk], score: Score) -> NativeLogits:
        token_ids: list[int] = []
        for chunk in chunks:
            token_ids += chunk.token_ids
        self.model.step(
            token_ids,
            [chunk.num_rows for chunk in chunks],
            [chunk.start for chunk in chunks],
            [self._rope(chunk) for chunk in chunks],
            [chunk.sequence.slot for chunk in chunks],
            [self._blocks(chunk) for chunk in chunks],
        )
        scored = list(scored_rows(chunks))
        for done in range(0, len(scored), _SCORED_ROWS):
            some = scored[done : done + _SCORED_ROWS]
            self.model.logits([row for row, _ in some])
            score([told for _, told in some], NativeLogits(self.model))
        rows = list(chosen_rows(chunks))
        if rows:
            self.model.logits(rows)
        return NativeLogits(self.model)

    def hidden_states(self, rows: Several[int]) -> np.ndarray:
        return self.model.hidden_states(rows)

    def _rope(self, chunk: Chunk) -> int:
        """The chunk's global rotary table, which longrope settles by its sequence's length."""
        if self.pretrained is None or len(chunk.sequence.token_ids) > self.pretrained:
            return 0
        return _SHORT

    def _blocks(self, chunk: Chunk) -> list[int]:
        return chunk.sequence.blocks[: -(-(chunk.start + chunk.num_rows) // self.block_size)]

    def close(self) -> None:
        self.model.close()


def _kept_numbers(config: ModelConfig) -> int:
    """Of keys and values, those of one token in all layers that have some of their own."""
    layers = filter(config.has_keys, range(config.num_hidden_layers))
    sizes = ((own.num_key_value_heads, own.head_size) for own in map(config.of_layer, layers))
    return sum(2 * heads * (size + -size % LANES) for heads, size in sizes)


def _state_bytes(config: ModelConfig) -> int:
    """What layers of linear attention keep of one sequence, in float32."""
    return 0 if config.delta is None else len(config.delta.layers) * config.delta.state_bytes(4)


def text_logits(runner: CpuRunner, ids: list[int]) -> np.ndarray:
    """Logits after each token of a text, computed as a prompt is: float32 [tokens, vocab_size].

    The runner must have room for it, which it has again afterwards.
    """
    sampling = SamplingParams(1, temperature=0.0, num_prompt_logprobs=0)
    state = SamplingState(sampling, ids)
    sequence = Sequence(Request(0, ids, sampling), state, list(ids))
    admitted = runner.memory.admit(sequence, others=False)
    assert admitted == 0, "no room, or a shared prefix, which has no logits"
    found: list[np.ndarray] = []

    def keep(rows: Several[ScoredRow], logits: Logits) -> None:
        found.append(runner.model.values.copy())

    for start in range(0, len(ids), runner.capacity.max_num_tokens):
        count = min(runner.capacity.max_num_tokens, len(ids) - start)
        runner.compute([Chunk(sequence, start, count)], keep)
        sequence.num_scored = start + count
    found.append(runner.model.values.copy())  # behind the last token, which scores no other
    runner.memory.release(sequence)
    return np.concatenate(found)


class CpuExecutor(InflightExecutor[CpuRunner]):
    """In-flight batching for engines built with `--backend cpu`.

    Deterministic whether that is asked for or not, and so in one step. What compiles grammars costs
    time and memory that are the engine's here, and is started by the first constraint.
    """

    def __init__(
        self, engine: Engine, options: ExecutorOptions, instructions: str | None = None
    ) -> None:
        runner = CpuRunner(engine, options, instructions)
        options = options._replace(deterministic=False, grammars_at_once=False)
        prefill = PrefillBudget(options.prefill_ms)
        speculation = speculation_of(options)
        if engine.config.delta is not None:  # a state cannot go back behind a wrong guess
            if options.speculative == "ngram":
                raise EngineError(
                    "speculative=ngram is of no use with linear attention, whose states do not go "
                    "back behind a guess that was wrong; leave it out"
                )
            speculation = None
        super().__init__(engine, runner, options, prefill, speculation)
