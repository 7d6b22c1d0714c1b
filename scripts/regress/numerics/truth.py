"""What the source checkpoint itself says of a text: float32 on this machine's CPU or GPU.

It is the reference that builds are verified with: any engine, of however many GPUs, is judged by
the same weights. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from enginehouse.runtime.errors import EnginehouseError

if TYPE_CHECKING:  # torch, which a run without a reference does without
    from enginehouse.build.source import SourceCheckpoint

_ROWS_AT_ONCE = 256  # of logits: a vocabulary of 128k takes 128 MiB


def open_reference(checkpoint: str) -> SourceCheckpoint:
    """Raises EnginehouseError for what is no checkpoint that can be read."""
    from enginehouse.build.resolve.resolve import resolve_source

    return resolve_source(checkpoint, Path(".cache"), dequantize=None)


def true_tops(
    checkpoint: str,
    texts: Sequence[Sequence[int]],
    num_top: int,
    advance: Callable[[str], None] = lambda layer: None,
) -> list[tuple[list[float], list[dict[int, float]]]]:
    """Of each text's ids: the log probabilities, nats, of its tokens but the first, and of the
    likeliest `num_top` at the same positions. Raises EnginehouseError for what is no checkpoint, or
    another's.
    """
    import torch

    from enginehouse.build.hf_keys.hf_config import model_config
    from enginehouse.build.quantize.reference import ReferenceModel

    source = open_reference(checkpoint)
    config = model_config(source.config, "float32")
    beyond = max((max(ids) for ids in texts), default=0)
    if beyond >= config.vocab_size:
        raise EnginehouseError(
            f"{checkpoint} has {config.vocab_size} tokens and the texts have token {beyond}; "
            "give the checkpoint that the engine was made of"
        )
    model = ReferenceModel(config, source)
    layers = iter(range(1, config.num_hidden_layers + 1))

    def passed(count: int) -> None:
        for _ in range(count):
            advance(f"layer {next(layers)} of {config.num_hidden_layers}")

    found = []
    for ids, states in zip(
        texts, model.hidden_states([torch.tensor(ids) for ids in texts], passed), strict=True
    ):
        chosen: list[float] = []
        tops: list[dict[int, float]] = []
        for start in range(0, len(ids) - 1, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, len(ids) - 1))
            logprobs = model.logits([states[rows]])[0].log_softmax(-1)
            targets = torch.tensor(ids[rows.start + 1 : rows.stop + 1])
            chosen += logprobs.gather(1, targets[:, None])[:, 0].tolist()
            values, tokens = logprobs.topk(min(num_top, logprobs.shape[1]))
            tops += [
                dict(zip(ids_, values_, strict=True))
                for ids_, values_ in zip(tokens.tolist(), values.tolist(), strict=True)
            ]
        found.append((chosen, tops))
    return found
