"""Forms that no engine holds: what each means, number by number, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import EnginehouseError
from makers.quantized_writers import Pair, Written, write_quantized
from makers.stored_forms import NAMES, STORED

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(path: Path, dequantize: bool = True) -> SourceCheckpoint:
    return resolve_source(str(path), path, dequantize=dequantize)


def written(
    kind: str, path: Path, edit: Callable[[Written], None] = lambda tensors: None, **changes: Any
) -> Pair:
    return write_quantized(kind, path, edit, kinds=STORED, **changes)


def assert_means(pair: Pair) -> SourceCheckpoint:
    """The quantised checkpoint gives the float32 one's tensors."""
    source, wanted = opened(pair.quantized), load_file(pair.plain / "model.safetensors")
    assert {name for name in source.tensors.infos if name in wanted} == set(wanted)
    for name, tensor in wanted.items():
        assert source.tensors.infos[name].shape == tensor.shape
        torch.testing.assert_close(source.tensors.read(name).float(), tensor, rtol=1e-6, atol=0)
    return source


@pytest.mark.parametrize("kind", STORED)
def test_a_form_is_read_as_its_document_means_it(kind: str, tmp_path: Path) -> None:
    pair = written(kind, tmp_path)
    source = assert_means(pair)
    plan = make_plan(load_settings({"quant": "fp8"}), source)
    assert plan.rounded_twice is not None
    assert f"rounded twice, to {NAMES[kind]} and then to fp8" in plan.rounded_twice
    with pytest.raises(EnginehouseError, match="pass --dequantize") as caught:
        make_plan(load_settings({}), opened(pair.quantized, dequantize=False))
    assert "\n" not in str(caught.value)
