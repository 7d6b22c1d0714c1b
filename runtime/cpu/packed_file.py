"""The packed weights of an engine: one file of safetensors, which is mapped and never copied.

Its metadata describe the network, so that nothing else is read to run it. Knows no torch; what
stands in a tensor is `packed_linear.py`'s and native/tiles.h's. Source: the safetensors format.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.machine.large_pages import read_into_large_pages

PACKED = "packed.safetensors"
LAYOUT = 8  # of the packed tensors: another one is packed anew
KEPT = ("bf16", "e4m3", "int8")  # what keys and values can be

_ALIGNED = 64  # bytes: of a tensor's place in the file, and of its size
_MOST_HEADER_BYTES = 100_000_000
_NOT_PACKED = (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError)
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)


class LinearShape(msgspec.Struct, frozen=True):
    """form: bf16, int4, int8 or e4m3, of the weights. out, inputs: whole blocks of 32, whole steps
    of 64. group: inputs that share a scale, 0 for bf16. input: what activations are rounded to,
    bf16, bytes, fine_bytes, e4m3 or e4m3_by_row. narrow_scales: scales are bfloat16, else float32.
    """

    form: str
    out: int
    inputs: int
    group: int = 0
    input: str = "bf16"
    narrow_scales: bool = False


class LayerShape(msgspec.Struct, frozen=True):
    """gates: of a layer's plain MLP, or of its shared expert; 0 for none. place: among the layers
    with keys and values, of which another's may be read, or with linear attention. kv_heads: 0
    where no keys are read. cutoff: of `Traits.cutoffs`.
    """

    gates: int
    place: int
    head_size: int
    kv_heads: int
    cutoff: float | None


class Rule(msgspec.Struct, frozen=True):
    """How a layer attends; cap, window, chunk: 0 for none. rope: 0 where it is turned by the first
    table, 1 by the local one, -1 not at all. kept: what keys and values in bytes are multiplied by.
    """

    scale: float
    cap: float
    window: int
    chunk: int
    rope: int
    kept: float


class RopeFrequencies(msgspec.Struct, frozen=True):
    """inverse: radians a position of each rotated pair; magnitude: of cos and sin."""

    inverse: list[float]
    magnitude: float


class Mixture(msgspec.Struct, frozen=True):
    """How experts are chosen, as checkpoint/routing.py's Routing has it; inner: of each, a multiple
    of 16.
    """

    inner: int
    experts: int
    chosen: int
    renormalize: bool
    sigmoid: bool
    groups: int
    chosen_groups: int
    group_best: int
    scale: float
    scales_inputs: bool
    mixer_epsilon: float = 0.0


class Network(msgspec.Struct, frozen=True):
    """A decoder's sizes and traits. ropes: the global table, the local one, longrope's short one;
    pretrained: the longest context that the short one serves. hidden: a multiple of 16, with zeros
    behind the model's own, `normed`. growth, clip, swiglu_limit: 0 for none. latent_rank,
    query_rank, nope, value: of `ModelConfig.latent`, 0 for none; rotary: of latents, or of heads of
    the usual size. kept_layers: those with keys and values of their own; delta_*: of
    `ModelConfig.delta`, 0 for none. inputs: numbers that each layer gets of a token besides, 0 for
    none; inputs_vocab: tokens that have some. streams: hidden states that go from layer to layer;
    low_rank: of a learned residual, 0 for none.
    """

    layout: int
    activations: str
    hidden: int
    normed: int
    layers: int
    heads: int
    rotary: int
    vocab: int
    latent_rank: int
    query_rank: int
    nope: int
    value: int
    of_layers: list[LayerShape]
    kept_layers: int
    delta_layers: int
    delta_heads: int
    delta_group: int
    delta_key: int
    delta_value: int
    delta_kernel: int
    inputs: int
    inputs_vocab: int
    streams: int
    low_rank: int
    activation: str
    gated_mlp: bool
    parallel: bool
    layer_norm: bool
    norm_sublayers: bool
    norm_all_heads: bool
    norm_turned_heads: bool
    l2_norm_heads: bool
    gated_attention: bool
    rope_interleaved: bool
    norm_values: bool
    norm_experts: bool
    epsilon: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    logits_cap: float
    growth_beta: float
    growth_length: int
    growth_first: int
    grows_unturned: bool
    clip: float
    swiglu_limit: float
    swiglu_alpha: float
    rules: list[Rule]
    ropes: list[RopeFrequencies | None]
    pretrained: int | None
    linears: dict[str, LinearShape]
    kept: str  # of KEPT
    mixture: Mixture | None


class Place(NamedTuple):
    """Of a tensor: what kind its elements are, and the bytes of the file's data that it takes."""

    dtype: str
    begin: int
    end: int


