"""What a TensorRT plan is fed with besides tokens: weights, rotary tables, and the sizes of caches.

Weights are inputs of the plan, one for each tensor of a rank file and under its name; here a rank
file's tensors take the layouts that TensorRT wants, and go to the GPU. Where the plans hold them,
they stay on the disk. Knows no TensorRT.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from enginehouse.runtime.checkpoint.packing import quantize_int8
from enginehouse.runtime.checkpoint.rope import Rotary, RotaryTable
from enginehouse.runtime.checkpoint.sharding import kv_heads_of_rank
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.machine.device import to_device
from enginehouse.runtime.tensorrt.manifest import Built, PlanRecord

_LAYER = re.compile(r"(transformer\.layers\.|(?:past|present)_(?:key|value)_)(\d+)")
_LINEARS = ("qkv", "q", "q_a", "q_b", "kv_a", "dense", "fc", "gate", "proj")


def weight_form(module: str, dtype: str, parameters: Collection[str], algo: str | None) -> str:
    """How a module's weight is multiplied: dense, int4, int8, fp8 or fp8_rowwise.

    dtype: of the weight in the rank file, by torch's name; parameters: what else the module has.
    """
    if dtype == "float8_e4m3fn":
        return "fp8_rowwise" if "per_channel_scale" in parameters else "fp8"
    if dtype == "int8":
        return "int4"
    linear = ".layers." in module and module.rpartition(".")[2] in _LINEARS
    return "int8" if algo == "W8A16" and linear else "dense"


def shift_layer(name: str, by: int) -> str:
    """The name of a weight or a cache with `by` added to its layer; others as they are.

    A plan of some of the layers counts its own from 0: with by = its first layer, an input's name
    becomes the checkpoint's, and past_key_0 the model's past_key_N.
    """
    return _LAYER.sub(lambda found: f"{found[1]}{int(found[2]) + by}", name, count=1)


def layer_of(name: str) -> int | None:
    """The layer that a weight or a cache is of, None for embedding, head and other inputs."""
    found = _LAYER.match(name)
    return None if found is None else int(found[2])


def transpose_int4(packed: Tensor) -> Tensor:
    """The checkpoint's nibbles as TensorRT reads an INT4 matrix: uint8 [in, out // 2].

    packed: int8 [out // 2, in], the even output in the low nibble. TensorRT's [in, out] keeps two
    neighbours of a row in a byte, the even one low: the same bytes, transposed.
    """
    return packed.view(torch.uint8).T.contiguous()


def bound_weights(
    config: ModelConfig, tensors: Mapping[str, Tensor], rank: int
) -> dict[str, Tensor]:
    """A rank's tensors as network inputs, by name; INT4 as uint8 with two values in a byte.

    Each is of the model's dtype but for float8, INT4, INT8, the float32 scales of float8 and a
    mixture's router, which is float32 too. Of a norm over all heads, which a rank file has whole,
    it is the rank's own heads'. Experts lie side by side (`_side_by_side`).
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    parameters: dict[str, list[str]] = {}
    for name in tensors:
        module, _, parameter = name.rpartition(".")
        parameters.setdefault(module, []).append(parameter)
    bound: dict[str, Tensor] = {}
    for module, names in parameters.items():
        weight = tensors.get(f"{module}.weight")
        if weight is None:  # attention's sinks
            bound |= {f"{module}.{name}": tensors[f"{module}.{name}"].to(dtype) for name in names}
            continue
        kind = str(weight.dtype).removeprefix("torch.")
        form = weight_form(module, kind, names, config.quantization.quant_algo)
        mine = {name: tensors[f"{module}.{name}"] for name in names}
        if weight.ndim == 3:
            mine = _side_by_side(module, mine)
        elif form == "int4":
            mine["weight"] = transpose_int4(weight)
            mine["weights_scaling_factor"] = mine["weights_scaling_factor"].T
        elif form == "int8":
            mine["weight"], mine["per_channel_scale"] = quantize_int8(weight)
        elif form == "fp8":  # one number each
            for name in ("activation_scaling_factor", "weights_scaling_factor"):
                mine[name] = mine[name].view(())
        elif (heads := _heads_normed(config, module, rank)) is not None:
            mine["weight"] = weight.view(-1, config.head_size)[heads.start : heads.stop].flatten()
        for name, tensor in mine.items():
            kept = form.startswith("fp8") and name != "bias"
            kept = kept or module.endswith(".mlp.router")
            kept = kept or (form in ("int4", "int8") and name == "weight")
            bound[f"{module}.{name}"] = (tensor if kept else tensor.to(dtype)).contiguous()
    return bound


def _side_by_side(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All experts of a layer as one matrix: of mlp.fc [experts * out, in], of mlp.proj
    [out, experts * in]. Biases are [experts * out] and [experts, out].

    FP8: mlp.fc has a scale for each row; mlp.proj the largest of its experts', and as
    `expert_scales` [experts] what each is of it.
    """
    weight = tensors["weight"]
    out = weight.shape[1]
    is_fc = module.endswith(".fc")
    made = {"weight": weight.flatten(0, 1) if is_fc else weight.transpose(0, 1).flatten(1)}
    if "bias" in tensors:
        made["bias"] = tensors["bias"].flatten() if is_fc else tensors["bias"]
    if "weights_scaling_factor" in tensors:
        scales = tensors["weights_scaling_factor"].flatten()
        made["activation_scaling_factor"] = tensors["activation_scaling_factor"].view(())
        made["weights_scaling_factor"] = scales.repeat_interleave(out) if is_fc else scales.max()
        if not is_fc:
            made["expert_scales"] = scales / scales.max()
    return made


def _heads_normed(config: ModelConfig, module: str, rank: int) -> range | None:
    """The rank's heads of a norm over all of the model's, None of another module."""
    kind = module.rpartition(".")[2]
    if kind not in ("q_layernorm", "k_layernorm") or not traits_of(config).norm_all_heads:
        return None
    if kind == "k_layernorm":
        return kv_heads_of_rank(config, rank)
    count = config.num_attention_heads // config.mapping.tp_size
    return range(rank * count, (rank + 1) * count)


def cache_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """A rank's caches by the model's names, in their order: how many heads each has, and their
    size. A layer that does not attend has none, and latents are kept once.
    """
    size = max(1, config.num_key_value_heads // config.mapping.tp_size), config.head_size
    layers = [i for i in range(config.num_hidden_layers) if config.has_attention(i)]
    sides = ("key", "value") if config.latent is None else ("key",)
    return {f"past_{side}_{layer}": size for layer in layers for side in sides}


class RotaryInputs:
    """The rotary tables of an engine, and which of their rows turns a token.

    tables: `rotary.cos` and `rotary.sin`, float32 [rows, rotary_dim // 2]; Gemma 3's local base
    adds `rotary_local.*`. Row p turns position p. longrope beyond its pretrained length P has
    max_positions rows of its long factors and then P of its short ones.
    """

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        rotary = Rotary(config, max_positions)
        self.max_positions = max_positions
        self.pretrained = rotary.pretrained
        cos_sin = _halves(rotary.tables[0])
        if rotary.short is not None:
            pairs = zip(cos_sin, _halves(rotary.short), strict=True)
            cos_sin = [torch.cat(pair) for pair in pairs]
        named = [("rotary", cos_sin)]
        if len(rotary.tables) > 1:
            named.append(("rotary_local", _halves(rotary.tables[1])))
        self.tables = {
            f"{name}.{part}": table
            for name, parts in named
            for part, table in zip(("cos", "sin"), parts, strict=True)
        }

    def rows(self, positions: Tensor, contexts: Tensor) -> Tensor:
        """The input `rotary_ids` for positions [B, T]: int32, the same shape.

        contexts: int64 [B, 1], how long each sequence is by now.
        """
        if self.pretrained is None:
            return positions.to(torch.int32)
        short = positions.clamp(max=self.pretrained - 1) + self.max_positions
        return torch.where(contexts <= self.pretrained, short, positions).to(torch.int32)


def _halves(table: RotaryTable) -> list[Tensor]:
    """cos and sin of one element of each pair; the table's second halves have the plain signs."""
    half = table.cos.shape[-1] // 2
    return [part[:, 0, half:].contiguous() for part in (table.cos, table.sin)]


def fixed_inputs(
    engine: Engine, built: Built, plans: Sequence[PlanRecord], rank: int, device: torch.device
) -> dict[str, Tensor]:
    """By the model's names, for all of the plans, which rise in their contexts. Raises EngineError
    when the rank file cannot be read.
    """
    config = engine.config
    found: dict[str, Tensor] = {}
    if not built.baked:
        found |= _read_weights(engine, rank, device)
        rotary = RotaryInputs(config, plans[0].max_positions)
        found |= {name: table.to(device) for name, table in rotary.tables.items()}
    found["kv_positions"] = to_device(torch.arange(plans[-1].context, dtype=torch.int32), device)
    rows = config.padded_vocab_size() // config.mapping.tp_size
    found["vocab_start"] = to_device(torch.tensor([rank * rows], dtype=torch.int32), device)
    return found


def _read_weights(engine: Engine, rank: int, device: torch.device) -> dict[str, Tensor]:
    """A rank file's, one module of it at a time."""
    path, config = engine.rank_file(rank), engine.config
    bound: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for names in _modules(list(file.keys())):
                tensors = {name: file.get_tensor(name).to(device) for name in names}
                bound |= bound_weights(config, tensors, rank)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{path} cannot be read: {error}; build it again") from None
    head, embedding = "lm_head.weight", "transformer.vocab_embedding.weight"
    if config.tie_word_embeddings and torch.equal(bound[head], bound[embedding]):
        bound[head] = bound[embedding]  # one copy in memory
    return bound


def _modules(names: list[str]) -> Iterator[list[str]]:
    """A rank file's names, those of a module together."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    yield from modules.values()
