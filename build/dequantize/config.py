"""A checkpoint's `quantization_config` -> the stored form of each of its modules.

Everything that can be read, whether or not an engine could hold it. Knows the keys that quantisers
write; reads no tensor.
Source: as quantized_config.py; GPTQModel's `dynamic`, AutoRound's `extra_config`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from enginehouse.build.dequantize.base import Layout, StoredForm, one_form
from enginehouse.build.dequantize.bitsandbytes import RowInt8Form, TableForm
from enginehouse.build.dequantize.fp8 import Fp8Form
from enginehouse.build.dequantize.hqq import HqqForm
from enginehouse.build.dequantize.integers import (
    AwqForm,
    GptqForm,
    Int8Form,
    ModelOptInt4Form,
    PackedForm,
)
from enginehouse.build.dequantize.small_floats import SmallFloatForm, StackedMxfp4Form
from enginehouse.build.dequantize.stacks import with_stacks
from enginehouse.build.forms.block_floats import FP8_BLOCK
from enginehouse.build.sources.quantized_config import (
    AUTOROUND_GPTQ,
    FP8_SPELLINGS,
    json_object,
    modelopt_group_size,
    refused,
    respelt,
)
from enginehouse.runtime.errors import CheckpointError

READABLE = (
    "AutoAWQ (gemm, gemv), GPTQ (2 to 8 bits), AutoRound (as either, MXFP4, MXFP8, NVFP4), "
    "compressed-tensors (FP8, NVFP4, MXFP4, MXFP8, packed integers, INT8), ModelOpt (FP8, NVFP4, "
    "MXFP8, INT4 AWQ, MIXED_PRECISION), fp8 (a scale for each tensor or block), fbgemm_fp8, "
    "mxfp4, bitsandbytes, HQQ and Quark (FP8, MXFP4)"
)
_BITS = range(2, 9)
_NO_ROTATIONS = "none: rotations are no part of the weights"
_NOTHING = re.compile(r"(?!)")
_NAME = frozenset(string.ascii_letters + string.digits + "._-")  # of a name that is no pattern
Config = Mapping[str, Any]

_NVFP4 = SmallFloatForm("NVFP4", 16, whole=".weight_scale_2")
_MODELOPT_FLOATS = {
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8"), _NVFP4),
    "MXFP8": SmallFloatForm("MXFP8", 32, in_bytes=True),
    "W4A8_MXFP4_FP8": SmallFloatForm("MXFP4", 32),
}
_PACKED: dict[str, Any] = {"stored": ".weight_packed", "marker": ".weight_packed"}
_COMPRESSED_FLOATS = {
    "nvfp4-pack-quantized": SmallFloatForm(
        "NVFP4", 16, whole=".weight_global_scale", divides=True, **_PACKED
    ),
    "mxfp4-pack-quantized": SmallFloatForm("MXFP4", 32, **_PACKED),
    "mxfp8-quantized": SmallFloatForm("MXFP8", 32, in_bytes=True),
}

# AutoRound's packers of floats write what compressed-tensors does.
_AUTOROUND_FLOATS = {
    ("mx_fp", 4): _COMPRESSED_FLOATS["mxfp4-pack-quantized"],
    ("mx_fp", 8): _COMPRESSED_FLOATS["mxfp8-quantized"],
    ("nv_fp", 4): _COMPRESSED_FLOATS["nvfp4-pack-quantized"],
}


def read_stored_layout(config: Config) -> Layout:
    """What each module of the checkpoint is stored as, to be dequantised.

    Raises CheckpointError, with the reason, for a method or a variant that is not read.
    """
    method = str(config.get("quant_method", "")).lower()
    readers: dict[str, Callable[[Config], Layout]] = {
        "awq": _awq,
        "gptq": _gptq,
        "gptqmodel": _gptq,
        "auto-round": _autoround,
        "intel/auto-round": _autoround,
        "compressed-tensors": _compressed_tensors,
        "modelopt": lambda config: with_stacks(_modelopt(config)),
        "fp8": _fp8,
        "fbgemm_fp8": lambda config: one_form(Fp8Form()),
        "bitsandbytes": _bitsandbytes,
        "hqq": lambda config: one_form(HqqForm()),
        "quark": _quark,
        "mxfp4": lambda config: one_form(StackedMxfp4Form()),
    }
    if method not in readers:
        raise CheckpointError(
            f"config.json has quantization_config with quant_method={config.get('quant_method')!r}"
            f"; --dequantize reads {READABLE}"
        )
    return readers[method](config)


def _group_size(what: str, found: Any) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or (found < 1 and found != -1):
        raise refused(what, "group_size", found, "a number of inputs, or -1 for all of them")
    return found


def _awq(config: Config) -> Layout:
    what = "an AutoAWQ checkpoint"
    bits, version = config.get("bits", config.get("w_bit")), config.get("version", "gemm")
    if bits != 4:
        raise refused(what, "bits", bits, "4")
    if str(version).lower() not in ("gemm", "gemv"):
        raise refused(what, "version", version, "'gemm' or 'gemv'")
    group_size = _group_size(what, config.get("group_size", config.get("q_group_size")))
    symmetric = not config.get("zero_point", True)
    return one_form(AwqForm(group_size, symmetric, gemv=str(version).lower() == "gemv"))


def _gptq(config: Config) -> Layout:
    what = "a GPTQ checkpoint"
    key = "checkpoint_format" if "checkpoint_format" in config else "format"
    stored = config.get(key, "gptq")
    if config.get("is_marlin_format") or stored not in ("gptq", "gptq_v2"):
        key = "is_marlin_format" if config.get("is_marlin_format") else key
        raise refused(what, key, config[key], "the words that GPTQ itself stores: gptq or gptq_v2")

    def form(settings: Config) -> StoredForm:
        return _gptq_form(what, settings, 1 if stored == "gptq" else 0)

    return _by_module(form, config, "dynamic")


def _gptq_form(what: str, settings: Config, stored_zero: int) -> GptqForm:
    bits = settings.get("bits")
    if not isinstance(bits, int) or bits not in _BITS:
        raise refused(what, "bits", bits, "2 to 8")
    group_size = _group_size(what, settings.get("group_size"))
    symmetric = bool(settings.get("sym", True))
    name = f"GPTQ of {bits} bits"
    return GptqForm(bits, group_size, symmetric, stored_zero, name)


def _autoround(config: Config) -> Layout:
    what = "an AutoRound checkpoint"
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round:gptq")
    first = packing.partition(":")[2].partition(":")[0]
    if config.get("rotation_config"):
        raise refused(what, "rotation_config", config["rotation_config"], _NO_ROTATIONS)
    is_awq = first in ("auto_awq", "awq")

    def form(settings: Config) -> StoredForm:
        kind, bits = settings.get("data_type") or "int", settings.get("bits")
        floats = [_AUTOROUND_FLOATS[word] for word in _AUTOROUND_FLOATS if word == (kind, bits)]
        if floats:
            return floats[0]
        if kind != "int":
            known = ", ".join(sorted({word for word, _ in _AUTOROUND_FLOATS}))
            raise refused(what, "data_type", kind, f"'int', or {known} of 4 or 8 bits")
        if not is_awq and (not packing.startswith("auto") or first not in AUTOROUND_GPTQ):
            wanted = "'auto_round:auto_gptq' or 'auto_round:auto_awq'"
            raise refused(what, "packing_format", packing, wanted)
        if not is_awq:
            return _gptq_form(what, settings, AUTOROUND_GPTQ[first])
        if bits != 4:
            raise refused(what, "bits", bits, "4, packed as AutoAWQ does")
        size = _group_size(what, settings.get("group_size"))
        return AwqForm(size, bool(settings.get("sym", True)))

    return _by_module(form, config, "extra_config")


def _by_module(form: Callable[[Config], StoredForm], config: Config, key: str) -> Layout:
    """The config's form, and another for the modules that have settings of their own."""
    own = {
        str(name).removeprefix("+:"): settings
        for name, settings in json_object("a checkpoint", key, config.get(key)).items()
        if isinstance(settings, dict) and not str(name).startswith("-:")
    }
    quantised = {name: s for name, s in own.items() if not _is_whole(s.get("bits"))}
    usual = form(config)
    others = {name: form({**config, **settings}) for name, settings in quantised.items()}

    patterns = [(_pattern(name), form) for name, form in others.items() if set(name) - _NAME]

    def form_of(module: str) -> StoredForm:
        if module in others:
            return others[module]
        return next((form for pattern, form in patterns if pattern.fullmatch(module)), usual)

    forms = tuple({usual, *others.values()})
    names = sorted({each.name for each in forms})
    return Layout(" and ".join(names), forms, form_of)


