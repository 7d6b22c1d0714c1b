"""All experts of a layer in one quantised tensor, as ModelOpt writes those of Llama 4 and GPT-OSS.

Beside NAME (`mlp.experts.gate_up_proj`) stand NAME_weight_scale, NAME_weight_scale_2 and
NAME_input_scale; inputs come before outputs, as in the unquantised stack, whose order of rows they
have.
Source: nvidia-modelopt 0.47, torch/export/unified_export_hf.py (experts of products by batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enginehouse.build.dequantize.base import (
    Layout,
    Shape,
    StoredForm,
    check_shape,
    found,
    read_scale,
)
from enginehouse.build.forms.block_floats import NVFP4_BLOCK, dequantize_blocks
from enginehouse.build.forms.quantization import check_finite
from enginehouse.build.source import TensorSource
from enginehouse.runtime.errors import CheckpointError

_STACKS = (".experts.gate_up_proj", ".experts.down_proj")
_ENDINGS = ("", "_weight_scale", "_weight_scale_2", "_input_scale")


def _stack(source: TensorSource, name: str, kind: str, dtype: torch.dtype) -> tuple[int, int, int]:
    shape = found(source.infos, name, kind, dtype)
    if len(shape) != 3 or 0 in shape:
        raise CheckpointError(
            f"{name} has shape {list(shape)}; wanted experts, inputs and outputs, as {kind} stores "
            "them: download the checkpoint again"
        )
    return shape[0], shape[1], shape[2]


@dataclass(frozen=True, slots=True)
class StackedFp8Form:
    """NAME float8_e4m3fn [experts, in, out]; NAME_weight_scale float32 [] for them all."""

    name: str = "FP8"
    marker: str = "_weight_scale"
    endings: tuple[str, ...] = _ENDINGS
    weight: str = ""

    def shape(self, source: TensorSource, module: str) -> Shape:
        check_shape(source.infos, f"{module}_weight_scale", (), (1,))
        return _stack(source, module, self.name, torch.float8_e4m3fn)

    def read(self, source: TensorSource, module: str) -> Tensor:
        self.shape(source, module)
        q = source.read(module)
        check_finite(module, q)
        return q.float().mul_(read_scale(source, f"{module}_weight_scale"))


@dataclass(frozen=True, slots=True)
class StackedNvfp4Form:
    """NAME uint8 [experts, in / 2, out] of e2m1, the even input in the low nibble;
    NAME_weight_scale float8_e4m3fn [experts, in / 16, out]; NAME_weight_scale_2 float32 [].
    """

    name: str = "NVFP4"
    marker: str = "_weight_scale"
    endings: tuple[str, ...] = _ENDINGS
    weight: str = ""

    def shape(self, source: TensorSource, module: str) -> Shape:
        experts, half, out_features = _stack(source, module, self.name, torch.uint8)
        infos, scale = source.infos, f"{module}_weight_scale"
        found(infos, scale, self.name, torch.float8_e4m3fn)
        check_shape(infos, scale, (experts, -(-2 * half // NVFP4_BLOCK[1]), out_features))
        found(infos, f"{module}_weight_scale_2", self.name)
        check_shape(infos, f"{module}_weight_scale_2", (), (1,))
        return experts, 2 * half, out_features

    def read(self, source: TensorSource, module: str) -> Tensor:
        weight = torch.empty(self.shape(source, module))
        second = read_scale(source, f"{module}_weight_scale_2")
        scales = read_scale(source, f"{module}_weight_scale")
        for expert, q in enumerate(source.read(module)):
            scale = scales[expert].T.contiguous()
            weight[expert] = dequantize_blocks(q.T.contiguous(), scale, NVFP4_BLOCK, second).T
        return weight


_TWINS: dict[str, StoredForm] = {form.name: form for form in (StackedFp8Form(), StackedNvfp4Form())}


def with_stacks(layout: Layout) -> Layout:
    """The layout, of which stacks of experts are in the same forms, where those have one."""

    def form_of(module: str) -> StoredForm:
        form = layout.form_of(module)
        return _TWINS.get(form.name, form) if module.endswith(_STACKS) else form

    return layout._replace(forms=(*layout.forms, *_twins(layout.forms)), form_of=form_of)


def _twins(forms: Sequence[StoredForm]) -> list[StoredForm]:
    return [_TWINS[form.name] for form in forms if form.name in _TWINS]
