"""In-flight batching: scheduler, paged KV cache, torch decoder and sampling, in a loop.

One iteration reads: schedule, run, settle. Runs on a CPU or on one GPU, from which what is sampled
comes back once an iteration. Knows no text and no socket.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from datetime import datetime

import torch

from enginehouse.runtime.attention import PagedKVCache
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.constraint import refusal
from enginehouse.runtime.device import (
    choose_device,
    choose_dtype,
    free_memory,
    index_tensor,
)
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError, EnginehouseError, RequestError
from enginehouse.runtime.executor import ExecutorOptions, check_request
from enginehouse.runtime.grammar_compiler import DEFAULT_TIMEOUT_S, Grammar, GrammarCompiler
from enginehouse.runtime.grammar_matcher import GrammarMatcher
from enginehouse.runtime.kv_cache import LONG_ROOT_HASH, ROOT_HASH, BlockPool
from enginehouse.runtime.logprobs import Sampled, sample_with_logprobs
from enginehouse.runtime.model import PREFIX, Decoder
from enginehouse.runtime.request import (
    EngineInfo,
    ExecutorStats,
    FinishReason,
    Refusal,
    Request,
    TokenOutput,
)
from enginehouse.runtime.sampling import SamplingState
from enginehouse.runtime.scheduler import Chunk, Scheduler, Sequence
from enginehouse.runtime.step_plan import plan_attention
from enginehouse.runtime.weights import CheckpointWeights

# Of the memory that is free once the weights are loaded. A GPU's is nobody else's; what is left of
# it holds a step's activations, and its copies of the keys and values of one layer.
_KV_SHARE = {"cpu": 0.25, "cuda": 0.6}


class TorchExecutor:
    """Satisfies `executor.Executor` for engines built with `--backend torch`."""

    def __init__(self, engine: Engine, options: ExecutorOptions) -> None:
        limits = engine.manifest.limits
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        self.engine = engine
        self.device = choose_device(options.device)
        dtype = choose_dtype(options.compute_dtype or limits.compute_dtype, self.device)
        max_seq_len = min(options.max_seq_len or limits.max_seq_len, limits.max_seq_len)
        max_batch_size = options.max_batch_size or limits.max_batch_size
        max_num_tokens = options.max_num_tokens or limits.max_num_tokens
        block_size = limits.kv_block_size
        weights = CheckpointWeights(engine.path, engine.config)
        self.model = Decoder(engine.config, weights, dtype, max_seq_len, self.device)
        num_blocks = _num_blocks(
            engine.config,
            dtype,
            block_size=block_size,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            kv_cache_gib=options.kv_cache_gib or limits.kv_cache_gib,
            device=self.device,
        )
        scales = _kv_scales(engine.config, weights)
        self.cache = PagedKVCache(engine.config, num_blocks, block_size, dtype, scales, self.device)
        self.scheduler = Scheduler(
            BlockPool(num_blocks),
            block_size=block_size,
            max_batch_size=max_batch_size,
            max_num_tokens=max(max_num_tokens, max_batch_size),
            max_seq_len=max_seq_len,
            deterministic=options.deterministic,
        )
        self.info = _describe(engine, self.scheduler)
        self.deterministic = options.deterministic
        self.grammars = GrammarCompiler(
            engine.path,
            engine.config.vocab_size,
            self.info.eos_token_ids,
            options.grammar_timeout_s or DEFAULT_TIMEOUT_S,
        )
        if options.grammars_at_once:
            self.grammars.start()
        self._sequences: dict[int, Sequence] = {}
        self._compiling: dict[int, tuple[Sequence, Grammar]] = {}
        self._num_iterations = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_cached_tokens = 0

    def submit(self, request: Request) -> None:
        vocab_size, limit = self.engine.config.vocab_size, self.info.max_seq_len
        prompt, sampling = request.prompt_ids, request.sampling
        check_request(request, longest=limit - 1, max_seq_len=limit, vocab_size=vocab_size)
        if request.request_id in self._sequences:
            raise RequestError(f"request_id {request.request_id} is already running")
        state = SamplingState(
            sampling, prompt, vocab_size, self.info.eos_token_ids, device=self.device
        )
        sequence = Sequence(request, state, list(prompt))
        if self._is_long(sequence):
            sequence.root_hash = LONG_ROOT_HASH
        if sampling.constraint is None:
            self.scheduler.add(sequence)
        else:
            grammar = self.grammars.compile(sampling.constraint)
            self._compiling[request.request_id] = (sequence, grammar)
        self._sequences[request.request_id] = sequence

    def cancel(self, request_id: int) -> None:
        sequence = self._sequences.pop(request_id, None)
        compiling = self._compiling.pop(request_id, None)
        if compiling is not None:
            if all(grammar is not compiling[1] for _, grammar in self._compiling.values()):
                self.grammars.forget(compiling[1])
        elif sequence is not None:
            self.scheduler.remove(sequence)

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    def poll(self, timeout_s: float = 0.0) -> list[TokenOutput]:
        """One iteration: every scheduled chunk is computed, every complete sequence sampled.

        Sequences whose grammar is being compiled join when it is there; timeout_s is waited for
        one when nothing else is to be done.
        """
        outputs = self._start_compiled()
        chunks = self.scheduler.schedule()
        if not chunks:
            if self._compiling and not outputs and timeout_s:
                wait([g for _, g in self._compiling.values()], timeout_s, FIRST_COMPLETED)
            return outputs
        results = self._run(chunks)
        self._num_iterations += 1
        for chunk, sampled in zip(chunks, results, strict=True):
            output = self._settle(chunk, sampled)
            if output is not None:
                outputs.append(output)
        return outputs

    def _start_compiled(self) -> list[TokenOutput]:
        """Schedule the sequences whose grammar is there; tell of those whose grammar failed."""
        failed = []
        for request_id, (sequence, grammar) in list(self._compiling.items()):
            if not grammar.done():
                continue
            del self._compiling[request_id]
            state = sequence.sampling
            try:
                state.matcher = GrammarMatcher(grammar.result(), state.stop_ids)
            except EnginehouseError as error:
                failed.append(self._fail(sequence.request, error))
            else:
                self.scheduler.add(sequence)
        return failed

    def _fail(self, request: Request, error: EnginehouseError) -> TokenOutput:
        """End a sequence that is not, or no longer, scheduled."""
        self._sequences.pop(request.request_id, None)
        refusal = None
        if isinstance(error, RequestError):
            constraint = request.sampling.constraint
            param = constraint.param if constraint is not None else error.param
            refusal = Refusal(error.message, param, error.code)
        return TokenOutput(
            request.request_id,
            finish_reason=FinishReason.ERROR,
            error=str(error),
            refusal=refusal,
        )

    def stats(self) -> ExecutorStats:
        scheduler = self.scheduler
        return ExecutorStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(self._compiling),
            num_kv_blocks=scheduler.pool.num_blocks,
            num_free_kv_blocks=scheduler.pool.num_free,
            num_iterations=self._num_iterations,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_preemptions=scheduler.num_preemptions,
        )

    def close(self) -> None:
        for request_id in list(self._sequences):
            self.cancel(request_id)
        self.grammars.close()
        self.cache.layers.clear()
        self.model.layers.clear()

    def _run(self, chunks: list[Chunk]) -> list[Sampled | None]:
        """Compute the chunks; what was sampled for each that completes its sequence.

        Together; one by one when deterministic, as a product of more rows rounds differently.
        """
        if self.deterministic:
            return [self._compute([chunk])[0] for chunk in chunks]
        return self._compute(chunks)

    @torch.inference_mode()
    def _compute(self, chunks: list[Chunk]) -> list[Sampled | None]:
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
        complete = [(row, c) for row, c in _last_rows(chunks) if c.completes]
        sampled: dict[int, Sampled] = {}
        if complete:
            rows = index_tensor([row for row, _ in complete], self.device)
            logits = self.model.logits(hidden[rows])
            states = [chunk.sequence.sampling for _, chunk in complete]
            found = sample_with_logprobs(logits, states)
            for (_, chunk), choice in zip(complete, found, strict=True):
                sampled[id(chunk.sequence)] = choice
        return [sampled.get(id(chunk.sequence)) for chunk in chunks]

    def _settle(self, chunk: Chunk, sampled: Sampled | None) -> TokenOutput | None:
        """Book one chunk's result; what its submitter is told, if anything."""
        sequence = chunk.sequence
        request, state = sequence.request, sequence.sampling
        self._num_prompt_tokens += max(
            0, min(chunk.num_tokens, len(request.prompt_ids) - chunk.start)
        )
        if sampled is None:
            self.scheduler.settle(chunk, None, stops=False)
            return None
        token = sampled.token_id
        stops = token in state.stop_ids
        if token >= 0 and not stops:
            state.accept(token)
        if token < 0 or (state.matcher is not None and state.matcher.failure):
            return self._give_up(sequence)
        finish = self.scheduler.settle(chunk, token, stops)
        cached = sequence.num_cached_tokens or 0
        if sequence.num_generated + stops == 1:  # the first token: the prompt is done
            self._num_cached_tokens += cached
        if finish is not None:
            del self._sequences[request.request_id]
        elif self._is_long(sequence) and sequence.root_hash == ROOT_HASH:
            self.scheduler.restart(sequence, LONG_ROOT_HASH)
        if stops:
            return TokenOutput(request.request_id, [], finish, cached, stop_token_id=token)
        self._num_generated_tokens += 1
        logprobs = None if sampled.logprobs is None else [sampled.logprobs]
        return TokenOutput(request.request_id, [token], finish, cached, logprobs=logprobs)

    def _is_long(self, sequence: Sequence) -> bool:
        """Whether longrope turns the sequence's keys by its long factors."""
        pretrained = self.model.rotary.pretrained
        return pretrained is not None and len(sequence.token_ids) > pretrained

    def _give_up(self, sequence: Sequence) -> TokenOutput:
        """End a sequence for which no token can be chosen."""
        matcher, constraint = sequence.sampling.matcher, sequence.request.sampling.constraint
        error: EnginehouseError = EngineError("the model's logits are not finite")
        if matcher is not None and constraint is not None and matcher.failure:
            error = refusal(constraint, matcher.failure)
        self.cancel(sequence.request.request_id)
        return self._fail(sequence.request, error)