def _is_whole(bits: Any) -> bool:
    """Whether a module's own bits say that it is not quantised."""
    return isinstance(bits, int) and bits >= 16


def _pattern(text: str) -> re.Pattern[str]:
    """Of a module's name; where it is no regular expression it names nothing."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return _NOTHING


def _fp8(config: Config) -> Layout:
    """DeepSeek's and Qwen's blocks; AutoFP8's, vLLM's and transformers' one for each tensor."""
    what, size = "an fp8 checkpoint", config.get("weight_block_size")
    return one_form(_fp8_form(what, "weight_block_size", size), respelt(FP8_SPELLINGS))


def _fp8_form(what: str, key: str, block: Any) -> Fp8Form:
    if not block:
        return Fp8Form()
    if not isinstance(block, list) or len(block) != 2 or not all(_is_size(n) for n in block):
        raise refused(what, key, block, "two numbers, of rows and of columns")
    rows, columns = block
    return Fp8Form((rows, columns), f"FP8 in blocks of {rows} x {columns}")


def _is_size(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found > 0


def _bitsandbytes(config: Config) -> Layout:
    what, kind = "a bitsandbytes checkpoint", config.get("bnb_4bit_quant_type", "fp4")
    if config.get("load_in_8bit"):
        return one_form(RowInt8Form())
    if not config.get("load_in_4bit"):
        raise refused(what, "load_in_4bit", config.get("load_in_4bit"), "it or load_in_8bit true")
    if kind not in ("nf4", "fp4"):
        raise refused(what, "bnb_4bit_quant_type", kind, "'nf4' or 'fp4'")
    return one_form(TableForm(kind, f"bitsandbytes {kind.upper()}"))


def _compressed_tensors(config: Config) -> Layout:
    what = "a compressed-tensors checkpoint"
    groups = json_object(what, "config_groups", config.get("config_groups"))
    if config.get("transform_config"):
        raise refused(what, "transform_config", config["transform_config"], _NO_ROTATIONS)
    forms: list[tuple[list[str], StoredForm]] = []
    patterns: list[tuple[re.Pattern[str], StoredForm]] = []
    for name, group in groups.items():
        scheme = json_object(what, f"config_groups[{name!r}]", group)
        stored = str(scheme.get("format") or config.get("format"))
        weights = json_object(what, "weights", scheme.get("weights"))
        listed = scheme.get("targets")
        targets = [str(target) for target in listed] if isinstance(listed, list) else []
        form = _compressed_form(what, weights, stored)
        forms.append((targets, form))
        regular = [target[3:] for target in targets if target.startswith("re:")]
        patterns += [(_pattern(target), form) for target in regular]
    if not forms:
        raise refused(what, "config_groups", groups, "a scheme")
    named = {target: form for targets, form in forms for target in targets}
    usual = named.get("Linear", forms[0][1])

    def form_of(module: str) -> StoredForm:
        if module in named:
            return named[module]
        return next((form for pattern, form in patterns if pattern.match(module)), usual)

    unique = tuple({form for _, form in forms})
    return Layout(" and ".join(sorted({form.name for form in unique})), unique, form_of)


def _compressed_form(what: str, weights: Config, stored: str) -> StoredForm:
    kind, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
    symmetric = bool(weights.get("symmetric", True))
    if kind == "float" and bits == 8 and strategy in ("tensor", "channel"):
        return Fp8Form()
    if kind == "float" and bits == 8 and strategy == "block":
        return _fp8_form(what, "block_structure", weights.get("block_structure"))
    if stored in _COMPRESSED_FLOATS:
        return _COMPRESSED_FLOATS[stored]
    if kind == "int" and strategy in ("tensor", "channel", "group"):
        size = weights.get("group_size") if strategy == "group" else -1
        group_size = _group_size(what, size)
        if stored == "pack-quantized" and _is_size(bits) and bits in (2, 4, 8):
            name = f"compressed-tensors' packed integers of {bits} bits"
            return PackedForm(bits, group_size, symmetric, name)
        if stored in ("int-quantized", "naive-quantized") and bits == 8:
            return Int8Form(group_size, symmetric)
    scheme = f"{kind} {bits} bit, {strategy}, {stored}"
    wanted = "FP8 with a scale for each tensor, channel or block, or integers of 4 or 8 bits"
    raise refused(what, "weights", scheme, wanted)


def _quark(config: Config) -> Layout:
    """One scheme for all, or others for modules by patterns of their names."""
    what, key = "a Quark checkpoint", "global_quant_config"
    usual = _quark_form(what, json_object(what, key, config.get(key)))
    key = "layer_quant_config"
    own = [
        (str(pattern), _quark_form(what, json_object(what, f"{key}[{pattern!r}]", scheme)))
        for pattern, scheme in json_object(what, key, config.get(key)).items()
    ]

    def form_of(module: str) -> StoredForm:
        return next((form for pattern, form in own if fnmatchcase(module, pattern)), usual)

    forms = tuple({usual, *(form for _, form in own)})
    return Layout(" and ".join(sorted({form.name for form in forms})), forms, form_of)


def _quark_form(what: str, scheme: Config) -> StoredForm:
    weight = json_object(what, "weight", scheme.get("weight"))
    kind, reach = weight.get("dtype"), weight.get("qscheme")
    if kind == "fp8_e4m3" and reach in ("per_tensor", "per_channel"):
        return Fp8Form()
    size, scale = weight.get("group_size"), weight.get("scale_format")
    if (kind, reach, size, scale) == ("fp4", "per_group", 32, "e8m0"):
        return SmallFloatForm("MXFP4", 32)
    wanted = "fp8_e4m3 with a scale for each tensor or channel, or fp4 in groups of 32 with e8m0"
    raise refused(what, "weight", f"{kind}, {reach}, {size}, {scale}", wanted)


def _modelopt(config: Config) -> Layout:
    """One algorithm for all, or one for each of `quantized_layers`."""
    what, key = "a ModelOpt checkpoint", "quantized_layers"
    if config.get("quant_algo") != "MIXED_PRECISION":
        return one_form(_modelopt_form(config))
    layers = json_object(what, key, config.get(key))
    own = {
        str(name): _modelopt_form(json_object(what, f"{key}[{name!r}]", settings))
        for name, settings in layers.items()
    }
    if not own:
        raise refused(what, key, layers, "an algorithm for each module")
    forms = tuple(set(own.values()))

    def form_of(module: str) -> StoredForm:
        form = own.get(module) or next(
            (own[name] for name in own if module.startswith(f"{name}.")), None
        )
        if form is None:
            raise CheckpointError(
                f"{module} is quantised, but {key} has no algorithm for it: do config.json and the "
                "weights belong together?"
            )
        return form

    return Layout(" and ".join(sorted({form.name for form in forms})), forms, form_of)


def _modelopt_form(config: Config) -> StoredForm:
    what, algo = "a ModelOpt checkpoint", config.get("quant_algo")
    if algo in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return Fp8Form()
    if algo in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        return Int8Form(-1, symmetric=True, name="ModelOpt INT8")
    if algo in ("W4A16_AWQ", "W4A8_AWQ") and not config.get("has_zero_point"):
        return ModelOptInt4Form(_group_size(what, modelopt_group_size(config)))
    if isinstance(algo, str) and algo.upper() in ("FP8_PB_WO", "FP8_BLOCK_SCALES"):
        return _fp8_form(what, "quant_algo", list(FP8_BLOCK))
    if isinstance(algo, str) and algo in _MODELOPT_FLOATS:
        form = _MODELOPT_FLOATS[algo]
        size = config.get("group_size") or form.group_size
        return replace(form, group_size=_group_size(what, size))
    others = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W8A16", "W8A8_SQ_PER_CHANNEL"
    wanted = ", ".join((*others, *_MODELOPT_FLOATS))
    raise refused(
        what, "quant_algo", algo, f"{wanted}, or W4A16_AWQ or W4A8_AWQ without zero points"
    )
