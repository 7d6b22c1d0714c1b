"""How a model is cut over tensor parallel ranks, and what it is padded to where it cannot be.

What heads, columns and hidden size must be multiples of: TP's, and the form's kernels'. The first
two are filled up at the least cost; the hidden size cannot be, as its norms would change. Knows no
tensor: what padding does to one is forms/padding.py's business.
Source: TensorRT-LLM 1.2.1 checkpoint format, tensor tables per tp and pp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from math import gcd, lcm
from typing import NamedTuple

from enginehouse.build.families.output_table import distinct_linears
from enginehouse.build.forms.multiples import Multiples, multiples
from enginehouse.build.forms.padding import padding_of
from enginehouse.build.forms.weight_forms import GROUP_SIZES
from enginehouse.runtime.config import Mapping, ModelConfig
from enginehouse.runtime.config_parts import Delta
from enginehouse.runtime.errors import PlanError

_WORDS = ("out_features", "in_features")


class CutModel(NamedTuple):
    """config: of the checkpoint, padded or not. group_size: of INT4, chosen."""

    config: ModelConfig
    group_size: int | None


def cut_model(
    config: ModelConfig,
    quant: str,
    asked: int | None = None,
    *,
    for_trtllm: bool = False,
    own: bool = False,
) -> CutModel:
    """The model as it can be cut over its mapping's tp, padded with as few weights as will do.

    asked: the group size, where it is settled; own: it is the source's, whose groups stay whole.
    Raises PlanError for a hidden size that does not fit, and for heads that cannot be added.
    """
    sizes: tuple[int | None, ...] = GROUP_SIZES.get(quant, (None,))
    if asked is not None and asked in sizes:
        sizes = (asked,)
    elif asked is not None:  # which no kernel has
        choose_group_size(config, asked, quant, own)
    for strict in (True,) if for_trtllm else (True, False):
        found = [
            CutModel(padded, size)
            for size in sizes
            for padded in _padded(config, quant, size, strict, for_trtllm)
            if _keeps_groups(config, padded, own, size)
        ]
        if found:
            return min(found, key=lambda cut: _weights(cut.config))
    raise PlanError(_uncuttable(config, quant, sizes, for_trtllm, own))


def _keeps_groups(
    config: ModelConfig, padded: ModelConfig, own: bool, group_size: int | None
) -> bool:
    """Whether what the source has packed stays as it is."""
    parted = own and group_size is not None
    return not parted or padding_of(config, padded).keeps_groups(group_size or 1)


def _padded(
    config: ModelConfig, quant: str, group_size: int | None, strict: bool, for_trtllm: bool
) -> Iterator[ModelConfig]:
    """The least that fits, or nothing where a size that is never cut does not."""
    tp, inner = config.mapping.tp_size, config.moe_intermediate_size
    rule = multiples(quant, tp, group_size, strict)
    unfit = any(size % n for size in _whole_sizes(config).values() for n in rule.whole)
    if unfit or tp > inner:
        return
    if config.delta is not None and not _cuts_states(config.delta, tp, rule):
        return
    fixed = _norms_all_heads(config) or _heads_differ(config) or (for_trtllm and _is_fixed(config))
    heads = _fixed_heads(config, rule) if fixed else least_heads(config, rule)
    if heads is None:
        return
    if _are_several(config):
        if any(size % tp or size // tp % max(rule.cut) for size in config.inner_sizes):
            return
    elif inner % tp or inner // tp % max(rule.cut):
        inner = -(-inner // (tp * rule.columns)) * tp * rule.columns
    yield with_numbers(config, *heads, inner)


def _cuts_states(delta: Delta, tp: int, rule: Multiples) -> bool:
    """Whether each rank has whole key heads of linear attention, to which none can be added."""
    heads = delta.key_heads // tp
    outputs, inputs = heads * delta.rows, heads * delta.values
    return delta.key_heads % tp == 0 and not (outputs % rule.cut[0] or inputs % rule.cut[1])


def _whole_sizes(config: ModelConfig) -> dict[str, int]:
    """What both enters linears whole and leaves some, by its key of config.json."""
    latents = 0 if config.latent is None else config.latent.query_rank
    return {"hidden_size": config.hidden_size, **({"q_lora_rank": latents} if latents else {})}


def with_numbers(config: ModelConfig, heads: int, kv_heads: int, inner: int) -> ModelConfig:
    """The model with other numbers of heads and of the MLP's (or an expert's) columns."""
    config = replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads)
    if config.extra.get("moe_intermediate_size"):
        return replace(config, extra={**config.extra, "moe_intermediate_size": inner})
    return replace(config, intermediate_size=inner)


def _weights(config: ModelConfig) -> tuple[int, int]:
    """What padding is paid with: weights of a layer on all ranks, then heads in the KV cache."""
    tp = config.mapping.tp_size
    kv_heads = max(tp, config.num_key_value_heads)
    attention = 2 * (config.num_attention_heads + kv_heads) * config.head_size
    return attention + 3 * max(1, config.num_experts) * config.moe_intermediate_size, kv_heads


def least_heads(config: ModelConfig, rule: Multiples) -> tuple[int, int] | None:
    """The heads and KV heads, none fewer than there are, that cost least: weights, then the cache.

    A rank has whole KV heads, or, where tp is a multiple of them, a copy of one.
    """
    tp, size = config.mapping.tp_size, config.head_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    group = heads // kv_heads
    step = rule.cut[1] // gcd(size, rule.cut[1])  # heads of a rank, for dense's inputs
    kv_step = rule.cut[0] // gcd(2 * size, rule.cut[0])  # KV heads of a rank, for qkv's outputs
    first = -(-kv_heads // tp)
    first_legal = -(-first // kv_step) * kv_step
    counts = [tp * kv for kv in range(first, first_legal * (1 + step) + 1) if kv % kv_step == 0]
    if kv_step == 1:
        counts += [kv for kv in range(kv_heads, tp) if tp % kv == 0]
    found = []
    for count in counts:
        per_rank = lcm(step, count // gcd(count, tp))  # so that each KV head has as many
        share = -(-group * count // tp)
        total = -(-share // per_rank) * per_rank * tp
        found.append((2 * total + 2 * max(tp, count), max(tp, count), count, total))
    best = min(found, default=None)
    return None if best is None else (best[3], best[2])


def _is_fixed(config: ModelConfig) -> bool:
    """Whether TensorRT-LLM's class takes the head size from hidden_size and the heads, so that none
    can be added (its Phi-3).
    """
    return config.architecture == "Phi3ForCausalLM"


def _norms_all_heads(config: ModelConfig) -> bool:
    """Whether a norm is over all heads together: an added one, or one more of the same, would
    change it; or heads share latents, or stand beside linear attention, which has none to spare.
    """
    of_states = config.latent is not None or config.delta is not None
    return of_states or bool(config.extra.get("qk_layernorm_all_heads", False))


def _heads_differ(config: ModelConfig) -> bool:
    """Whether layers have other heads than others, to which none is added."""
    return "layer_kv_heads" in config.extra


def _are_several(config: ModelConfig) -> bool:
    """Whether MLPs are of several kinds or sizes, so that no column is added to any."""
    kinds = ("layer_intermediate_sizes", "dense_layers")
    of_kinds = config.shared_expert_size > 0 or any(name in config.extra for name in kinds)
    return of_kinds or len(config.inner_sizes) > 1


def _fixed_heads(config: ModelConfig, rule: Multiples) -> tuple[int, int] | None:
    """The same heads on KV heads of which each is repeated; None where that does not fit."""
    if _heads_differ(config):
        layers = (config.of_layer(i) for i in range(config.num_hidden_layers))
        fit = all(_fit(layer, rule, layer.num_key_value_heads) for layer in layers)
        return (config.num_attention_heads, config.num_key_value_heads) if fit else None
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    group = heads // kv_heads
    most = 1 if _norms_all_heads(config) else group
    for copies in (n for n in range(1, most + 1) if group % n == 0):
        if _fit(config, rule, count := kv_heads * copies):
            return heads, count
    return None


def _fit(config: ModelConfig, rule: Multiples, count: int) -> bool:
    """Whether a rank's heads, with so many KV heads in all, fit a form's kernels."""
    tp, size, heads = config.mapping.tp_size, config.head_size, config.num_attention_heads
    per_rank, kv_per_rank = heads // tp, max(1, count // tp)
    divided = heads % tp == 0 and (count % tp == 0 or tp % count == 0)
    inputs = per_rank * (config.attended_size // heads)
    outputs = per_rank * config.query_size + 2 * kv_per_rank * size
    return divided and inputs % rule.cut[1] == 0 and outputs % rule.cut[0] == 0


def _uncuttable(
    config: ModelConfig,
    quant: str,
    sizes: tuple[int | None, ...],
    for_trtllm: bool,
    own: bool,
) -> str:
    """One sentence on a model that no padding helps."""
    tp, size = config.mapping.tp_size, sizes[-1]

    def fits(tp: int) -> bool:
        cut = config.with_mapping(Mapping(tp, config.mapping.pp_size))
        return any(
            _keeps_groups(cut, padded, own, size)
            for size in sizes
            for padded in _padded(cut, quant, size, for_trtllm, for_trtllm)
        )

    legal = [n for n in range(1, config.num_attention_heads + 1) if fits(n)]
    instead = f"legal tp for {quant}: {_listed(legal)}"
    rule = multiples(quant, tp, size, for_trtllm)
    if tp > config.moe_intermediate_size:
        return f"tp={tp} is more ranks than the MLP has columns; {instead}"
    wholes = product(_whole_sizes(config).items(), zip(_WORDS, rule.whole, strict=True))
    for (key, whole), (word, multiple) in wholes:
        if whole % multiple:
            what = f"{key}={whole}, the {word} of linears at tp={tp}"
            groups = f" with groups of {size}" if size is not None else ""
            return (
                f"{quant}: {what}, is no multiple of {multiple}, which its kernel wants{groups} "
                f"and no padding gives; {instead}: choose one of them, or another quant"
            )
    if _are_several(config) and tp not in legal:
        return (
            f"the MLPs have {_listed(config.inner_sizes)} columns, to which none can be added as "
            f"they are of several kinds, and tp={tp} does not cut all; {instead}: choose one"
        )
    if config.delta is not None and tp not in legal:
        return (
            f"{quant}: {config.num_attention_heads} heads of attention and "
            f"{config.delta.key_heads} key heads of linear attention cannot be cut over tp={tp}, "
            f"and to linear attention none can be added; {instead}: choose one"
        )
    if own:
        return (
            f"{quant}: padding for tp={tp} would part the groups of {size} that the source has; "
            f"{instead}"
        )
    if _norms_all_heads(config) or _heads_differ(config):
        why = "norms are over all of them together"
        why = "they share latents" if config.latent is not None else why
        why = "layers have several numbers of KV heads" if _heads_differ(config) else why
        return (
            f"num_attention_heads={config.num_attention_heads} cannot be cut over tp={tp}, and "
            f"{why}, so none can be added; {instead}: choose one"
        )
    return (
        f"num_attention_heads={config.num_attention_heads} cannot be cut over tp={tp}, and "
        "TensorRT-LLM's class takes the head size from their number, so none can be added; "
        f"{instead}: choose one of them, or backend=torch or tensorrt"
    )


def check_int8(config: ModelConfig) -> None:
    """PlanError where the weight-only kernel's tiles do not fit."""
    untiled = _untiled(config)
    if untiled is not None:
        raise PlanError(
            f"int8: {untiled} per rank at tp={config.mapping.tp_size}; its kernel wants multiples "
            f"of 16 x 64; legal tp for int8: {_listed(legal_tp(config, int8=True))}: choose one of "
            "them, or quant=none"
        )


