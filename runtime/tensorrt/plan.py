"""The parts of a context class's decoder, each with its contexts, and what is bound to them.

Knows addresses, shapes and names; it knows no sequence and no slot but the first of a step.
Source: TensorRT-RTX 1.7 Python API (IExecutionContext).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.tensorrt.commands import Step, step_layout
from enginehouse.runtime.tensorrt.inputs import layer_of, shift_layer
from enginehouse.runtime.tensorrt.plan_file import DECODE, PREFILL, PlanFile

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT4": torch.uint8,  # two in a byte
}


class LoadedPart:
    """A part of the decoder, of the layers `layers`, with a context for each profile of its plan.

    The plan counts layers from 0; everything that is given here has the model's names.
    stream: a CUDA stream's handle; scratch: memory that all contexts of the stream share.
    """

    def __init__(self, file: PlanFile, layers: range, stream: int, scratch: Tensor) -> None:
        self.file = file
        self.layers = layers
        self.stream = stream
        self._contexts = [file.new_context(way, stream, scratch) for way in (DECODE, PREFILL)]
        engine, mode = file.engine, file.trt.TensorIOMode.INPUT
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._inputs = {name for name in names if engine.get_tensor_mode(name) == mode}
        self._outputs = set(names) - self._inputs
        self._shapes: list[tuple[int, int, int]] = [(0, 0, 0)] * 2
        self._first_slots: list[int | None] = [None, None]
        self._caches: dict[str, Tensor] = {}  # by the plan's names
        self._present: dict[str, str] = {}  # a cache's output -> its input
        self._fed: Tensor | None = None

    def share_communicator(self, capsule: Any) -> None:
        """Let both contexts exchange over NCCL. Waits until every rank has called it."""
        for context in self._contexts:
            if not context.set_communicator(capsule):
                raise self.file.words.refused("takes no communicator")

    def bind(
        self,
        weights: Mapping[str, Tensor],
        caches: Mapping[str, Tensor],
        fed: Tensor,
        reads: Mapping[str, Tensor],
        writes: Mapping[str, Tensor],
    ) -> None:
        """Set every address that no step changes, after checking that the plan wants just these.

        weights, caches, fed: as `LoadedPlan.bind`. reads, writes: inputs and outputs whose memory
        stays, by the plan's names: `hidden_states`; `next_hidden_states` or `logits`.
        """
        first, path = self.layers.start, self.file.path
        self._fed = fed
        self._caches = {
            shift_layer(name, -first): cache
            for name, cache in caches.items()
            if layer_of(name) in self.layers
        }
        stepped = self._caches.keys() | step_layout(1, 1)[0].keys()
        fixed = {
            name: reads.get(name, weights.get(shift_layer(name, first)))
            for name in self._inputs - stepped
        }
        missing = [shift_layer(name, first) for name, tensor in fixed.items() if tensor is None]
        missing += self._caches.keys() - self._inputs
        missing += reads.keys() - self._inputs
        missing += writes.keys() - self._outputs
        if missing:
            raise EngineError(
                f"{path} and the rank file do not fit: {', '.join(sorted(missing))} is in one of "
                "them only; build the engine again"
            )
        for name, tensor in sorted(fixed.items()):
            assert tensor is not None
            self._check(name, tensor)
            self._address(name, tensor.data_ptr())
        for name, tensor in writes.items():
            self._address(name, tensor.data_ptr())
        aliased = self.file.engine.get_aliased_input_tensor
        self._present = {name: aliased(name) for name in self._outputs - writes.keys()}
        if set(self._present.values()) != self._caches.keys():
            raise EngineError(f"{path} does not write its caches in place; build the engine again")

    def _check(self, name: str, tensor: Tensor) -> None:
        """EngineError when an input is not of the plan's dtype and shape, of which -1 is any."""
        engine = self.file.engine
        dtype = engine.get_tensor_dtype(name).name
        shape = [int(size) for size in engine.get_tensor_shape(name)]
        if dtype == "INT4":
            shape[-1] //= 2
        found = list(tensor.shape)
        fits = len(found) == len(shape) and all(
            wanted in (-1, size) for wanted, size in zip(shape, found, strict=True)
        )
        if tensor.dtype != _DTYPES.get(dtype) or not fits:
            raise EngineError(
                f"{shift_layer(name, self.layers.start)} is {tensor.dtype} {found} and "
                f"{self.file.path} wants {dtype} {shape}; build the engine again"
            )
        assert tensor.is_contiguous(), name

    def _address(self, name: str, address: int, profile: int | None = None) -> None:
        for index, context in enumerate(self._contexts):
            if profile in (None, index) and not context.set_tensor_address(name, address):
                raise self.file.words.refused(f"takes no address for {name}")

    def run(self, step: Step) -> None:
        """Enqueue a step whose data is in `fed`. Raises EngineError when TensorRT does not."""
        profile = PREFILL if step.prefill else DECODE
        if self._shapes[profile] != (step.batch, step.tokens, step.looked_at):
            self._set_shapes(profile, step)
        if self._first_slots[profile] != step.first_slot:
            self._set_slots(profile, step.first_slot)
        if not self._contexts[profile].execute_async_v3(self.stream):
            raise self.file.words.refused(f"cannot run {self.file.path}")

    def _set_shapes(self, profile: int, step: Step) -> None:
        assert self._fed is not None, "a step before bind"
        context, fields = self._contexts[profile], step_layout(step.batch, step.tokens)[0]
        shapes = {name: field.shape for name, field in fields.items()}
        shapes["kv_positions"] = (step.looked_at,)
        if "hidden_states" in self._inputs:
            size = self.file.engine.get_tensor_shape("hidden_states")[-1]
            shapes["hidden_states"] = (step.batch, step.tokens, int(size))
        for name, cache in self._caches.items():
            shapes[name] = (step.batch, *cache.shape[1:])
        for name in shapes.keys() & self._inputs:
            if not context.set_input_shape(name, shapes[name]):
                raise self.file.words.refused(f"takes no {name} of {list(shapes[name])}")
        for name in fields.keys() & self._inputs:
            address = self._fed.data_ptr() + fields[name].offset * self._fed.itemsize
            self._address(name, address, profile)
        self._shapes[profile] = (step.batch, step.tokens, step.looked_at)

    def _set_slots(self, profile: int, first: int) -> None:
        """The caches from a slot on, and their outputs in the same place."""
        addresses = {
            name: cache.data_ptr() + first * cache.stride(0) * cache.itemsize
            for name, cache in self._caches.items()
        }
        for name, address in addresses.items():
            self._address(name, address, profile)
        for name, past in self._present.items():
            self._address(name, addresses[past], profile)
        self._first_slots[profile] = first


