"""The shipped text, and the largest magnitudes that a KV cache meets on it.

Knows no weight format: it watches the unquantised model, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from enginehouse.build.quantize.activations import SavedActivations
from enginehouse.build.quantize.reference import ReferenceModel, fast_products
from enginehouse.runtime.checkpoint.packing import FP8_MAX, INT8_MAX
from enginehouse.runtime.checkpoint.traits import AttentionRule
from enginehouse.runtime.errors import CheckpointError
from enginehouse.runtime.torch.decoder import CausalAttention, causal_attention

# Passages are separated by a line of dashes. The first is our own words: prose, dialogue, code,
# tables, other languages. The second is from novels in the public domain: calibration_sources.txt.
TEXTS = ("calibration.txt", "calibration_prose.txt")


def passages() -> list[str]:
    """The calibration texts, a passage from each in turn."""
    texts = []
    for name in TEXTS:
        text = files("enginehouse.build.quantize").joinpath(name).read_text(encoding="utf-8")
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
        if len(ids) >= num_samples * body:
            break
        ids += tokenizer.encode(passage + "\n\n", add_special_tokens=False).ids
    pieces = [ids[start : start + body] for start in range(0, len(ids), body)]
    return [torch.tensor(head + piece) for piece in pieces[:num_samples]]


def kv_maxima(
    model: ReferenceModel,
    sequences: list[Tensor],
    advance: Callable[[int], None],
    saved: SavedActivations,
) -> dict[int, float]:
    """Layer -> the largest magnitude among its keys, rotated, and values, in the unquantised model
    on `sequences`; goes on where an earlier run was.
    """
    earlier = saved.load()
    maxima: dict[int, float] = dict(earlier.notes["maxima"]) if earlier else {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        largest = max(float(k.abs().amax()), float(v.abs().amax()))
        maxima[layer] = max(maxima.get(layer, 0.0), largest)
        return causal_attention(layer, q, k, v, rule)

    def passed(layer: int, hidden: list[Tensor]) -> None:
        notes = {"maxima": list(maxima.items())}
        saved.save(layer, hidden, notes, last=layer == model.config.num_hidden_layers)

    with fast_products():
        model.hidden_states(sequences, advance, CausalAttention(attend), earlier, passed)
    return maxima


def kv_scales(maxima: dict[int, float], algo: str) -> dict[int, float]:
    """Each layer's multiplier for a KV cache of `algo`, FP8 or INT8; 1 for zeros."""
    largest = {"FP8": FP8_MAX, "INT8": float(INT8_MAX)}[algo]
    return {layer: amax / largest or 1.0 for layer, amax in maxima.items()}
