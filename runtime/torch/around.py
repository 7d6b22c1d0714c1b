"""What a layer lends its attention, of whatever kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from enginehouse.runtime.checkpoint.traits import AttentionRule
from enginehouse.runtime.torch.mlp import Run

if TYPE_CHECKING:
    from enginehouse.runtime.torch.linear_attention import DeltaRule


class Around(NamedTuple):
    """attend(q, k, v, rule): over its keys; recur(rule, mixed, decay, rate): over its state; norm:
    of heads, by its name; show: what `watch` is shown; kept: keys and values of the layer that it
    reads them of, if that is another, both [tokens, kv_heads * head_size], side by side.
    """

    attend: Callable[[Tensor, Tensor, Tensor, AttentionRule], Tensor]
    recur: Callable[[DeltaRule, Tensor, Tensor, Tensor], Tensor]
    run: Run
    norm: Callable[[Tensor, str], Tensor]
    show: Callable[[str, Tensor], Tensor]
    kept: Tensor | None = None
