"""What goes from layer to layer: of each token a row of hidden_size numbers, and behind them, of
some models, further streams of as many, and what later layers read: what each gets of a token
besides, and keys and values that layers read of others. Pure arithmetic on a ModelConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from enginehouse.runtime.config import ModelConfig


class Carried(NamedTuple):
    """Where in a row what stands. hidden: the numbers of all streams. width: of it all. inputs:
    where those of the first layer begin, size numbers each. kept: of each layer that others read
    the keys of, where its keys begin and its values end, heads of head_size one after another.
    """

    hidden: int
    inputs: int
    size: int
    kept: Mapping[int, tuple[int, int]]
    width: int

    @property
    def is_plain(self) -> bool:
        """Whether it is streams and nothing else."""
        return self.width == self.hidden

    def inputs_of(self, layer: int) -> slice:
        begin = self.inputs + layer * self.size
        return slice(begin, begin + self.size)


def carried(config: ModelConfig) -> Carried:
    layers = range(config.num_hidden_layers)
    hidden = config.hidden_size * config.num_streams
    end = hidden + config.num_hidden_layers * config.per_layer_size
    kept: dict[int, tuple[int, int]] = {}
    for source in sorted({config.kv_layer(i) for i in layers if config.kv_layer(i) != i}):
        own = config.of_layer(source)
        kept[source] = (end, end + 2 * own.num_key_value_heads * own.head_size)
        end = kept[source][1]
    return Carried(hidden, hidden, config.per_layer_size, kept, end)
