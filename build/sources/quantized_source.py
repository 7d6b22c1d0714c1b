"""A quantised Hugging Face checkpoint as a source: its own integers and scales, one linear at a
time, and the weights they mean for whoever asks by name.

Nothing is quantised again: the engine's form follows from the checkpoint's. This file knows no
bit of a format (quantized_formats.py) and no rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from enginehouse.build.families.architectures import recipe_of, stage_rows
from enginehouse.build.families.row_orders import reordered, reorders
from enginehouse.build.families.rows import Recipe
from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.forms.exclude import excluded_patterns
from enginehouse.build.forms.quantization import check_finite
from enginehouse.build.forms.quantized_linear import (
    QuantizedForm,
    QuantizedLinear,
    join_linears,
    stack_experts,
)
from enginehouse.build.forms.weight_forms import QUANT_CONFIGS
from enginehouse.build.source import TensorInfo, TensorSource
from enginehouse.build.sources.quantized_config import QuantizedLayout
from enginehouse.build.sources.quantized_formats import (
    AwqGemvFormat,
    ModelOptW4A8Format,
)
from enginehouse.build.sources.quantized_rows import Fp8Format, Int8Format
from enginehouse.build.sources.renamed_tensors import RenamedTensors
from enginehouse.runtime.checkpoint.weights import LINEARS
from enginehouse.runtime.config import Mapping as RankMapping
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import CheckpointError

# ModelOpt's names, then compressed-tensors', then AutoFP8's.
_KV_SCALES = (
    "model.layers.{}.self_attn.k_proj.k_scale",
    "model.layers.{}.self_attn.v_proj.v_scale",
    "model.layers.{}.self_attn.k_scale",
    "model.layers.{}.self_attn.v_scale",
    "model.layers.{}.self_attn.k_proj.output_scale",
    "model.layers.{}.self_attn.v_proj.output_scale",
    "model.layers.{}.self_attn.kv_scale",
)


class QuantizedTensors:
    """A checkpoint's tensors with its quantised linears under `MODULE.weight`, dequantised.

    `linear` and `engine_tensors` give what is stored; `read` gives what it means, in float32.
    """

    def __init__(self, stored: TensorSource, layout: QuantizedLayout) -> None:
        self._stored = RenamedTensors(stored, layout.spelt) if layout.spellings else stored
        self._layout = layout

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules that are quantised: `model.layers.0.mlp.up_proj`."""
        ending = "." + self._layout.format.marker
        return frozenset(
            name.removesuffix(ending) for name in self._stored.infos if name.endswith(ending)
        )

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        own = {f"{m}.{name}" for m in self.modules for name in self._layout.format.tensors}
        infos = {name: info for name, info in self._stored.infos.items() if name not in own}
        for name, info in infos.items():
            if name.endswith(".weight") and info.dtype.itemsize == 1:
                self._check_complete(name.removesuffix(".weight"))
        for module in self.modules:
            self._check_complete(module)
            shape = self._layout.format.shape(self._stored.infos, module)
            infos[f"{module}.weight"] = TensorInfo(torch.float32, shape)
            bias = f"{module}.bias"  # AutoGPTQ writes zeros for the biases that a model lacks
            if self._layout.format.name == "GPTQ" and bias in infos:
                if not self._stored.read(bias).any():
                    del infos[bias]
        return infos

    def _check_complete(self, module: str) -> None:
        layout = self._layout
        needed = [layout.format.scale_name(module)]
        needed += [f"{module}.qzeros"] if layout.zero_point and "qzeros" in self._names else []
        needed += [f"{module}.input_scale"] if layout.static_activations else []
        if layout.format.marker == "weight_scale":
            needed.append(f"{module}.weight")
        if layout.zero_point and "weight_zero_point" in self._names:
            needed.append(f"{module}.weight_zero_point")
        for name in needed:
            if name not in self._stored.infos:
                raise CheckpointError(
                    f"tensor {name} is missing from the {layout.format.name} checkpoint; "
                    "download its files again"
                )

    @property
    def _names(self) -> tuple[str, ...]:
        return self._layout.format.tensors

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        if name == module or module not in self.modules:
            return self._stored.read(name, rows)
        weight = self.linear(module).dequantized()
        return weight if rows is None else weight[rows]

    def linear(self, module: str) -> QuantizedLinear:
        """A module as it is stored. QuantizationError for scales or weights that are not finite."""
        linear = self._layout.format.read(self._stored, module)
        check_finite(self._layout.format.scale_name(module), linear.scale)
        check_finite(f"{module}.weight", linear.q)
        if linear.pre_quant_scale is not None:
            check_finite(f"{module}.pre_quant_scale", linear.pre_quant_scale)
        if linear.activation_scale is not None:
            check_finite(f"{module}.input_scale", linear.activation_scale)
        return linear if self._layout.pre_quant_scale else _without_ones(module, linear)

    def form(self, config: ModelConfig) -> QuantizedForm:
        """The engine's form that holds these linears exactly, found from their scales alone.

        Linears that the checkpoint left as they are become exclude_modules. Raises
        CheckpointError for what no engine holds: half a fused linear, experts in most forms.
        """
        linears = engine_linears(config)
        self._check_modules(config)
        excluded = [name for name, modules in linears.items() if self._left_out(modules)]
        quantized = {name: linears[name] for name in linears if name not in excluded}
        if not quantized:
            raise CheckpointError(
                f"config.json says that the linears are quantised as {self._layout.format.name}, "
                "but none is: do config.json and the weights belong together?"
            )
        form = self._form(config, quantized)
        known = form.quantization.exclude_modules or ()
        patterns = (*known, *excluded_patterns(excluded, config))
        return replace(form, quantization=replace(form.quantization, exclude_modules=patterns))

    def _form(self, config: ModelConfig, linears: Mapping[str, tuple[str, ...]]) -> QuantizedForm:
        layout = self._layout
        if isinstance(layout.format, Fp8Format):
            return self._fp8_form(config, linears)
        experts = next((name for name in linears if config.num_experts and ".mlp." in name), None)
        if experts is not None:
            raise CheckpointError(
                f"{linears[experts][0]} is an expert in {layout.format.name}; experts are "
                "read in FP8 only, the one quantised form that is known for a mixture: give the "
                "unquantised checkpoint, or pass --dequantize"
            )
        dtype = str(self._scale_dtype).removeprefix("torch.")
        if isinstance(layout.format, Int8Format):
            return QuantizedForm("int8", QUANT_CONFIGS["int8"], dtype)
        if isinstance(layout.format, ModelOptW4A8Format):
            quantization = replace(QUANT_CONFIGS["w4a8_awq"], group_size=layout.group_size)
            return QuantizedForm("w4a8_awq", quantization, dtype)
        wanted = {module for modules in linears.values() for module in modules}
        prequant = layout.pre_quant_scale and self._has_factors(wanted)
        quantization = replace(
            QUANT_CONFIGS["int4"],
            group_size=layout.group_size,
            has_zero_point=layout.zero_point,
            pre_quant_scale=prequant,
        )
        return QuantizedForm("int4_awq" if prequant else "int4", quantization, dtype)

    def _has_factors(self, modules: Iterable[str]) -> bool:
        infos = self._stored.infos
        return any(f"{module}.pre_quant_scale" in infos for module in modules)

    def _fp8_form(
        self, config: ModelConfig, linears: Mapping[str, tuple[str, ...]]
    ) -> QuantizedForm:
        """fp8 where scales are shared as the engine shares them, else a scale for each row."""
        groups = [group for m in linears.values() for group in _scale_groups(m, config)]
        unshared = next((group for group in groups if not self._share_one_scale(group)), None)
        if self._layout.static_activations and unshared is None:
            return QuantizedForm("fp8", QUANT_CONFIGS["fp8"])
        if config.num_experts:
            what = "the checkpoint scales activations token by token"
            if self._layout.static_activations and unshared is not None:
                what = f"{unshared[0]} has a scale for each row"
                if len(unshared) > 1:
                    what = f"{' and '.join(unshared)} do not share one scale"
            raise CheckpointError(
                f"{what}; a mixture of experts is held in FP8 with static activations and one "
                "scale for q, k, v and for an expert's gate and up: give the unquantised "
                "checkpoint, or pass --dequantize"
            )
        return QuantizedForm("fp8_rowwise", QUANT_CONFIGS["fp8_rowwise"])

    def _left_out(self, modules: Sequence[str]) -> bool:
        """Whether the checkpoint left these as they are; the engine quantises all or none."""
        missing = [module for module in modules if module not in self.modules]
        if missing and len(missing) < len(modules):
            there = next(module for module in modules if module in self.modules)
            raise CheckpointError(
                f"{missing[0]} is not quantised while {there} is; the engine holds the two as one "
                "or runs them as one product: give the unquantised checkpoint, or pass --dequantize"
            )
        return bool(missing)

    def _check_modules(self, config: ModelConfig) -> None:
        known = {name.removesuffix(".weight") for name in expected_shapes(config)}
        for module in sorted(self.modules):
            if module not in known:
                raise CheckpointError(
                    f"{module} is quantised, but is no part of a {config.architecture} as "
                    "config.json describes it: do config.json and the weights belong together?"
                )
            self._layout.format.check(self._stored, module)
            self._check_groups(module)

    def _check_groups(self, module: str) -> None:
        size = self._layout.group_size
        if not size or isinstance(self._layout.format, AwqGemvFormat):  # which checks its own
            return
        infos, form = self._stored.infos, self._layout.format
        out_features, in_features = form.shape(infos, module)
        groups = in_features // size
        across = form.marker == "qweight"  # AutoAWQ and GPTQ: one row for each group
        wanted: dict[str, tuple[int, ...]] = {
            form.scale_name(module): (groups, out_features) if across else (out_features, groups),
            f"{module}.qzeros": (groups, out_features // 8),
            f"{module}.weight_zero_point": (-(-out_features // 8), groups),
            f"{module}.pre_quant_scale": (in_features,),
        }
        for name, shape in wanted.items():
            if name in infos and (infos[name].shape != shape or in_features % size):
                raise CheckpointError(
                    f"{name} has shape {list(infos[name].shape)}; groups of {size} of "
                    f"{in_features} inputs and {out_features} outputs give {list(shape)}: do "
                    "config.json and weights belong together?"
                )
        words = infos[f"{module}.{form.marker}"].dtype
        if form.marker != "weight_scale" and words != torch.int32:
            raise CheckpointError(f"{module}.{form.marker} has dtype {words}; wanted int32")

    def _share_one_scale(self, group: Sequence[str]) -> bool:
        assert isinstance(self._layout.format, Fp8Format)
        scales = [self._layout.format.scale(self._stored, module) for module in group]
        return all(len(scale) == 1 and scale == scales[0] for scale in scales)

    @cached_property
    def _scale_dtype(self) -> torch.dtype:
        """The integers' scales' own dtype, or what the checkpoint says of it; float32 holds
        several.
        """
        if self._layout.scale_dtype is not None:
            return self._layout.scale_dtype
        names = map(self._layout.format.scale_name, self.modules)
        dtypes = {self._stored.infos[name].dtype for name in names}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def kv_scales(self, config: ModelConfig) -> dict[int, float]:
        """Of each layer, the larger of its keys' and its values': the engine has one for both.

        Raises CheckpointError when some layers have them and others not.
        """
        scales: dict[int, float] = {}
        if not self._layout.fp8_kv_cache:
            return scales
        for layer in range(config.num_hidden_layers):
            names = [name.format(layer) for name in _KV_SCALES]
            found = [name for name in names if name in self._stored.infos]
            if found:
                scales[layer] = max(float(self._stored.read(name)) for name in found)
        count = sum(map(config.has_keys, range(config.num_hidden_layers)))
        if scales and len(scales) != count:
            raise CheckpointError(
                f"{len(scales)} of {count} layers have scales for the KV cache; "
                "wanted all or none: download the checkpoint again"
            )
        return scales

    def engine_tensors(self, sources: Sequence[str], config: ModelConfig) -> dict[str, Tensor]:
        """What the engine holds for the linear that these Hugging Face weights make, whole."""
        modules = [name.removesuffix(".weight") for name in sources]
        recipe = recipe_of(config, sources)
        if recipe == "experts":
            groups = _scale_groups(modules, config)
            return stack_experts([self._joined(group, config, recipe) for group in groups])
        return self._joined(modules, config, recipe)

    def _joined(
        self, modules: Sequence[str], config: ModelConfig, recipe: Recipe
    ) -> dict[str, Tensor]:
        linears = [self.linear(module) for module in modules]
        dtype: torch.dtype = getattr(torch, config.dtype)
        has_own = self._layout.group_size or isinstance(self._layout.format, Int8Format)
        scale_dtype = self._scale_dtype if has_own else None

        def in_order(tensor: Tensor) -> Tensor:
            return reordered(config, recipe, tensor) if reorders(recipe) else tensor

        return join_linears(modules, linears, config.quantization, dtype, scale_dtype, in_order)


def _without_ones(module: str, linear: QuantizedLinear) -> QuantizedLinear:
    """The linear without the factors that its checkpoint says to be of no effect."""
    factors = linear.pre_quant_scale
    if factors is not None and not bool((factors == 1).all()):
        raise CheckpointError(
            f"{module}.pre_quant_scale holds other factors than ones, while hf_quant_config.json "
            "says pre_quant_scale=false: do config and weights belong together?"
        )
    return replace(linear, pre_quant_scale=None)


def engine_linears(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The engine's linears, layers counted through the model, and the modules that make each.

    fc and gate, which run as one product, are made of both's.
    """
    rows = stage_rows(replace(config, mapping=RankMapping()), 0)
    linears = {
        row.target.removesuffix(".weight"): tuple(s.removesuffix(".weight") for s in row.sources)
        for row in rows
        if is_decoder_linear(row.target)
    }
    for name in [name for name in linears if name.endswith("mlp.gate")]:
        fc = name.replace("mlp.gate", "mlp.fc")
        linears[name] = linears[fc] = linears[fc] + linears[name]
    return linears


def _scale_groups(modules: Sequence[str], config: ModelConfig) -> list[tuple[str, ...]]:
    """Modules that have one FP8 scale in the engine: q, k, v; gate and up, of each expert."""
    count = config.num_experts if ".experts." in modules[0] else 1
    size = len(modules) // count
    return [tuple(modules[i * size : (i + 1) * size]) for i in range(count)]


def is_decoder_linear(target: str) -> bool:
    """Whether an engine's tensor is a linear's weight inside a decoder layer."""
    *_, module, kind = target.split(".")
    return kind == "weight" and module in LINEARS
