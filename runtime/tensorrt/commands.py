"""What the leading rank tells every rank to do, in the order in which all of them do it.

Plain values that travel as MessagePack; the ranks enqueue the same shapes in the same order, as
their collectives need.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

_ALIGNED = 64  # int32s: TensorRT wants addresses that 256 divides


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Take memory for so many slots of each plan; nccl_id: how the ranks find each other, of 128
    bytes, or of none where there is one rank.
    """

    num_slots: list[int]
    nccl_id: bytes


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Run a plan over `batch` neighbouring slots, `tokens` each, looking at `looked_at` rows.

    data: the int32 inputs of `step_layout`, one after another.
    """

    plan: int
    prefill: bool
    first_slot: int
    batch: int
    tokens: int
    looked_at: int
    data: bytes


class CopyRows(msgspec.Struct, frozen=True, tag="copy"):
    """Copy a slot's first rows to another slot, perhaps of another plan."""

    plan: int
    slot: int
    to_plan: int
    to_slot: int
    num_rows: int


class SwapRows(msgspec.Struct, frozen=True, tag="swap"):
    """Exchange the first rows of two slots of a plan."""

    plan: int
    slot: int
    other: int
    num_rows: int


class ClearSlot(msgspec.Struct, frozen=True, tag="clear"):
    """Zero a slot's rows, which may hold what is not finite: masked rows are multiplied by 0."""

    plan: int
    slot: int


class KeepKernels(msgspec.Struct, frozen=True, tag="keep"):
    """Write the kernels that were made beside the engine, once all that was told is done."""


Move = CopyRows | SwapRows | ClearSlot
Command = Start | Step | Move | KeepKernels


class Field(NamedTuple):
    """Where an input lies in a step's data: int32s from its start on, and its shape."""

    offset: int
    shape: tuple[int, ...]


def step_layout(batch: int, tokens: int) -> tuple[dict[str, Field], int]:
    """The inputs of a step by name, each at an aligned place, and the length of all: int32s."""
    shapes = {
        **dict.fromkeys(("input_ids", "position_ids", "rotary_ids"), (batch, tokens)),
        "write_indices": (batch,),
        "last_token_ids": (batch, 1),
    }
    fields, offset = {}, 0
    for name, shape in shapes.items():
        fields[name] = Field(offset, shape)
        size = batch * tokens if shape == (batch, tokens) else batch
        offset += -(-size // _ALIGNED) * _ALIGNED
    return fields, offset
