"""The contract of a stored form: which tensors a module has, and the weight that they mean.

Knows no form, no model and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from enginehouse.build.forms.quantization import check_finite
from enginehouse.build.source import TensorInfo, TensorSource
from enginehouse.runtime.errors import CheckpointError

Infos = Mapping[str, TensorInfo]
Shape = tuple[int, ...]


class StoredForm(Protocol):
    """name: what users call it. marker: the ending of a tensor's name that only such a module has.

    endings: of all tensors that a module can have. weight: of what they mean together.
    """

    @property
    def name(self) -> str: ...

    @property
    def marker(self) -> str: ...

    @property
    def endings(self) -> tuple[str, ...]: ...

    @property
    def weight(self) -> str: ...

    def shape(self, source: TensorSource, module: str) -> Shape:
        """Usually [out_features, in_features]. CheckpointError for tensors that are missing or do
        not fit each other; none is read but those that say a shape.
        """

    def read(self, source: TensorSource, module: str) -> Tensor:
        """float32, what the form defines; its scales are finite."""


class Layout(NamedTuple):
    """How a checkpoint's linears are stored.

    name: what users call the whole. markers: of its forms. form_of: a module's form by its name.
    spelt: a tensor's name on disk -> as the forms have it.
    """

    name: str
    forms: tuple[StoredForm, ...]
    form_of: Callable[[str], StoredForm]
    spelt: Callable[[str], str] | None = None


def one_form(form: StoredForm, spelt: Callable[[str], str] | None = None) -> Layout:
    """A layout of which all modules have the same form."""
    return Layout(form.name, (form,), lambda module: form, spelt)


def found(infos: Infos, name: str, kind: str, *dtypes: torch.dtype) -> Shape:
    """A tensor's shape; CheckpointError when it is missing, or of none of these dtypes."""
    info = infos.get(name)
    if info is None:
        raise CheckpointError(
            f"tensor {name} is missing from the {kind} checkpoint; download its files again"
        )
    if dtypes and info.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(
            f"{name} has dtype {info.dtype}; wanted {wanted}, as {kind} stores it: do config.json "
            "and the weights belong together?"
        )
    return info.shape


def matrix(infos: Infos, name: str, kind: str, *dtypes: torch.dtype) -> tuple[int, int]:
    """As `found`, of a tensor with rows and columns."""
    shape = found(infos, name, kind, *dtypes)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f"{name} has shape {list(shape)}; wanted rows and columns, as {kind} stores them: "
            "download the checkpoint again"
        )
    return shape[0], shape[1]


def check_shape(infos: Infos, name: str, *wanted: Shape) -> None:
    """CheckpointError when the tensor is there and has none of these shapes."""
    if name in infos and infos[name].shape not in wanted:
        shapes = " or ".join(str(list(shape)) for shape in wanted)
        raise CheckpointError(
            f"{name} has shape {list(infos[name].shape)}; its config and its weight give {shapes}: "
            "do config.json and the weights belong together?"
        )


def read_scale(source: TensorSource, name: str) -> Tensor:
    """float32, of any dtype a scale is stored in. QuantizationError unless it is finite."""
    scale = source.read(name).float()
    check_finite(name, scale)
    return scale