class LoadedPlan:
    """A context class: the parts that a step runs, in their order, over one set of caches."""

    def __init__(self, parts: Sequence[LoadedPart]) -> None:
        self.parts = parts
        self.caches: dict[str, Tensor] = {}

    def share_communicator(self, capsule: Any) -> None:
        """Let all contexts exchange over NCCL. Waits until every rank has called it."""
        for part in self.parts:
            part.share_communicator(capsule)

    def bind(
        self,
        weights: Mapping[str, Tensor],
        caches: Mapping[str, Tensor],
        fed: Tensor,
        hidden: Sequence[Tensor],
        logits: Tensor,
    ) -> None:
        """Set every address that no step changes. Raises EngineError when a plan does not fit.

        weights: what does not change between steps. caches: `past_key_0`, ..., each [slots,
        kv_heads, S, head_size]. fed: int32, where a step's inputs are put. hidden: two of [1,
        tokens, hidden_size], between the parts in turn. logits: float32 [batch, vocab_size].
        """
        self.caches = dict(caches)
        last = len(self.parts) - 1
        for index, part in enumerate(self.parts):
            reads = {"hidden_states": hidden[(index - 1) % 2]} if index else {}
            writes = {"next_hidden_states": hidden[index % 2]}
            part.bind(weights, caches, fed, reads, {"logits": logits} if index == last else writes)

    def run(self, step: Step) -> None:
        """Enqueue a step whose data is in `fed`. Raises EngineError when TensorRT does not."""
        for part in self.parts:
            part.run(step)
