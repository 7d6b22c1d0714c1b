"""Recipes that put the rows of a tensor in another order: there, and back.

Works on whatever has a row for each output: weights, packed nibbles, scales.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from enginehouse.build.families.rows import Recipe
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.config_parts import Delta

# Of linear attention's tensors, whose parts follow each other: what a key head has of each part,
# which stands together in an engine.
_PARTS: dict[Recipe, Callable[[Delta], tuple[int, ...]]] = {
    "qkvz_by_heads": lambda d: (d.key_size, d.key_size, d.values, d.values),
    "qkv_by_heads": lambda d: (d.key_size, d.key_size, d.values),
    "ba_by_heads": lambda d: (d.group, d.group),
}


def reorders(recipe: Recipe) -> bool:
    return recipe in ("swap_halves", "parted_heads", *_PARTS)


def row_order(config: ModelConfig, recipe: Recipe, rows: int, back: bool = False) -> Tensor:
    """int64 [rows]: which row of the joined sources stands where in the engine's tensor. On the way
    back a row of packed nibbles is two; on the way there the model may have more heads than its
    sources.
    """
    order = torch.arange(rows)
    if recipe == "swap_halves":
        return order.roll(rows // 2)
    if recipe == "parted_heads":
        heads = config.num_attention_heads if back else rows // (3 * config.head_size)
        return order.view(heads, 3, -1).transpose(0, 1).flatten()
    assert config.delta is not None
    heads, parts = config.delta.key_heads, _PARTS[recipe](config.delta)
    sizes = [part * rows // sum(parts) for part in parts]
    return torch.cat([part.view(heads, -1) for part in order.split(sizes)], dim=1).flatten()


def reordered(config: ModelConfig, recipe: Recipe, tensor: Tensor, back: bool = False) -> Tensor:
    """The tensor with its rows in the engine's order; back: in the sources' again."""
    order = row_order(config, recipe, len(tensor), back).to(tensor.device)
    raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return raw[order.argsort() if back else order].view(tensor.dtype)
