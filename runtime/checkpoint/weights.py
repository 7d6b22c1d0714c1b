"""The rank files of an engine as one model: every tensor merged over the ranks that share it.

The exact inverse of the conversion's cuts, so a checkpoint made for four GPUs can be run, and
checked, in one process. Reads one layer at a time. What a GPU's loader would do to a rank's
weights before they are used (W8A16) is done here, to each rank's, before they are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from enginehouse.runtime.checkpoint.packing import quantize_int8
from enginehouse.runtime.checkpoint.sharding import Cut, config_of, merge_tensors, tensor_cut
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError

_LAYERS = "transformer.layers."
# Beginnings of what stands before the layers; what stands behind them begins otherwise.
_FIRST = tuple(
    f"transformer.{word}" for word in ("vocab_embedding", "per_layer", "stream_projections")
)
# Words of decoder linears that forms quantise.
LINEARS = ("qkv", "q", "q_a", "q_b", "kv_a", "in_qkvz", "dense", "fc", "gate", "proj")
_PER_EXPERT = ("weight", "weights_scaling_factor", "per_channel_scale", "bias")


def module_tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of one module by their last word: {"weight": ..., "weights_scaling_factor": ...}."""
    prefix = name + "."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def expert_tensors(module: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """One expert's of a mixture's module; what all share (the activation scale) stays whole."""
    return {key: t[index] if key in _PER_EXPERT else t for key, t in module.items()}


class CheckpointWeights:
    """Merged tensors of a TensorRT-LLM checkpoint folder, by global layer."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.config = config
        self._ranks = []
        for rank in range(config.mapping.world_size):
            path = directory / f"rank{rank}.safetensors"
            try:
                self._ranks.append(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise EngineError(f"{path} cannot be read: {error}; build it again") from None
        self._names = [list(file.keys()) for file in self._ranks]

    def __call__(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, keyed by the rest.

        prefix: `transformer.layers.7.` (7 counts over the whole model), `lm_head.`, ...
        """
        pp_rank, local = self._locate(prefix)
        mapping = self.config.mapping
        ranks = [mapping.rank(pp_rank, tp_rank) for tp_rank in range(mapping.tp_size)]
        names = [name for name in self._names[ranks[0]] if name.startswith(local)]
        if not names and not self._has_nothing(prefix):
            raise EngineError(
                f"rank{ranks[0]}.safetensors holds no tensor {prefix}*; build it again"
            )
        tensors: dict[str, Tensor] = {}
        for name in names:
            parts, config = self._parts(name, ranks), config_of(name, self.config, pp_rank)
            if self._quantised_at_load(name, parts[0]):
                tensors |= self._merged_int8(name, parts, config)
            else:
                tensors[name] = merge_tensors(name, parts, config)
        return {name[len(local) :]: tensor for name, tensor in tensors.items()}

    def _has_nothing(self, prefix: str) -> bool:
        """Whether a prefix is of a layer without attention and without MLP."""
        if not prefix.startswith(_LAYERS):
            return False
        layer = int(prefix[len(_LAYERS) :].partition(".")[0])
        return not (self.config.has_attention(layer) or self.config.has_mlp(layer))

    def kv_scales(self) -> list[float]:
        """The multiplier of each layer's keys and values; 1 where they are not quantised."""
        layers = range(self.config.num_hidden_layers)
        if self.config.quantization.kv_cache_quant_algo is None:
            return [1.0 for _ in layers]
        return [self._kv_scale(layer) if self.config.has_keys(layer) else 1.0 for layer in layers]

    def _kv_scale(self, layer: int) -> float:
        return float(self(f"{_LAYERS}{layer}.attention.kv_cache_scaling_factor")[""])

    def _parts(self, name: str, ranks: list[int]) -> list[Tensor]:
        try:
            return [self._ranks[rank].get_tensor(name) for rank in ranks]
        except SafetensorError as error:
            raise EngineError(
                f"{name} is not in every rank file: {error}; build it again"
            ) from None

    def _quantised_at_load(self, name: str, tensor: Tensor) -> bool:
        """Whether TensorRT-LLM's loader makes int8 of this tensor: a decoder linear under W8A16."""
        if self.config.quantization.quant_algo != "W8A16" or not name.startswith(_LAYERS):
            return False
        module, _, parameter = name.rpartition(".")
        linear = module.rpartition(".")[2] in LINEARS and parameter == "weight"
        left_out = self.config.quantization.excludes(module)
        return linear and tensor.dtype != torch.int8 and not left_out

    def _merged_int8(
        self, name: str, parts: list[Tensor], config: ModelConfig
    ) -> dict[str, Tensor]:
        """int8 weight [out, in] and its per_channel_scale: [out], or [out, tp] where the inputs
        are cut, as each rank then has its own scale for every output.
        """
        scale_name = name.removesuffix("weight") + "per_channel_scale"
        quantised = [quantize_int8(part) for part in parts]
        weight = merge_tensors(name, [part.q for part in quantised], config)
        scales = [part.scale for part in quantised]
        if tensor_cut(name, 2) is Cut.COLUMNS:
            scale = torch.stack(scales, dim=1)
        else:
            scale = merge_tensors(scale_name, scales, config)
        return {name: weight, scale_name: scale}

    def _locate(self, prefix: str) -> tuple[int, str]:
        """The pipeline stage that holds a prefix, and the prefix with its local layer index."""
        mapping = self.config.mapping
        if not prefix.startswith(_LAYERS):
            first = prefix.startswith(_FIRST)
            return (0 if first else mapping.pp_size - 1), prefix
        index, _, rest = prefix[len(_LAYERS) :].partition(".")
        for pp_rank in range(mapping.pp_size):
            layers = mapping.layers(pp_rank, self.config.num_hidden_layers)
            if int(index) in layers:
                return pp_rank, f"{_LAYERS}{int(index) - layers.start}.{rest}"
        raise EngineError(f"{prefix}: the model has {self.config.num_hidden_layers} layers")
