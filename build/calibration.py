"""The largest magnitudes that linears and the KV cache meet on a shipped text.

Knows no weight format: it watches the unquantised model, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from enginehouse.build.activations import SavedActivations
from enginehouse.build.reference import ReferenceModel, fast_products
from enginehouse.runtime.errors import CheckpointError
from enginehouse.runtime.model import causal_attention
from enginehouse.runtime.packing import FP8_MAX, INT8_MAX
from enginehouse.runtime.traits import AttentionRule

# Passages are separated by a line of dashes. The first is our own words: prose, dialogue, code,
# tables, other languages. The second is from novels in the public domain: calibration_sources.txt.
TEXTS = ("calibration.txt", "calibration_prose.txt")


def passages() -> list[str]:
    """The calibration texts, a passage from each in turn."""
    texts = []
    for name in TEXTS:
        text = files("enginehouse.build").joinpath(name).read_text(encoding="utf-8")
        texts.append([passage.strip() for passage in text.split("\n---\n")])
    return [passage for passage in chain(*zip_longest(*texts)) if passage is not None]


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


class ActivationMaxima(NamedTuple):
    """linears: `transformer.layers.3.mlp.fc` -> the largest magnitude that enters it.
    keys_values: layer -> the largest magnitude among its keys, rotated, and values.
    """

    linears: dict[str, float]
    keys_values: dict[int, float]


def activation_maxima(
    model: ReferenceModel,
    sequences: list[Tensor],
    advance: Callable[[int], None],
    saved: SavedActivations,
) -> ActivationMaxima:
    """What the unquantised model meets on `sequences`; goes on where an earlier run was."""
    earlier = saved.load()
    linears: dict[str, float] = dict(earlier.notes["linears"]) if earlier else {}
    keys_values: dict[int, float] = dict(earlier.notes["keys_values"]) if earlier else {}

    def observe(layer: int, module: str, x: Tensor) -> None:
        name = f"transformer.layers.{layer}.{module}"
        linears[name] = max(linears.get(name, 0.0), float(x.abs().amax()))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        largest = max(float(k.abs().amax()), float(v.abs().amax()))
        keys_values[layer] = max(keys_values.get(layer, 0.0), largest)
        return causal_attention(layer, q, k, v, rule)

    def passed(layer: int, hidden: list[Tensor]) -> None:
        notes = {"linears": linears, "keys_values": list(keys_values.items())}
        saved.save(layer, hidden, notes, last=layer == model.config.num_hidden_layers)

    with fast_products():
        model.hidden_states(sequences, observe, advance, attend, earlier, passed)
    return ActivationMaxima(linears, keys_values)


def kv_scales(keys_values: dict[int, float], algo: str) -> dict[int, float]:
    """Each layer's multiplier for a KV cache of `algo`, FP8 or INT8; 1 for zeros."""
    largest = {"FP8": FP8_MAX, "INT8": float(INT8_MAX)}[algo]
    return {layer: amax / largest or 1.0 for layer, amax in keys_values.items()}
