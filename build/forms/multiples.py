"""What a form's kernels want a linear's features to be multiples of.

Source: TensorRT-LLM 1.2.1 checkpoint format, tensor tables per tp and pp.
"""

from __future__ import annotations

from typing import NamedTuple

from enginehouse.build.forms.weight_forms import FP8_FORMS


class Multiples(NamedTuple):
    """What a linear's features must be multiples of: outputs and inputs, on the axis that is cut,
    per rank, and on the other. columns: what an MLP that must be padded is padded to, per rank.
    """

    cut: tuple[int, int] = (1, 1)
    whole: tuple[int, int] = (1, 1)
    columns: int = 1


def multiples(quant: str, tp: int, group_size: int | None, for_trtllm: bool = True) -> Multiples:
    """Of a form. Beyond whole groups and the kernel's 64, TensorRT-LLM pads both axes of a whole
    INT4 linear to multiples of group_size * tp and then wants a checkpoint of the padded shapes
    (seen in its own tables: SmolLM2 at group_size 128 has 640 for 576), which what enters it has
    not. Other backends want whole groups and pairs of rows. cuBLAS multiplies FP8 in sixteens.
    """
    if group_size is not None:
        groups = (group_size, group_size)
        whole = (group_size * tp, group_size * tp) if for_trtllm else (2, group_size)
        return Multiples(groups, whole, group_size)
    if quant == "int8":  # the tiles of the weight-only kernel
        return Multiples((16, 64), (16, 64), 64)
    return Multiples(columns=16 if quant in FP8_FORMS else 1)
