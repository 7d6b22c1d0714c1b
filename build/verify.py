"""Does the engine say what the model says? Its logits against the unquantised model's.

The answer comes through the engine's own executor, paged and batched as it will be served; the
logits from the same loaded weights over the whole text at once. The compiled CPU backend's come
from its kernels, where this machine can compile them. Knows no reference's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from enginehouse.runtime.checkpoint.traits import AttentionRule
from enginehouse.runtime.cpu.compiler import has_compiler
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.torch.decoder import CausalAttention, causal_attention
from enginehouse.runtime.torch.float16 import Float16Watch, Magnitude

if TYPE_CHECKING:  # slow: it brings xgrammar, which most builds do without
    from enginehouse.runtime.cpu.executor import CpuExecutor
    from enginehouse.runtime.torch.executor import TorchExecutor

PROMPT = "The three primary colours are red, yellow and"
ANSWER_TOKENS = 32
# Teacher-forced after the answer, so that the figures rest on a few hundred positions.
TEXT = (
    "Water boils at a lower temperature on a mountain than at the sea, because the air presses "
    "on it less. Cooks who live high up know this well: beans take longer, bread rises faster, "
    "and an egg needs another minute in the pot. A pressure cooker turns the same law around. "
    "By holding the steam in, it lets the water grow hotter than it could in the open, and the "
    "stew is done in half of the time.\n\n"
    "def mean(values):\n    if not values:\n        raise ValueError('mean of nothing')\n"
    "    return sum(values) / len(values)\n\n"
    "Q: A train leaves at 9:40 and arrives at 12:05. How long does the journey take?\n"
    "A: From 9:40 to 12:00 it is two hours and twenty minutes; five minutes more make two hours "
    "and twenty-five minutes.\n\n"
    "Le chat dort sur la chaise; dehors il pleut depuis ce matin, et personne ne veut sortir."
)
# Mean KL divergence, nats a token, beyond which a build fails: two to four times what SmolLM2-135M
# shows, whose small layers lose most (docs/measurements.md), none aside. W4A8 has no kernel for its
# groups of 64: what int4_awq and fp8 show, together.
MAX_MEAN_KL = {
    "none": 0.02,
    "fp8": 0.2,
    "fp8_rowwise": 0.1,
    "int4": 1.0,
    "int4_awq": 0.3,
    "w4a8_awq": 0.4,
    "int8": 0.015,
}
# What activations in bytes, and keys and values in INT8, may add where the compiled CPU backend's
# kernels are asked, whose cache is read: three times what SmolLM2-135M shows (docs/quality.md).
INT8_ACTIVATIONS_KL = 0.005
INT8_KV_KL = 0.12
_ROWS_AT_ONCE = 64


class VerifyFigures(NamedTuple):
    """kl: KL(reference || engine) in nats per position; top1: share of equal best tokens."""

    mean_kl: float
    max_kl: float
    top1_agreement: float
    num_positions: int
    max_mean_kl: float
    prompt: str
    answer: str
    largest_activation: Magnitude | None = None  # of an engine in float16

    @property
    def passed(self) -> bool:
        return self.mean_kl <= self.max_mean_kl  # false for NaN


def verify(
    engine: Engine,
    truth_of: Callable[[Tensor], Tensor],
    first_token: int | None,
    max_mean_kl: float,
) -> VerifyFigures:
    """Let the engine answer a fixed prompt greedily, then compare logits over prompt, answer, text.

    truth_of: the unquantised model's logits after each token of a text, int64 [tokens] -> float32
    [tokens, vocab_size]. first_token: the model's BOS, if it was trained with one.
    """
    tokenizer = Tokenizer.from_file(str(engine.path / "tokenizer.json"))
    limits = engine.manifest.limits
    options = ExecutorOptions(
        max_seq_len=min(limits.max_seq_len, 1024), max_batch_size=1, device="cpu"
    )
    executor, logits_of = _opened(engine, options)
    try:
        head = [] if first_token is None else [first_token]
        prompt = head + tokenizer.encode(PROMPT, add_special_tokens=False).ids
        room = executor.info.max_seq_len
        if len(prompt) + 1 >= room:
            raise EngineError(f"max_seq_len={room} is too short to verify; wanted 64 or more")
        sampling = SamplingParams(min(ANSWER_TOKENS, room - len(prompt)), temperature=0.0)
        answer = generate(executor, [Request(1, prompt, sampling)])[1]
        text = tokenizer.encode("\n\n" + TEXT, add_special_tokens=False).ids
        ids = torch.tensor((prompt + answer + text)[:room])
        logits, watch = logits_of(ids)
    finally:
        executor.close()
    if watch is not None and watch.overflow is not None:
        raise EngineError(watch.overflow)
    truth = truth_of(ids)
    kl = kl_divergence(truth, logits)
    agreement = (truth.argmax(-1) == logits.argmax(-1)).float().mean()
    return VerifyFigures(
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1_agreement=float(agreement),
        num_positions=len(ids),
        max_mean_kl=max_mean_kl,
        prompt=PROMPT,
        answer=tokenizer.decode(answer),
        largest_activation=None if watch is None else watch.largest,
    )


def _opened(
    engine: Engine, options: ExecutorOptions
) -> tuple[TorchExecutor | CpuExecutor, Callable[[Tensor], tuple[Tensor, Float16Watch | None]]]:
    """What answers, and what gives a text's logits as `watched_logits` does.

    An engine in float16 is watched, as its rank files may go on to a GPU, and so it is torch's.
    """
    watched = engine.config.dtype == "float16"
    if engine.manifest.backend == "cpu" and has_compiler() and not watched:
        from enginehouse.runtime.cpu.executor import CpuExecutor
        from enginehouse.runtime.cpu.executor import text_logits as kernels_logits

        compiled = CpuExecutor(engine, options)
        runner = compiled.runner
        return compiled, lambda ids: (torch.from_numpy(kernels_logits(runner, ids.tolist())), None)
    from enginehouse.runtime.torch.executor import TorchExecutor

    executor = TorchExecutor(engine, options)
    return executor, lambda ids: watched_logits(executor, ids)


def watched_logits(executor: TorchExecutor, ids: Tensor) -> tuple[Tensor, Float16Watch | None]:
    """`text_logits`, and how far the activations reach where the engine computes in float16, which
    no CPU does here.
    """
    engine = executor.engine
    if engine.config.dtype != "float16":
        return text_logits(executor, ids), None
    scales_queries = engine.manifest.backend == "tensorrt"
    with Float16Watch(executor.runner.model, scales_queries) as watch:
        return text_logits(executor, ids), watch


def text_logits(executor: TorchExecutor, ids: Tensor) -> Tensor:
    """Logits after each token of a text that is read at once: [tokens] -> float32 [tokens, vocab].

    Keys and values are rounded as the executor's cache stores them.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        stored = executor.runner.cache.round_trip
        return causal_attention(layer, q, stored(layer, k), stored(layer, v), rule)

    model = executor.runner.model
    hidden = model.hidden_states(ids, torch.arange(len(ids)), CausalAttention(attend))
    return model.logits(hidden)


def kl_divergence(truth: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(truth) || softmax(logits)) of each row, in nats; both [rows, vocab_size]."""
    parts = []
    for start in range(0, len(truth), _ROWS_AT_ONCE):
        p = truth[start : start + _ROWS_AT_ONCE].log_softmax(-1)
        q = logits[start : start + _ROWS_AT_ONCE].log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)