def _untiled(config: ModelConfig) -> str | None:
    """A linear that the weight-only kernel's tiles (64 inputs, 16 outputs) do not fit, or None."""
    for name, linear in distinct_linears(config):
        if linear.in_features % 64 or linear.out_features % 16:
            return f"{name} is {linear.out_features} x {linear.in_features}"
    return None


def legal_tp(
    config: ModelConfig, group_sizes: tuple[int, ...] = (), int8: bool = False
) -> list[int]:
    """The tensor parallel sizes this model can be cut over; with int4 groups, one must fit."""
    sizes = []
    for tp in range(1, config.num_attention_heads + 1):
        cut = config.with_mapping(Mapping(tp, config.mapping.pp_size))
        grouped = not group_sizes or any(_ungrouped(cut, size) is None for size in group_sizes)
        if _uncut(config, tp) is None and grouped and not (int8 and _untiled(cut)):
            sizes.append(tp)
    return sizes


def check_mapping(config: ModelConfig, tp: int) -> None:
    """PlanError unless heads, KV heads and the MLP divide over tp."""
    key = _uncut(config, tp)
    if key is not None:
        raise PlanError(
            f"{key}={_number(config, key)} cannot be cut over tp={tp}; "
            f"choose tp in {_listed(legal_tp(config))}; or leave --no-pad out: padding is the "
            "default"
        )


