"""In-flight batching: a scheduler and a model runner, in a loop.

One iteration reads: schedule, run, settle. What is sampled comes back from the runner's logits
once an iteration. Knows no text, no socket, no tensor, and not what computes and chooses: that is
the runner's.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Generic, TypeVar

from msgspec.structs import replace

from enginehouse.runtime.batching.drafts import Speculation
from enginehouse.runtime.batching.engine_info import engine_info
from enginehouse.runtime.batching.kv_cache import LONG_ROOT_HASH, ROOT_HASH
from enginehouse.runtime.batching.model_runner import Logits, ModelRunner
from enginehouse.runtime.batching.pooling import PooledPrompt
from enginehouse.runtime.batching.prefill_budget import PrefillBudget
from enginehouse.runtime.batching.sampling_state import Sampled, SamplingState
from enginehouse.runtime.batching.scheduler import Scheduler
from enginehouse.runtime.batching.sequence import Chunk, ScoredRow, Sequence, pooled_rows
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError, EnginehouseError, RequestError
from enginehouse.runtime.executor import ExecutorOptions, check_request, unexpected
from enginehouse.runtime.grammar.compiler import DEFAULT_TIMEOUT_S, Grammar, GrammarCompiler
from enginehouse.runtime.grammar.constraint import refusal
from enginehouse.runtime.request import (
    MOST_CELLS,
    ExecutorStats,
    FinishReason,
    Refusal,
    Request,
    TokenLogprobs,
    TokenOutput,
    joined,
    log_fields,
)

log = logging.getLogger("enginehouse.batching")

_ROWS_AT_ONCE = 64  # of hidden states, from the runner to a sum

Runner = TypeVar("Runner", bound=ModelRunner)


class InflightExecutor(Generic[Runner]):
    """Satisfies `executor.Executor` for an engine that a `ModelRunner` has loaded.

    prefill: how prompts are bounded while others are answered; None: by max_num_tokens alone.
    speculation: how tokens are drafted, where the runner takes drafts.
    """

    def __init__(
        self,
        engine: Engine,
        runner: Runner,
        options: ExecutorOptions,
        prefill: PrefillBudget | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.engine = engine
        self.runner = runner
        self.on_planned: Callable[[], None] = lambda: None
        self.scheduler = Scheduler(
            runner.memory,
            **runner.capacity._asdict(),
            deterministic=options.deterministic,
            prefill=prefill,
            speculation=speculation,
        )
        self.info = engine_info(engine, self.scheduler, runner)
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
        self._scores: dict[Sequence, list[TokenLogprobs]] = {}  # of prompts, not told yet
        self._num_iterations = 0
        self._iterations_s = 0.0
        self._num_in_iterations = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_cached_tokens = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    def submit(self, request: Request) -> None:
        vocab_size, limit = self.engine.config.vocab_size, self.info.max_seq_len
        prompt, sampling = request.prompt_ids, request.sampling
        check_request(
            request,
            longest=limit - 1,
            max_seq_len=limit,
            vocab_size=vocab_size,
            embedding_size=self.info.embedding_size,
        )
        if request.request_id in self._sequences:
            raise RequestError(f"request_id {request.request_id} is already running")
        state = SamplingState(sampling, prompt, self.info.eos_token_ids)
        sequence = Sequence(request, state, list(prompt))
        if self._is_long(sequence):
            sequence.root_hash = LONG_ROOT_HASH
        if sampling.pooling is not None:
            sequence.pooled = PooledPrompt(sampling.pooling, len(prompt))
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

    def waits(self, request_id: int) -> bool:
        sequence = self._sequences.get(request_id)
        return sequence is not None and sequence.num_cached_tokens is None  # never admitted yet

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    def poll(self, timeout_s: float = 0.0) -> list[TokenOutput]:
        """One iteration: every scheduled chunk is computed, every complete sequence sampled.

        Together; one by one when deterministic, as a product of more rows rounds differently.
        Sequences whose grammar is being compiled join when it is there; timeout_s is waited for
        one when nothing else is to be done.
        """
        outputs = self._start_compiled()
        chunks = self.scheduler.schedule()
        if not chunks:
            if self._compiling and not outputs and timeout_s:
                wait([g for _, g in self._compiling.values()], timeout_s, FIRST_COMPLETED)
            return outputs
        self.on_planned()
        began_s = time.perf_counter()
        for group in [[chunk] for chunk in chunks] if self.deterministic else [chunks]:
            outputs += self._compute(group)
        seconds = time.perf_counter() - began_s
        self._num_iterations += 1
        self._iterations_s += seconds
        self._num_in_iterations += len(chunks)
        if self.scheduler.prefill is not None:
            num_decodes = sum(chunk.num_rows for chunk in chunks if chunk.num_tokens == 1)
            num_tokens = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
            self.scheduler.prefill.learn(seconds, num_decodes, num_tokens)
        return outputs

    def _start_compiled(self) -> list[TokenOutput]:
        """Schedule the sequences whose grammar is there; tell of those whose grammar failed."""
        failed = []
        for request_id, (sequence, grammar) in list(self._compiling.items()):
            if not grammar.done():
                continue
            del self._compiling[request_id]
            # With xgrammar, and torch: a compiled grammar has brought them.
            from enginehouse.runtime.grammar.matcher import GrammarMatcher

            state = sequence.sampling
            try:
                state.matcher = GrammarMatcher(grammar.result(), state.stop_ids)
            except EnginehouseError as error:
                failed.append(self._fail(sequence.request, error))
            except Exception as error:  # of xgrammar, which raises what it likes
                failed.append(self._abandon(sequence, error))
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

    def _abandon(self, sequence: Sequence, error: Exception) -> TokenOutput:
        """End a sequence that nobody thought would fail; the others go on."""
        request = sequence.request
        name = request.label or request.request_id
        fields = log_fields(request)
        log.error("request %s failed; the others go on", name, exc_info=error, extra=fields)
        self.cancel(request.request_id)
        self._scores.pop(sequence, None)
        return self._fail(request, unexpected(error))

    def stats(self) -> ExecutorStats:
        scheduler = self.scheduler
        return ExecutorStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(self._compiling),
            num_kv_blocks=scheduler.memory.num_blocks,
            num_free_kv_blocks=scheduler.memory.num_free,
            num_remembered_kv_blocks=scheduler.memory.num_remembered,
            num_iterations=self._num_iterations,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            iterations_s=self._iterations_s,
            num_in_iterations=self._num_in_iterations,
            kv_blocks=scheduler.memory.states(MOST_CELLS),
            preempted=scheduler.preempted(),
        )

    def close(self) -> None:
        for request_id in list(self._sequences):
            self.cancel(request_id)
        self.grammars.close()
        self.runner.close()

    def _compute(self, chunks: list[Chunk]) -> list[TokenOutput]:
        """Compute chunks, and choose behind each that completes its sequence: what is to be told.

        Behind a drafted token too, once it is what was chosen: by then its sequence's state is that
        of an iteration without drafts, and so is all that follows.
        """
        logits = self.runner.compute(chunks, self._score)
        self._pool(chunks)
        complete = [chunk for chunk in chunks if chunk.chooses]
        ends = itertools.accumulate((1 + len(chunk.draft) for chunk in complete), initial=0)
        rows = {chunk.sequence: row for chunk, row in zip(complete, ends, strict=False)}
        chosen = _choose(logits, rows)
        settled = {c.sequence: self._settle(c, chosen.get(c.sequence)) for c in chunks}
        outputs = {sequence: output for sequence, output in settled.items() if output is not None}
        drafted = [chunk for chunk in complete if chunk.draft]
        failed = self._check_drafts(logits, drafted, rows, outputs)
        return [*outputs.values(), *failed]

    def _check_drafts(
        self,
        logits: Logits,
        drafted: list[Chunk],
        rows: dict[Sequence, int],
        outputs: dict[Sequence, TokenOutput],
    ) -> list[TokenOutput]:
        """Add to the outputs what is chosen behind drafts; of those that fail there, the ends."""
        failed, count = [], 1
        self._num_draft_tokens += sum(len(chunk.draft) for chunk in drafted)
        while right := [chunk for chunk in drafted if _is_right(chunk, count)]:
            self._num_accepted_tokens += len(right)
            chosen = _choose(logits, {c.sequence: rows[c.sequence] + count for c in right})
            for sequence, start, _, _ in right:
                more = self._settle(Chunk(sequence, start + count, 1), chosen[sequence])
                assert more is not None, "a token was chosen"
                if more.error is None:
                    outputs[sequence] = joined(outputs[sequence], more)
                else:
                    failed.append(more)
            count += 1
        return failed

    def _score(self, rows: Several[ScoredRow], logits: Logits) -> None:
        for row, found in zip(rows, logits.score(rows), strict=True):
            if found is None:
                continue
            row.sequence.num_scored += 1
            row.sequence.spoiled |= math.isnan(found.logprob)
            self._scores.setdefault(row.sequence, []).append(found)

    def _pool(self, chunks: list[Chunk]) -> None:
        for sequence, rows in pooled_rows(chunks):
            assert sequence.pooled is not None, "it has rows that are wanted"
            for done in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[done : done + _ROWS_AT_ONCE]
                sequence.pooled.add(self.runner.hidden_states(some))
            sequence.spoiled |= not sequence.pooled.finite

    def _settle(self, chunk: Chunk, sampled: Sampled | None) -> TokenOutput | None:
        """Book one chunk's result; what its submitter is told, if anything."""
        try:
            output = self._book(chunk, sampled)
        except Exception as error:  # whatever it is, it is one sequence's
            return self._abandon(chunk.sequence, error)
        scores = self._scores.pop(chunk.sequence, None)
        if scores is None or (output is not None and output.error is not None):
            return output
        if output is None:
            output = TokenOutput(chunk.sequence.request.request_id)
        return replace(output, prompt_logprobs=scores)

    def _book(self, chunk: Chunk, sampled: Sampled | None) -> TokenOutput | None:
        sequence = chunk.sequence
        request, state = sequence.request, sequence.sampling
        if state.error is not None:
            raise state.error
        self._num_prompt_tokens += max(
            0, min(chunk.num_tokens, len(request.prompt_ids) - chunk.start)
        )
        if sequence.spoiled:
            return self._give_up(sequence)
        if sampled is None:
            finish = self.scheduler.settle(chunk, None, stops=False)
            return None if finish is None else self._end_unanswered(sequence, finish)
        token = sampled.token_id
        stops = token in state.stop_ids
        if token >= 0 and not stops:
            state.accept(token)
        if token < 0 or (state.matcher is not None and state.matcher.failure):
            return self._give_up(sequence)
        finish = self.scheduler.settle(chunk, token, stops)
        cached = sequence.num_cached_tokens or 0
        is_first = sequence.num_generated + stops == 1  # the prompt is done
        if is_first:
            self._num_cached_tokens += cached
        if finish is not None:
            del self._sequences[request.request_id]
        elif self._is_long(sequence) and sequence.root_hash == ROOT_HASH:
            self.scheduler.restart(sequence, LONG_ROOT_HASH)
        if stops:
            return TokenOutput(
                request.request_id,
                [],
                finish,
                cached,
                stop_token_id=token,
                stop_logprobs=sampled.logprobs,
            )
        self._num_generated_tokens += 1
        logprobs = None if sampled.logprobs is None else [sampled.logprobs]
        queued_s = sequence.queued_s if is_first else None
        return TokenOutput(
            request.request_id, [token], finish, cached, logprobs=logprobs, queued_s=queued_s
        )

    def _end_unanswered(self, sequence: Sequence, finish: FinishReason) -> TokenOutput:
        """End a sequence of which nothing is generated: it was scored, or pooled."""
        cached = sequence.num_cached_tokens or 0
        self._num_cached_tokens += cached
        request_id = sequence.request.request_id
        del self._sequences[request_id]
        output = TokenOutput(request_id, [], finish, cached, queued_s=sequence.queued_s)
        if sequence.pooled is None:
            return output
        embedding = sequence.pooled.vector().tobytes()
        return replace(output, finish_reason=FinishReason.STOP, embedding=embedding)

    def _is_long(self, sequence: Sequence) -> bool:
        """Whether longrope turns the sequence's keys by its long factors."""
        pretrained = self.runner.pretrained
        return pretrained is not None and len(sequence.token_ids) > pretrained

    def _give_up(self, sequence: Sequence) -> TokenOutput:
        """End a sequence for which no token can be chosen."""
        matcher, constraint = sequence.sampling.matcher, sequence.request.sampling.constraint
        what = "logits" if sequence.pooled is None else "hidden states"
        error: EnginehouseError = EngineError(f"the model's {what} are not finite")
        if matcher is not None and constraint is not None and matcher.failure:
            error = refusal(constraint, matcher.failure)
        else:
            sequence.spoiled = True
        self.cancel(sequence.request.request_id)
        return self._fail(sequence.request, error)


def _choose(logits: Logits, rows: dict[Sequence, int]) -> dict[Sequence, Sampled]:
    """Of each sequence the next token, behind this row."""
    if not rows:
        return {}
    found = logits.sample(list(rows.values()), [sequence.sampling for sequence in rows])
    return dict(zip(rows, found, strict=True))


def _is_right(chunk: Chunk, count: int) -> bool:
    """Whether the first `count` tokens of its draft are those that were chosen, of a sequence that
    has what was computed, and is not at its end.
    """
    sequence, start, _, draft = chunk
    held = sequence.num_computed == start + count
    return held and count <= len(draft) and sequence.token_ids[-1] == draft[count - 1]
