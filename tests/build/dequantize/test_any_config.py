"""A quantisation's config with any value anywhere: it is read, or refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from enginehouse.build.dequantize.config import read_stored_layout
from enginehouse.runtime.errors import EnginehouseError
from makers.bitsandbytes_writer import BITSANDBYTES
from makers.fuzzing import VALUES, tries
from makers.hqq_writer import HQQ
from makers.quantized_writers import KINDS
from makers.stored_forms import STORED

CONFIGS = [kind.config for kind in {**KINDS, **STORED, **BITSANDBYTES, **HQQ}.values()]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything that a JSON value holds."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


PLACES = [(config, place) for config in CONFIGS for place in places(config)]


def test_every_config_is_read_or_refused_in_a_sentence() -> None:
    outcomes = set()

    @tries(150)
    @given(st.sampled_from(PLACES), VALUES)
    def read_one(where: tuple[dict[str, Any], tuple[Any, ...]], value: Any) -> None:
        config, (*above, last) = copy.deepcopy(where[0]), where[1]
        holder: Any = config
        for key in above:
            holder = holder[key]
        holder[last] = value
        try:
            layout = read_stored_layout(config)
            layout.form_of("model.layers.0.mlp.down_proj")
            outcomes.add(True)
        except EnginehouseError as error:
            assert str(error).splitlines() == [str(error)]
            outcomes.add(False)

    read_one()
    assert outcomes == {True, False}