def _number(config: ModelConfig, key: str) -> int:
    if key == "linear_num_key_heads" and config.delta is not None:
        return config.delta.key_heads
    return int(getattr(config, key))


def check_stages(config: ModelConfig, pp: int) -> None:
    """PlanError unless each pipeline stage has a layer."""
    if pp > config.num_hidden_layers:
        raise PlanError(
            f"num_hidden_layers={config.num_hidden_layers} cannot be cut over pp={pp}; "
            f"choose pp in 1 to {config.num_hidden_layers}"
        )


def _uncut(config: ModelConfig, tp: int) -> str | None:
    """The config key that tp does not divide. KV heads are duplicated when tp exceeds them."""
    layers = (config.of_layer(i) for i in range(config.num_hidden_layers))
    if any(kv_heads % tp and tp % kv_heads for kv_heads in {c.num_key_value_heads for c in layers}):
        return "num_key_value_heads"
    if config.num_attention_heads % tp:
        return "num_attention_heads"
    if config.delta is not None and config.delta.key_heads % tp:
        return "linear_num_key_heads"
    inner = config.moe_intermediate_size
    key = "intermediate_size" if inner == config.intermediate_size else "moe_intermediate_size"
    return key if any(inner % tp for inner in config.inner_sizes) else None


def _ungrouped(config: ModelConfig, group_size: int) -> str | None:
    """Why int4 groups do not fit some linear, or None.

    Beyond whole groups and the kernel's 64, TensorRT-LLM pads both axes of the whole linear to
    multiples of group_size * tp and then wants a checkpoint of the padded shapes: such cuts are
    refused too (seen in its own tables: SmolLM2 at group_size 128 has 640 for 576).
    """
    tp = config.mapping.tp_size
    for name, linear in distinct_linears(config):
        for axis, features in ((1, linear.in_features), (0, linear.out_features)):
            word = ("out_features", "in_features")[axis]
            if axis == linear.cut_axis:
                if features % group_size:
                    return f"{name} has {word}={features} per rank at tp={tp}"
            elif features % (group_size * tp):
                return f"{name} has {word}={features}, uncut at tp={tp}"
    return None


def choose_group_size(
    config: ModelConfig, asked: int | None = None, quant: str = "int4", own: bool = False
) -> int:
    """The group size asked for, or the largest that fits every linear at this tp.

    own: the one asked for is the source's, and no other can be chosen.
    Raises PlanError naming the layer, its features per rank, the legal groups and legal tp.
    """
    sizes = GROUP_SIZES[quant]
    legal = [size for size in sizes if _ungrouped(config, size) is None]
    if asked is None and legal:
        return legal[0]
    if asked in legal:
        return asked
    if asked is not None and asked not in sizes:
        raise PlanError(f"group_size={asked} has no kernel for {quant}; choose {_listed(sizes)}")
    size = asked or sizes[-1]
    found = f"{quant}: {_ungrouped(config, size)}, which group_size={size} does not fit; "
    if own:
        found += "the source has no other; legal tp for it: "
        raise PlanError(found + _listed(legal_tp(config, (size,))))
    raise PlanError(
        f"{found}legal group_size at this tp: {_listed(legal)}; legal tp for {quant}: "
        f"{_listed(legal_tp(config, sizes))}: choose one of them, or another quant"
    )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers) or "none"