class _Told(msgspec.Struct):
    """What every layout's description has."""

    layout: int


class PackedFile:
    """A packed file: `network`, and the bytes of each tensor by its name.

    shared: it is mapped, and its pages are those of all who map it; else it is read into large
    pages of this process's own, where these are to be had, which takes less time in each step.
    Raises EngineError for a file that is not one, or is of another layout.
    """

    def __init__(self, path: Path, *, shared: bool = True) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if length > min(size - 8, _MOST_HEADER_BYTES):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = json.loads(file.read(length))
                self._data = file.tell()
                told = header.pop("__metadata__")["network"]
                layout = msgspec.json.decode(told, type=_Told).layout
                if layout != LAYOUT:  # before all of it is read
                    raise EngineError(
                        f"{path} is packed in layout {layout}, and this reads {LAYOUT}"
                    )
                own = None if shared else read_into_large_pages(file, size)
                flags = mmap.MAP_SHARED | _POPULATE
                self._bytes = own or mmap.mmap(file.fileno(), size, flags, mmap.PROT_READ)
            self.network = msgspec.json.decode(told, type=Network)
            self._places = {
                name: Place(entry["dtype"], *entry["data_offsets"])
                for name, entry in header.items()
            }
            whole = self._data + max(place.end for place in self._places.values())
            if not all(0 <= place.begin <= place.end for place in self._places.values()):
                raise ValueError("a tensor ends before it begins")
        except (*_NOT_PACKED, msgspec.MsgspecError) as error:
            raise EngineError(f"{path} is no file of packed weights: {error}") from None
        if size < whole:
            raise EngineError(f"{path} has {size} bytes of {whole}; build it again")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def get(self, name: str) -> np.ndarray | None:
        return self[name] if name in self else None

    def __getitem__(self, name: str) -> np.ndarray:
        """uint8 [bytes] of a tensor, as they lie in the file."""
        place = self._places[name]
        begin, end = self._data + place.begin, self._data + place.end
        return np.frombuffer(self._bytes, np.uint8, end - begin, begin)


class PackedWriter:
    """Writes such a file: its tensors one by one, what describes them at the end.

    expected: how many tensors there will be, at most.
    """

    def __init__(self, file: IO[bytes], expected: int) -> None:
        self._file = file
        self._room = -(-(_PER_NETWORK + _PER_TENSOR * expected) // _ALIGNED) * _ALIGNED
        self._header: dict[str, object] = {}
        self._end = 0
        file.seek(self._room)

    def add(self, name: str, dtype: str, values: np.ndarray) -> None:
        """dtype: BF16, F32, I16 or U8, whose bytes values holds."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        padding = -len(data) % _ALIGNED
        end = self._end + len(data) + padding
        count = (end - self._end) // _BYTES[dtype]
        self._header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [self._end, end]}
        self._file.write(data.data)
        self._file.write(bytes(padding))
        self._end = end

    def finish(self, network: Network) -> None:
        metadata = {"format": "enginehouse", "network": msgspec.json.encode(network).decode()}
        header = json.dumps({"__metadata__": metadata, **self._header}).encode()
        assert len(header) + 8 <= self._room
        self._file.seek(0)
        self._file.write((self._room - 8).to_bytes(8, "little") + header.ljust(self._room - 8))


_BYTES = {"BF16": 2, "F32": 4, "I16": 2, "U8": 1}
_PER_NETWORK = 64 << 10  # of the header: frequencies and sizes
_PER_TENSOR = 512  # of the header: a tensor's entry, its linear's and its layer's
