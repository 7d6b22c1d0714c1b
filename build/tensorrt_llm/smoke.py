"""Does a compiled engine say what its checkpoint says? Its greedy answer, judged by the CPU.

An engine may load and yet compute wrongly: nibbles in the wrong order, a layout of another GPU.
The engine answers through its executor; the CPU backend reads prompt and answer at once from the
same checkpoint, and every token must be one that it might have chosen. Equal texts are not asked
for: where two tokens are about as likely, rounding decides, and all that follows differs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from enginehouse.build.sources.tokenizer_files import special_token_ids
from enginehouse.build.verify import PROMPT, TEXT, watched_logits
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import Executor, ExecutorOptions, generate
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.torch.float16 import Magnitude

ANSWER_TOKENS = 24
# Nats between the CPU's best token and the engine's. Arithmetic of another order, or FP8
# attention, moves logits by tenths; an engine that computes wrongly misses by many nats.
MAX_GAP = 2.0


class SmokeFigures(NamedTuple):
    """gap: log of how much likelier the CPU holds its own choice than the engine's, nats."""

    prompt: str
    answer: str
    num_tokens: int
    top1_agreement: float
    max_gap: float
    max_accepted_gap: float = MAX_GAP
    largest_activation: Magnitude | None = None  # of an engine in float16
    overflow: str | None = None  # why it must not compute in float16

    @property
    def passed(self) -> bool:
        return self.max_gap <= self.max_accepted_gap  # false for NaN


def greedy_answer(executor: Executor, checkpoint: Engine) -> tuple[list[int], list[int]]:
    """Prompt and answer of an executor for the checkpoint's model, as token ids."""
    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    _, first_token = special_token_ids(checkpoint.path, {})
    if first_token is not None and not 0 <= first_token < executor.info.vocab_size:
        first_token = None  # the build has said so
    head = [] if first_token is None else [first_token]
    prompt = head + tokenizer.encode(PROMPT, add_special_tokens=False).ids
    room = executor.info.max_seq_len - len(prompt)
    if room < 1:
        raise EngineError(
            f"max_seq_len={executor.info.max_seq_len} is too short to check; wanted 64 or more"
        )
    sampling = SamplingParams(min(ANSWER_TOKENS, room), temperature=0.0, ignore_eos=True)
    return prompt, generate(executor, [Request(1, prompt, sampling)])[1]


def judge(checkpoint: Engine, prompt: list[int], answer: list[int]) -> SmokeFigures:
    """Compare an answer with what the CPU backend makes of the checkpoint.

    An engine in float16 is judged by a longer text besides, whose activations have to fit into it.
    Needs the checkpoint's weights in memory. Raises EngineError when there is no answer.
    """
    if not answer:
        raise EngineError("the engine answered its first prompt with no token; build it again")
    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    ids = prompt + answer
    if checkpoint.config.dtype == "float16":
        ids += tokenizer.encode("\n\n" + TEXT, add_special_tokens=False).ids
        ids = ids[: checkpoint.manifest.limits.max_seq_len]
    options = ExecutorOptions(
        max_seq_len=len(ids), max_batch_size=1, max_num_tokens=512, device="cpu"
    )
    from enginehouse.runtime.torch.executor import TorchExecutor  # slow: it brings xgrammar

    cpu = TorchExecutor(checkpoint, options)
    try:
        logits, watch = watched_logits(cpu, torch.tensor(ids))
        first = len(prompt) - 1
        logits = logits[first : first + len(answer)]  # [answer, vocab_size]
    finally:
        cpu.close()
    chosen = torch.tensor(answer)
    gaps = logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]
    return SmokeFigures(
        prompt=PROMPT,
        answer=tokenizer.decode(answer),
        num_tokens=len(answer),
        top1_agreement=float((logits.argmax(-1) == chosen).float().mean()),
        max_gap=float(gaps.max()),
        largest_activation=None if watch is None else watch.largest,
        overflow=None if watch is None else watch.overflow,
    )


def refuse_garbage(figures: SmokeFigures) -> None:
    """EngineError when the engine's answer is none that its checkpoint would give, or another text
    would get none.
    """
    if figures.overflow is not None:
        raise EngineError(figures.overflow)
    if not figures.passed:
        raise EngineError(
            f"the compiled engine answers {figures.answer[:60]!r} to {figures.prompt!r}: a token "
            f"lies {figures.max_gap:.1f} nats below the CPU backend's choice from the same "
            f"checkpoint, at most {figures.max_accepted_gap} is accepted; the engine computes "
            "wrongly on this GPU: choose another quant or GPU"
        )
