"""What stays unquantised -> the checkpoint's exclude_modules: the user's patterns, checked against
the model's modules, or the linears that a source left as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from enginehouse.build.forms.weight_forms import is_quantized
from enginehouse.runtime.config import Mapping, ModelConfig, QuantConfig
from enginehouse.runtime.errors import CheckpointError, PlanError


def with_excluded(
    patterns: str, modules: Iterable[str], quantization: QuantConfig, whole_experts: bool = False
) -> QuantConfig:
    """`quantization` with the patterns (separated by commas) after its own.

    modules: every module's name as TensorRT-LLM has it; layers count from 0 in each pipeline
    stage. It runs fc and gate as one product, and its W8A16 loader quantises every decoder linear
    by name: patterns that contradict this are refused, as is one that matches nothing.
    whole_experts: for runtimes that know one form for all linears of a layer's experts.
    """
    modules = list(modules)
    asked = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in asked:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise PlanError(
                f"exclude: {pattern!r} matches no module; they are named "
                "transformer.layers.0.attention.qkv, .attention.dense, .mlp.fc, .mlp.gate, "
                ".mlp.proj, lm_head: write, say, *mlp.proj or *layers.0.*"
            )
    known = quantization.exclude_modules or ()
    result = replace(quantization, exclude_modules=tuple(dict.fromkeys((*known, *asked))))
    linears = {module for module in modules if is_quantized(quantization, f"{module}.weight")}
    for module in sorted(module for module in linears if result.excludes(module)):
        if quantization.quant_algo == "W8A16":
            raise PlanError(
                f"exclude: {module} cannot be left out of int8: TensorRT-LLM's loader quantises "
                "every linear of a decoder layer by its name; choose another quant"
            )
        for one, other in (("mlp.fc", "mlp.gate"), ("mlp.gate", "mlp.fc")):
            pair = module.replace(one, other)
            if module.endswith(one) and pair in linears and not result.excludes(pair):
                raise PlanError(
                    f"exclude: {module} without {pair}; they run as one product: exclude both"
                )
    if whole_experts:
        _check_experts(modules, linears, result)
    return result


def _check_experts(modules: list[str], linears: set[str], result: QuantConfig) -> None:
    """vLLM, SGLang and TensorRT-LLM from 1.3 on give a layer's experts one quantisation method."""
    for layer in (name.removesuffix("router") for name in modules if name.endswith("mlp.router")):
        experts = [name for name in (f"{layer}fc", f"{layer}proj") if name in linears]
        kept = [name for name in experts if not result.excludes(name)]
        if kept and len(kept) < len(experts):
            [out] = set(experts) - set(kept)
            raise PlanError(
                f"exclude: {out} without {kept[0]}; what loads a checkpoint of format=hf knows one "
                "form for all experts of a layer: exclude both"
            )


def excluded_patterns(modules: Iterable[str], config: ModelConfig) -> tuple[str, ...]:
    """The patterns that exclude exactly these linears of a source, at the config's pp.

    modules: `transformer.layers.7.mlp.proj`, 7 counted through the model. A pattern knows a layer
    by its number in its stage, and holds for every stage.

    Raises CheckpointError where stages would differ, with the pp sizes that work.
    """
    layers_of: dict[str, set[int]] = {}
    for name in modules:
        _, _, layer, module = name.split(".", 3)
        layers_of.setdefault(module, set()).add(int(layer))
    count, patterns = config.num_hidden_layers, []
    for module, layers in sorted(layers_of.items()):
        local = _local_layers(layers, config.mapping, count)
        if len(layers) == count:
            patterns.append(f"*{module}")
        elif local is not None:
            patterns += [f"transformer.layers.{layer}.{module}" for layer in sorted(local)]
        else:
            legal = [
                pp
                for pp in range(1, count + 1)
                if all(
                    len(found) == count or _local_layers(found, Mapping(1, pp), count) is not None
                    for found in layers_of.values()
                )
            ]
            raise CheckpointError(
                f"{module} of layers {', '.join(map(str, sorted(layers)))} is not quantised, which "
                f"pp={config.mapping.pp_size} cannot express: TensorRT-LLM counts layers from 0 in "
                f"each stage; choose pp in {', '.join(map(str, legal))}"
            )
    return tuple(patterns)


def _local_layers(layers: Collection[int], mapping: Mapping, count: int) -> set[int] | None:
    """Their numbers within a stage; None where one is meant in some stages and not in others."""
    stages = [mapping.layers(pp_rank, count) for pp_rank in range(mapping.pp_size)]
    local = {layer - stage.start for stage in stages for layer in stage if layer in layers}
    reached = {stage.start + number for stage in stages for number in local if number < len(stage)}
    return local if reached == set(layers) else None
