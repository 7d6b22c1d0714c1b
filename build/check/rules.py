"""The traps, each a rule: what it looks for, whom it catches, and how the JSON is mended, if so.

A rule sees one checkpoint and yields its faults. Knows no weight's meaning beyond its scales.
Source: the issues that each rule names; vLLM's and SGLang's loaders of ModelOpt and
compressed-tensors; TensorRT-LLM's `_torch/model_config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite, prod
from typing import NamedTuple

import torch

from enginehouse.build.check.stored import PACKED, Stored
from enginehouse.build.forms.block_floats import from_e8m0

RUNTIMES = ("vllm-0.33", "sglang-0.5", "trtllm-1.2.1", "trtllm-1.4")
VLLM, SGLANG = RUNTIMES[:2]
_ALL = frozenset(RUNTIMES)
_MOST_NUMBERS = 65_536  # of a tensor of scales that is looked at, number by number
_SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
)


class Change(NamedTuple):
    """What mends a fault. add, drop: entries of the list of what is not quantised. untie: the head
    is its own.
    """

    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    untie: bool = False


class Fault(NamedTuple):
    """where: a module or a file. words: what was found, what was wanted, what to do. loads: the
    runtime goes on, and is wrong or worse.
    """

    where: str
    words: str
    change: Change | None = None
    loads: bool = False


class Rule(NamedTuple):
    name: str
    known_as: str  # where users met it
    catches: frozenset[str]  # of RUNTIMES
    look: Callable[[Stored], Iterator[Fault]]


def _unlisted(stored: Stored) -> Iterator[Fault]:
    for module in stored.linears:
        if not stored.is_quantised(module) and stored.entry_of(module) is None:
            yield Fault(
                module,
                "is stored as it was and the list of what is not quantised leaves it out: it is "
                "built quantised, and its weight has no place there; add its name to the list",
                Change(add=(module,)),
            )


def _listed(stored: Stored) -> Iterator[Fault]:
    for module in (*stored.linears, "lm_head"):
        entry = stored.entry_of(module)
        if entry is None or not stored.is_quantised(module):
            continue
        change = Change(drop=(entry,)) if entry == module and module != "lm_head" else None
        yield Fault(
            module,
            f'is quantised, and the entry "{entry}" says that it is not: its scales have no place; '
            "take the entry out, or quantise without the module",
            change,
        )


def _head(stored: Stored) -> Iterator[Fault]:
    if stored.is_quantised("lm_head") and stored.entry_of("lm_head") is None:
        yield Fault(
            "lm_head",
            "is quantised, and most models' heads have a plain weight alone there; leave it out of "
            "the quantisation",
        )


def _mixed(stored: Stored) -> Iterator[Fault]:
    for fused, parts in stored.groups():
        kinds = {stored.is_quantised(part) for part in parts}
        if len(kinds) > 1:
            plain = [part.rpartition(".")[2] for part in parts if not stored.is_quantised(part)]
            yield Fault(
                fused,
                f"is one module there, and of its parts {', '.join(plain)} are not quantised; "
                "quantise all of them, or none",
            )


def _fused_names(stored: Stored) -> Iterator[Fault]:
    for fused, parts in stored.groups():
        plain = not any(map(stored.is_quantised, parts))
        if plain and all(map(stored.entry_of, parts)) and stored.entry_of(fused) is None:
            yield Fault(
                fused,
                "is the name by which SGLang looks, and the list has its parts alone: it is built "
                "quantised; add the name to the list",
                Change(add=(fused,)),
            )


def _foreign_names(stored: Stored) -> Iterator[Fault]:
    known = {*stored.modules, *(name for name, _ in stored.groups())}
    for entry in stored.listed:
        if any(mark in entry for mark in "*?[") or entry.startswith("re:") or "." not in entry:
            continue
        if any(name == entry or name.startswith(f"{entry}.") for name in known):
            continue
        others = [new + entry.removeprefix(old) for old, new in _SPELLINGS if entry.startswith(old)]
        own = next((name for name in others if name in known), None)
        yield Fault(
            entry,
            "stands in the list of what is not quantised, and no tensor has that name"
            + (f'; the module is "{own}" here' if own else "; take it out, or write the module's"),
            Change(add=(own,)) if own else None,
            loads=own is None,
        )


def _missing_scale(stored: Stored) -> Iterator[Fault]:
    quantised = [module for module in stored.linears if stored.is_quantised(module)]
    inputs = {"input_scale", "input_global_scale"}
    # of MIXED_PRECISION each form is a kind of its own, by its other tensors
    static = {
        words - inputs - {"bias"}: module
        for module in reversed(quantised)
        if (words := stored.modules[module]) & inputs
    }
    for module in quantised:
        words = stored.modules[module]
        other = static.get(words - inputs - {"bias"})
        if not words & {"weight_scale", "weight_scale_inv", "scales"}:
            yield Fault(module, "has a quantised weight and no scale of it; quantise it again")
        elif other is not None and not words & inputs:
            yield Fault(
                module,
                f"has no input_scale, which {other} has: what was in memory is taken for it; "
                "calibrate it again",
                loads=True,
            )


def _odd_scale(stored: Stored) -> Iterator[Fault]:
    for name, info in stored.infos.items():
        word = name.rpartition(".")[2]
        if "scale" not in word or prod(info.shape) > _MOST_NUMBERS:
            continue
        numbers = stored.tensors.read(name)
        of_blocks = numbers.dtype.itemsize == 1  # which may hold nothing but zeros
        numbers = from_e8m0(numbers) if numbers.dtype == torch.uint8 else numbers.float()
        least = float(numbers.min())
        if not bool(torch.isfinite(numbers).all()) or least < 0 or (least == 0 and not of_blocks):
            shown = f"{least:g}" if isfinite(least) else "a number that is not finite"
            yield Fault(
                name, f"holds {shown}; wanted positive numbers: calibrate it again", loads=True
            )


def _apart_scales(stored: Stored) -> Iterator[Fault]:
    for fused, parts in stored.groups():
        scales = {scale for part in parts if (scale := stored.scale(part)) is not None}
        if len(scales) > 1:
            yield Fault(
                fused,
                f"is one module there, whose parts have scales of {min(scales):g} to "
                f"{max(scales):g}: weights are rounded again to the largest; quantise them with "
                "one scale",
                loads=True,
            )
        whole = {number for part in parts if (number := stored.whole_scale(part)) is not None}
        if len(whole) > 1:
            yield Fault(
                fused,
                f"is one module there, whose parts have NVFP4's scale of the whole tensor of "
                f"{min(whole):g} to {max(whole):g}: the largest is taken for all; quantise them "
                "with one",
                loads=True,
            )


def _forms_apart(stored: Stored) -> Iterator[Fault]:
    for fused, parts in stored.groups():
        algos = {str(stored.algo_of(part)) for part in parts}
        if len(algos) > 1:
            yield Fault(
                fused,
                f"is one module there, whose parts are in {' and '.join(sorted(algos))}; quantise "
                "them in one form",
            )


def _blocks(stored: Stored) -> Iterator[Fault]:
    rows = stored.rows_of_blocks
    if rows is None:
        return
    for fused, parts in stored.groups():
        for part in parts[:-1]:  # the last may end within a block
            info = stored.infos.get(f"{part}.weight")
            if info is not None and stored.is_quantised(part) and info.shape[0] % rows:
                yield Fault(
                    fused,
                    f"is one module there, of whose parts {part.rpartition('.')[2]} has "
                    f"{info.shape[0]} outputs, which blocks of {rows} do not divide; choose "
                    "another form",
                )


def _tied(stored: Stored) -> Iterator[Fault]:
    names = [n for n in stored.infos if n.endswith("embed_tokens.weight")]
    if not stored.config.get("tie_word_embeddings") or "lm_head.weight" not in stored.infos:
        return
    if len(names) == 1 and not torch.equal(
        stored.tensors.read("lm_head.weight"), stored.tensors.read(names[0])
    ):
        yield Fault(
            "lm_head",
            "has a weight of its own, and tie_word_embeddings says that it is the embedding, which "
            "is taken; write tie_word_embeddings: false",
            Change(untie=True),
            loads=True,
        )


def _kv_scales(stored: Stored) -> Iterator[Fault]:
    scheme = stored.quantization.get("kv_cache_scheme") or {}
    algo = stored.quantization.get("kv_cache_quant_algo")
    kind = (scheme.get("type"), scheme.get("num_bits")) if isinstance(scheme, dict) else None
    if scheme and kind is not None and kind != ("float", 8):
        yield Fault(
            "kv_cache_scheme",
            f"is of {scheme.get('num_bits')} bits and type {scheme.get('type')}; wanted float of 8",
        )
    elif scheme or algo == "FP8":
        if not any(name.endswith((".k_scale", ".v_scale")) for name in stored.infos):
            yield Fault(
                "kv_cache_scheme" if scheme else "kv_cache_quant_algo",
                "asks for keys and values in FP8 and no tensor has their scales, for which 1 is "
                "taken; calibrate them, or serve with kv_cache_dtype=auto",
                loads=True,
            )


def _group_size(stored: Stored) -> Iterator[Fault]:
    size = stored.quantization.get("group_size")
    if not isinstance(size, int) or size < 1:
        return
    for module in stored.linears:
        info = stored.infos.get(f"{module}.weight")
        if info is None or not stored.is_quantised(module) or {*PACKED} & stored.modules[module]:
            continue
        packed = info.dtype == torch.uint8 and stored.whole_scale(module) is not None
        width = info.shape[-1] * (2 if packed else 1)
        if width % size:
            yield Fault(
                module,
                f"has {width} inputs, which groups of {size} do not divide; quantise it "
                "with a smaller group_size",
            )


def _files(stored: Stored) -> Iterator[Fault]:
    has = {path.name for path in stored.folder.iterdir()}
    if not has & {"tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json"}:
        yield Fault("tokenizer.json", "is not there; copy the source's tokenizer files beside it")
    if "tokenizer_config.json" not in has and "tekken.json" not in has:
        yield Fault(
            "tokenizer_config.json", "is not there; copy the source's beside it", loads=True
        )


RULES = (
    Rule("unlisted", "vllm-project/vllm 51495", _ALL, _unlisted),
    Rule("listed", "vllm-project/vllm 45132", _ALL, _listed),
    Rule("head", "vllm-project/vllm 45102", frozenset({VLLM, SGLANG}), _head),
    Rule("mixed", "vllm-project/vllm 53996", _ALL, _mixed),
    Rule("fused-names", "sgl-project/sglang 36596", frozenset({SGLANG}), _fused_names),
    Rule("foreign-names", "vllm-project/vllm 54547", _ALL, _foreign_names),
    Rule("missing-scale", "vllm-project/vllm 54444", _ALL, _missing_scale),
    Rule("odd-scale", "vllm-project/llm-compressor 2117", _ALL, _odd_scale),
    Rule("apart-scales", "vllm-project/vllm 4332", frozenset({VLLM, SGLANG}), _apart_scales),
    Rule("forms-apart", "vLLM's ModelOptMixedPrecisionConfig", frozenset({VLLM}), _forms_apart),
    Rule("blocks", "vLLM's validate_fp8_block_shape", frozenset({VLLM}), _blocks),
    Rule("tied", "transformers' tie_weights", _ALL, _tied),
    Rule("kv-scales", "vllm-project/vllm 45312, 54623", _ALL, _kv_scales),
    Rule("group-size", "ModelOpt's block_quantize", _ALL, _group_size),
    Rule("files", "transformers' AutoTokenizer", _ALL, _files),
)


def faults_of(stored: Stored, runtimes: frozenset[str]) -> Iterator[tuple[Rule, Fault]]:
    """What catches any of these runtimes, rule by rule."""
    for rule in RULES:
        if rule.catches & runtimes:
            for fault in rule.look(stored):
                yield rule, fault
