"""FP8's static activation scales: the largest input each linear meets on a shipped text.

Knows no weight format: it watches the unquantised model, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from enginehouse.build.reference import ReferenceModel
from enginehouse.runtime.errors import CheckpointError

TEXT = "calibration.txt"  # our own words; passages are separated by a line of dashes


def passages() -> list[str]:
    """The calibration text: prose, dialogue, code, tables, other languages."""
    text = files("enginehouse.build").joinpath(TEXT).read_text(encoding="utf-8")
    return [passage.strip() for passage in text.split("\n---\n")]


def calibration_sequences(
    tokenizer_dir: Path, num_samples: int, length: int, first_token: int | None
) -> list[Tensor]:
    """At most `num_samples` sequences of at most `length` ids, each from one run of passages.

    first_token: what the model was trained to see first (its BOS), if anything.
    """
    path = tokenizer_dir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    head = [] if first_token is None else [first_token]
    body = length - len(head)
    ids: list[int] = []
    for passage in passages():
        ids += tokenizer.encode(passage + "\n\n", add_special_tokens=False).ids
    pieces = [ids[start : start + body] for start in range(0, len(ids), body)]
    return [torch.tensor(head + piece) for piece in pieces[:num_samples]]


def activation_maxima(
    model: ReferenceModel, sequences: list[Tensor], advance: Callable[[int], None]
) -> dict[str, float]:
    """The largest magnitude that enters each linear: `transformer.layers.3.mlp.fc` -> float."""
    maxima: dict[str, float] = {}

    def observe(layer: int, module: str, x: Tensor) -> None:
        name = f"transformer.layers.{layer}.{module}"
        maxima[name] = max(maxima.get(name, 0.0), float(x.abs().amax()))

    model.hidden_states(sequences, observe, advance)
    return maxima
