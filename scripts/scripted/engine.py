"""The scripted engine: it says what its script has for a prompt, token by token.

An answer ends at the request's max_tokens, and follows its grammar: that is compiled as an engine
compiles it, and takes each token and the end or refuses the answer. Knows no logits: temperature,
penalties and log probabilities have no effect.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from gevent import get_hub
from tiny_checkpoint import TEXT, write_tokenizer
from tokenizers import Tokenizer

from enginehouse.runtime.grammar.child import Compiled
from enginehouse.runtime.grammar.compiler import GrammarCompiler
from enginehouse.runtime.grammar.matcher import GrammarMatcher
from enginehouse.runtime.request import (
    Constraint,
    EngineInfo,
    ExecutorStats,
    FinishReason,
    SamplingParams,
    TokenOutput,
)
from scripted.answers import ENFORCED, PLAIN, TOLD, Script
from scripted.process import MODEL

_VOCAB, _END_ID = 1024, 2
_MAX_SEQ_LEN = 200_000  # an agent's prompt has tens of thousands of these small tokens
_COMPILE_S = 60


def write_text(engine_dir: Path) -> None:
    """What the server reads of an engine directory: a tokenizer, a template, the end's token."""
    known = "\n".join((TEXT, PLAIN, TOLD, *ENFORCED))  # what is said often has tokens of its own
    write_tokenizer(engine_dir, _VOCAB, _MAX_SEQ_LEN, known)
    (engine_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": _END_ID}))


class Playing:
    """The choices of one request, each a list of outputs that is there already."""

    begun = has_output = True
    preempted: frozenset[int] = frozenset()

    def __init__(self, choices: Sequence[Sequence[TokenOutput]]) -> None:
        self._left = deque(
            (index, output) for index, outputs in enumerate(choices) for output in outputs
        )

    @property
    def finished(self) -> bool:
        return not self._left

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        return self._left.popleft() if self._left else None

    def cancel(self, index: int | None = None) -> None:
        self._left = deque(item for item in self._left if index not in (None, item[0]))


class ScriptedEngine:
    """Satisfies the server's EngineClient."""

    ready, stands_still, stats = True, False, ExecutorStats()

    def __init__(self, engine_dir: Path, script: Script) -> None:
        self._script = script
        self._tokenizer = Tokenizer.from_file(str(engine_dir / "tokenizer.json"))
        self._grammars = GrammarCompiler(engine_dir, _VOCAB, (_END_ID,))
        self.info = EngineInfo(
            name=MODEL,
            model=MODEL,
            quantization="none",
            backend="none",
            tp_size=1,
            pp_size=1,
            max_seq_len=_MAX_SEQ_LEN,
            max_batch_size=8,
            max_num_tokens=8192,
            vocab_size=_VOCAB,
            kv_block_size=32,
            num_kv_blocks=1024,
            kv_cache_bytes=1 << 30,
            eos_token_ids=(_END_ID,),
            digest="sha256:0",
            created=int(time.time()),
        )

    def check_room(self) -> None:
        """There is always some."""

    def submit(
        self,
        prompt_ids: list[int],
        samplings: list[SamplingParams],
        priority: int = 0,
        label: str = "",
    ) -> Playing:
        prompt = self._tokenizer.decode(prompt_ids, skip_special_tokens=False)
        return Playing([self._outputs(prompt, sampling) for sampling in samplings])

    def close(self) -> None:
        self._grammars.close()

    def _outputs(self, prompt: str, sampling: SamplingParams) -> list[TokenOutput]:
        answers = (self._tokenizer.encode(text).ids for text in self._script(prompt))
        constraint = sampling.constraint
        if constraint is not None:
            # beside the loop: others are answered meanwhile
            grammar = get_hub().threadpool.apply(self._compiled, (constraint,))
            answers = (ids for ids in answers if _follows(grammar, ids))
        ids = next(answers, None)
        if ids is None:
            error = f"nothing that is scripted follows {constraint}"
            return [TokenOutput(1, finish_reason=FinishReason.ERROR, error=error)]
        outputs = [TokenOutput(1, [token_id]) for token_id in ids[: sampling.max_tokens]]
        if len(ids) >= sampling.max_tokens:
            return [*outputs, TokenOutput(1, finish_reason=FinishReason.LENGTH)]
        return [*outputs, TokenOutput(1, finish_reason=FinishReason.STOP, stop_token_id=_END_ID)]

    def _compiled(self, constraint: Constraint) -> Compiled:
        return self._grammars.compile(constraint).result(_COMPILE_S)


def _follows(grammar: Compiled, token_ids: Sequence[int]) -> bool:
    """Each of the tokens, and then the end."""
    matcher = GrammarMatcher(grammar, (_END_ID,))
    for token_id in (*token_ids, _END_ID):
        matcher.accept(token_id)
        if matcher.failure is not None:
            return False
    return True
