"""TensorRT-LLM's fused tensors taken apart again into those of a Hugging Face checkpoint.

families/architectures.py's tables, read backwards: names, row order, and the shapes and dtypes of
scales as ModelOpt's unified export has them, or compressed-tensors (forms/). Every
value stays what it is but a norm that takes up AWQ's factors, which is rounded once. Knows no file.
Source: nvidia-modelopt 0.47, torch/export; TensorRT-LLM, _torch/modules/linear.py (what it reads);
transformers' FineGrainedFP8Config (block FP8).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.families.output_table import distinct_linears
from enginehouse.build.families.row_orders import reordered, reorders
from enginehouse.build.families.rows import TensorRow
from enginehouse.build.families.shapes import source_shape
from enginehouse.build.forms.block_floats import FP8_BLOCK
from enginehouse.build.forms.compressed_layout import COMPRESSED_QUANTS, compressed
from enginehouse.build.forms.weight_forms import EXPORT_CONFIGS, OutputTensor, is_quantized
from enginehouse.build.plan.expert_layout import check_experts, hf_row, is_stack, stacked
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.config import ModelConfig, QuantConfig
from enginehouse.runtime.errors import PlanError

# The last one, mixed, is of these.
MIXED_FORMS = ("nvfp4", "w4a16_nvfp4", "fp8")
HF_QUANTS = ("none", "fp8", "fp8_rowwise", "int4", "int4_awq", "w4a8_awq", *EXPORT_CONFIGS)

# The last word of a name: TensorRT-LLM's, and Hugging Face's.
_SCALES = {
    "weights_scaling_factor": "weight_scale",
    "per_channel_scale": "weight_scale",
    "activation_scaling_factor": "input_scale",
    "weights_scaling_factor_2": "weight_scale_2",
    "prequant_scaling_factor": "pre_quant_scale",
}
# One number for a whole linear in every form.
_OF_WHOLE = ("activation_scaling_factor", "weights_scaling_factor_2")
# Which norms feed which linears alone; of two for one linear, the second where a model has it.
_FED_BY = {
    "attention.qkv": ("input_layernorm",),
    "mlp.fc": ("post_layernorm", "pre_feedforward_layernorm"),
}


def check_format(
    settings: BuildSettings,
    source: SourceCheckpoint,
    config: ModelConfig,
    quantization: QuantConfig,
) -> None:
    """PlanError for what format=hf has no place for. quantization: of the form that is settled."""
    if settings.tp > 1 or settings.pp > 1:
        raise PlanError(
            f"tp={settings.tp} pp={settings.pp} is of no use with format=hf, whose tensors are "
            "whole: the runtime that loads them cuts them; leave tp and pp out"
        )
    if settings.backend != "torch":
        raise PlanError(
            f"backend={settings.backend} is of no use with format=hf, which makes no engine; "
            "leave backend out"
        )
    if source.engine_config is not None:
        raise PlanError(
            f"{source.name} is a TensorRT-LLM checkpoint, which lacks the config.json of a "
            "Hugging Face one; give the Hugging Face directory it was made of, or format=trtllm"
        )
    if settings.quant not in HF_QUANTS:
        raise PlanError(
            f"quant={settings.quant} has no layout in a Hugging Face checkpoint that the runtimes "
            f"share; choose {', '.join(HF_QUANTS)}, or format=trtllm"
        )
    if settings.layout == "compressed_tensors" and settings.quant not in COMPRESSED_QUANTS:
        raise PlanError(
            f"quant={settings.quant} has no place in compressed-tensors' layout; choose "
            f"layout=modelopt, or quant among {', '.join(COMPRESSED_QUANTS)}"
        )
    check_experts(settings, config)
    _check_mixed(settings)
    mixed = settings.quant == "mixed"
    for quant in settings.mixed_forms.split(",") if mixed else (settings.quant,):
        _check_blocks(quant, config)
    if quantization.has_zero_point:
        raise PlanError(
            f"{source.name} has INT4 zero points, for which the layout of format=hf has no place; "
            "choose format=trtllm"
        )
    if quantization.pre_quant_scale and not _folds_factors(config):
        raise PlanError(
            f"quant={settings.quant} has factors that a norm before a linear takes up, and "
            f"{config.architecture} has no norms that feed one linear alone and have a weight and "
            "no bias; choose quant=int4, fp8 or none"
        )
    if settings.kv_cache_dtype not in ("auto", "fp8"):
        raise PlanError(
            f"kv_cache_dtype={settings.kv_cache_dtype} has no scales in a Hugging Face checkpoint "
            "that the runtimes share; choose kv_cache_dtype=auto, or fp8 with quant=fp8"
        )


def _check_mixed(settings: BuildSettings) -> None:
    """PlanError unless mixed has one limit and forms to choose among, and no other quant has."""
    limits = [settings.effective_bits, settings.max_kl]
    if settings.quant != "mixed":
        if limits != [None, None]:
            raise PlanError("effective_bits and max_kl are of no use without quant=mixed")
        return
    forms = settings.mixed_forms.split(",")
    if limits.count(None) != 1:
        raise PlanError(
            "quant=mixed is chosen by one limit; wanted effective_bits, say 6, or max_kl, say 0.05"
        )
    if not set(forms) <= set(MIXED_FORMS) or len(set(forms)) != len(forms):
        raise PlanError(
            f"mixed_forms={settings.mixed_forms!r}; choose among {', '.join(MIXED_FORMS)}, each "
            "once, separated by commas"
        )


def _check_blocks(quant: str, config: ModelConfig) -> None:
    """PlanError for inputs that the form's blocks do not divide; block FP8's may end early."""
    if quant not in EXPORT_CONFIGS or quant in ("fp8_block", "mixed"):
        return
    size = EXPORT_CONFIGS[quant].group_size
    for name, linear in distinct_linears(config):
        if linear.in_features % size:
            raise PlanError(
                f"quant={quant} has blocks of {size} inputs, which do not divide the "
                f"{linear.in_features} of {name}; choose quant=fp8, fp8_rowwise or fp8_block"
            )


def _folds_factors(config: ModelConfig) -> bool:
    """Whether norms feed the linears whose input factors they take up, and nothing else, and have
    no bias, as most LayerNorms have, which the factors would miss.
    """
    extra = config.extra
    before = extra.get("input_layernorms", True) and extra.get("norm_weights", True)
    alone = config.delta is None and not extra.get("parallel_sublayers")
    return bool(before and alone and not config.layer_norm)


class HfLayout:
    """The way back for one model, uncut: config.mapping is of one GPU."""

    def __init__(
        self, config: ModelConfig, layout: str = "modelopt", scale_dtype: str | None = None
    ) -> None:
        """layout: one of settings.LAYOUTS. scale_dtype: of INT4 scales, where not the model's."""
        assert config.mapping.world_size == 1, config.mapping
        self.config = config
        self.layout = layout
        self._scale_dtype: torch.dtype = getattr(torch, scale_dtype or config.dtype)
        self._rows = {row.target: hf_row(config, row, layout) for row in stage_rows(config, 0)}
        # Linears whose input factors a norm takes up, and that norm.
        self._norms: dict[str, str] = {}
        if config.quantization.pre_quant_scale:
            self._find_norms()

    def _find_norms(self) -> None:
        for target in self._rows:
            prefix, _, module = target.removesuffix(".weight").rpartition(".")
            layer, _, group = prefix.rpartition(".")
            names = _FED_BY.get(f"{group}.{module}", ())
            known = [name for norm in names if (name := f"{layer}.{norm}.weight") in self._rows]
            if known and is_quantized(self.config.quantization, target):
                self._norms[target.removesuffix(".weight")] = known[-1]

    def row(self, target: str) -> TensorRow:
        return self._rows[target]

    def waits_for_factors(self, name: str) -> bool:
        """Whether a tensor is a norm that is written with a linear's factors in it."""
        return name in self._norms.values()

    def norm_of(self, name: str) -> str | None:
        """The norm that takes up this tensor, if it is the factors of q, k, v or of the MLP."""
        module, _, kind = name.rpartition(".")
        return self._norms.get(module) if kind == "prequant_scaling_factor" else None

    def tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The Hugging Face tensors that a whole TensorRT-LLM tensor holds; none for a tied lm_head,
        and none or ones for factors that a norm takes up.

        Views of it where dtype and order allow. Norms that one was added to are not undone.
        """
        parts = self._parts(name, tensor)
        algo, block = self._algo(name), "FP8_PB_WO"
        named: dict[str, Tensor] = {}
        for part, value in parts.items():
            module, _, kind = part.rpartition(".")
            if self.layout == "compressed_tensors":
                named |= compressed(algo, module, kind, value, self._scale_dtype)
            elif algo == block and kind == "weight_scale":
                named[f"{module}.weight_scale_inv"] = value
            else:
                named[part] = value
        return named

    def _algo(self, name: str) -> str | None:
        """The form of the linear that a tensor is of, if it is one's that is quantised."""
        module = name.rpartition(".")[0]
        quantization = self.config.quantization
        target = f"{module}.weight"
        known = target in self._rows and is_quantized(quantization, target)
        return quantization.of(module).quant_algo if known else None

    def _parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """`tensors`, in ModelOpt's names."""
        module, _, kind = name.rpartition(".")
        if kind == "kv_cache_scaling_factor":
            attention = self._rows[f"{module}.dense.weight"].sources[0].rsplit(".", 2)[0]
            scale = tensor.reshape(())
            return {f"{attention}.k_proj.k_scale": scale, f"{attention}.v_proj.v_scale": scale}
        row = self._rows.get(name) or self._rows[f"{module}.weight"]
        if row.target == "lm_head.weight" and self.config.tie_word_embeddings:
            return {}
        if kind in _SCALES:
            return self._scales(row, kind, tensor)
        if name.endswith(("router.weight", "router.bias")):
            tensor = tensor.to(getattr(torch, self.config.dtype))
        result = self._split(row, kind, tensor)
        if self._wants_ones(row, kind):
            (source,) = row.sources
            ones = torch.ones(tensor.shape[1], device=tensor.device)
            dtype: torch.dtype = getattr(torch, self.config.dtype)
            result[_of_module(source, "pre_quant_scale")] = ones.to(dtype)
        return result

    def _wants_ones(self, row: TensorRow, kind: str) -> bool:
        """TensorRT-LLM's loader wants factors for every INT4 linear that it does not fuse."""
        quantization = self.config.quantization
        int4 = quantization.quant_algo == "W4A16_AWQ" and not quantization.pre_quant_scale
        int4 = int4 and self.layout == "modelopt"
        quantised = kind == "weight" and is_quantized(quantization, row.target)
        return int4 and quantised and _is_single(row)

    def _scales(self, row: TensorRow, kind: str, tensor: Tensor) -> dict[str, Tensor]:
        algo, last = self._algo(row.target), _SCALES[kind]
        if algo == "FP8_PB_WO":
            rows = self._split(row, last, tensor)
            return {name: part[:: FP8_BLOCK[0]].contiguous() for name, part in rows.items()}
        if kind == "prequant_scaling_factor":
            if not _is_single(row):
                return {}
            (source,) = row.sources
            own = row.target.removesuffix(".weight") not in self._norms
            return {_of_module(source, last): tensor if own else torch.ones_like(tensor)}
        whole = kind in _OF_WHOLE or algo == "FP8"
        if tensor.numel() == 1 or whole:  # one number for all sources, or for each expert's
            numbers, count = tensor.flatten(), len(row.sources)
            return {
                _of_module(source, last): numbers[i * len(numbers) // count].clone()
                for i, source in enumerate(row.sources)
            }
        return self._split(row, last, tensor if tensor.dtype.itemsize == 1 else tensor.float())

    def _split(self, row: TensorRow, kind: str, tensor: Tensor) -> dict[str, Tensor]:
        """Each source's rows. An INT4 byte holds two rows; no source has an odd number."""
        own = kind == row.target.rpartition(".")[2]
        names = row.sources if own else [_of_module(source, kind) for source in row.sources]
        if is_stack(row):
            return {names[0]: stacked(row.recipe, tensor)}
        if row.recipe == "flat":
            tensor = tensor.view(source_shape(self.config, row.sources[0]))
        if tensor.dtype == torch.int8:
            tensor = tensor.view(torch.uint8)
        if row.recipe == "experts":
            tensor = tensor.flatten(0, 1)
        if reorders(row.recipe):
            tensor = reordered(self.config, row.recipe, tensor, back=True)
        if row.recipe == "qkv_by_heads":
            tensor = tensor.unsqueeze(1)
        rows = [source_shape(self.config, source)[0] for source in row.sources]
        parts = tensor.split([count * len(tensor) // sum(rows) for count in rows])
        return dict(zip(names, parts, strict=True))

    def table(self, engine_table: Mapping[str, OutputTensor]) -> dict[str, OutputTensor]:
        """What the checkpoint holds when TensorRT-LLM's would hold engine_table."""
        table: dict[str, OutputTensor] = {}
        for name, item in engine_table.items():
            dtype: torch.dtype = getattr(torch, item.dtype)
            whole = torch.empty(item.shape, dtype=dtype, device="meta")
            for source, part in self.tensors(name, whole).items():
                word = str(part.dtype).removeprefix("torch.")
                table[source] = OutputTensor(word, tuple(part.shape))
        return table

    def quantized_modules(self) -> dict[str, QuantConfig]:
        """Of MIXED_PRECISION, each module's own form, by its Hugging Face name."""
        quantization = self.config.quantization
        return {
            source.removesuffix(".weight"): own
            for target, own in quantization.quantized_layers
            for source in self._rows[f"{target}.weight"].sources
        }

    def unquantized_modules(self) -> list[str]:
        """Modules with a matrix that stays in the model's dtype, by their Hugging Face names."""
        ends = (self._rows[f"{name}.weight"] for name in ("transformer.vocab_embedding", "lm_head"))
        names = {"lm_head", *(end.sources[0].removesuffix(".weight") for end in ends)}
        for row in self._rows.values():
            is_linear = ".layers." in row.target and row.target.endswith(".weight")
            is_linear = is_linear and "layernorm" not in row.target
            if is_linear and not is_quantized(self.config.quantization, row.target):
                names |= {_module_of(source) for source in row.sources}
        return sorted(names)


def _is_single(row: TensorRow) -> bool:
    """Whether a linear is one in Hugging Face's model too, and shares its input with no other."""
    joined = row.target.endswith((".qkv.weight", ".in_qkvz.weight", ".fc.weight", ".gate.weight"))
    fused = (".qkv_proj.weight", ".in_proj_qkvz.weight")
    fused_before = row.recipe in ("swap_halves", "parted_heads")
    fused_before = fused_before or row.sources[0].endswith(fused)
    return not joined or fused_before


def _module_of(source: str) -> str:
    """The module of a weight; of a stack, which is its module's own, the experts."""
    return source.rpartition(".")[0]


def _of_module(source: str, kind: str) -> str:
    """Another tensor of the module that `source` is a tensor of, or of a stack."""
    module, _, last = source.rpartition(".")
    return f"{module}.{kind}" if last in ("weight", "bias", kind) else f"{source}_{kind}"