def _num_blocks(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    block_size: int,
    max_seq_len: int,
    max_batch_size: int,
    kv_cache_gib: float | None,
    device: torch.device,
) -> int:
    """KV blocks to hold: as asked, else a share of free memory, at most what can ever be used."""
    block_bytes = block_size * PagedKVCache.bytes_per_token(config, dtype)
    needed = -(-max_seq_len // block_size)
    if kv_cache_gib is None:
        free = int(free_memory(device) * _KV_SHARE[device.type])
        num_blocks = min(free // block_bytes, needed * max_batch_size)
    else:
        num_blocks = int(kv_cache_gib * 2**30) // block_bytes
    if num_blocks < needed:
        raise EngineError(
            f"the KV cache holds {num_blocks * block_size} tokens; one sequence of "
            f"max_seq_len={max_seq_len} needs {needed * block_bytes / 2**30:.2f} GiB: "
            "raise kv_cache_gib or lower max_seq_len"
        )
    return num_blocks


def _kv_scales(config: ModelConfig, weights: CheckpointWeights) -> list[float]:
    """The multiplier of each layer's keys and values, when the engine's KV cache is quantised."""
    if config.quantization.kv_cache_quant_algo is None:
        return []
    names = (
        PREFIX.format(layer) + "attention.kv_cache_scaling_factor"
        for layer in range(config.num_hidden_layers)
    )
    return [float(weights(name)[""]) for name in names]


def _describe(engine: Engine, scheduler: Scheduler) -> EngineInfo:
    config, manifest = engine.config, engine.manifest
    return EngineInfo(
        name=manifest.name,
        model=manifest.model.name,
        quantization=config.quantization.quant_algo or config.dtype,
        backend=manifest.backend,
        tp_size=config.mapping.tp_size,
        pp_size=config.mapping.pp_size,
        max_seq_len=scheduler.max_seq_len,
        max_batch_size=scheduler.max_batch_size,
        max_num_tokens=scheduler.max_num_tokens,
        vocab_size=config.vocab_size,
        kv_block_size=scheduler.block_size,
        num_kv_blocks=scheduler.pool.num_blocks,
        eos_token_ids=manifest.model.eos_token_ids,
        digest=manifest.digest,
        created=int(datetime.fromisoformat(manifest.created).timestamp()),
    )


def _last_rows(chunks: list[Chunk]) -> Iterator[tuple[int, Chunk]]:
    """Each chunk with the row of its last token in the step."""
    row = -1
    for chunk in chunks:
        row += chunk.num_tokens
        yield row, chunk
