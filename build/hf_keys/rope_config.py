"""Every spelling of rope in a Hugging Face config.json, in one form.

transformers 4 has rope_theta and rope_scaling (with `type` or `rope_type`), 5 has
rope_parameters, for Gemma 3 one for each layer type. TensorRT-LLM looks `type` up before
`rope_type`: both are written. Of a file with both spellings the old one counts, as it does there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from enginehouse.build.hf_keys.config_values import json_object, number
from enginehouse.runtime.errors import CheckpointError

ROPE_TYPES = ("linear", "dynamic", "llama3", "longrope", "yarn")
_PRETRAINED = "original_max_position_embeddings"
_NEEDED = {
    "linear": ("factor",),
    "dynamic": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
}


class RopeConfig(NamedTuple):
    """base: rotary_base; scaling: rotary_scaling; extra: other keys for config.json."""

    base: float
    scaling: dict[str, Any] | None
    extra: dict[str, Any]


def read_rope(hf: Mapping[str, Any], architecture: str, head_size: int) -> RopeConfig:
    """Raises CheckpointError for a type, a key or a layout that no engine can run."""
    parameters, old = json_object(hf, "rope_parameters"), json_object(hf, "rope_scaling")
    extra: dict[str, Any] = {}
    if architecture in _BASES:
        parameters, extra = _by_layer_type(hf, parameters, old, *_BASES[architecture])
    elif old:  # transformers 5 takes it for the whole, a base in it included
        parameters = old
    if architecture == "Gemma4ForCausalLM":
        return _proportional(hf, parameters, extra)
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise CheckpointError(
            f"config.json has rope_parameters for each layer type ({', '.join(nested)}); "
            "wanted one rope for all layers"
        )
    theta = parameters.pop("rope_theta", None) or hf.get("rope_theta")
    base = number({"rope_theta": theta}, "rope_theta", 10000.0)
    partial = parameters.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    rotary_dim = head_size
    if partial is None and "rotary_dim" in hf:  # MiniMax's
        partial = number(hf, "rotary_dim") / head_size
    if architecture in _SHARES:
        usual = _SHARES[architecture]
        share = number({"partial_rotary_factor": partial}, "partial_rotary_factor", usual)
        extra["rotary_pct"] = share
        rotary_dim = int(head_size * share)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_size:
            raise CheckpointError(
                f"config.json has partial_rotary_factor={share}, which rotates {rotary_dim} of "
                f"{head_size} elements; wanted an even number of them"
            )
    elif partial not in (None, 1):
        raise CheckpointError(f"config.json has partial_rotary_factor={partial}; wanted 1.0")
    scaling = _scaling(hf, parameters)
    if scaling is None:
        return RopeConfig(base, None, extra)
    _settle_magnitudes(scaling, architecture)
    if scaling["type"] == "longrope":
        _check_stretches(scaling, rotary_dim // 2)
        extra |= {
            _PRETRAINED: scaling[_PRETRAINED],
            "longrope_scaling_short_factors": scaling["short_factor"],
            "longrope_scaling_long_factors": scaling["long_factor"],
        }
    return RopeConfig(base, scaling, extra)


def _scaling(hf: Mapping[str, Any], scaling: dict[str, Any]) -> dict[str, Any] | None:
    """rotary_scaling under both spellings of its type, with the pretrained length written out."""
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    kind = {"su": "longrope", "none": "default"}.get(kind, kind)
    if kind == "default":
        return None
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json asks for rope type {kind!r}; wanted none or one of "
            + ", ".join(ROPE_TYPES)
        )
    for key in _NEEDED[kind]:
        number(scaling, key)
    if kind == "dynamic":  # Hunyuan has an alpha, with a factor of one or none
        number(scaling, "alpha" if scaling.get("alpha") else "factor")
    if kind in ("llama3", "yarn", "longrope"):
        outside = hf.get(_PRETRAINED)  # Phi-3 keeps it beside rope_scaling
        context = hf.get("max_position_embeddings")
        scaling[_PRETRAINED] = outside or scaling.get(_PRETRAINED) or context
        number(scaling, _PRETRAINED)
    scaling.pop("max_position_embeddings", None)  # Ministral 3 says it here too
    return {**scaling, "type": kind, "rope_type": kind}


def _settle_magnitudes(scaling: dict[str, Any], architecture: str) -> None:
    """PhiMoE's own multipliers of cos and sin, which its class wants; other classes read none."""
    is_phi_moe = architecture == "PhiMoEForCausalLM"
    if is_phi_moe and scaling["type"] != "longrope":
        raise CheckpointError(
            f"config.json asks for rope type {scaling['type']!r}; a PhiMoE knows only longrope"
        )
    for key in ("short_mscale", "long_mscale"):
        if is_phi_moe:
            number(scaling, key)
        else:
            scaling.pop(key, None)


def _check_stretches(scaling: dict[str, Any], count: int) -> None:
    for key in ("short_factor", "long_factor"):
        values = scaling.get(key)
        if not isinstance(values, list) or len(values) != count:
            found = f"{len(values)} numbers" if isinstance(values, list) else "no list"
            raise CheckpointError(
                f"config.json has {found} as {key} of its longrope; wanted {count} numbers, one "
                "for each rotated pair"
            )


def _proportional(
    hf: Mapping[str, Any], parameters: dict[str, Any], extra: dict[str, Any]
) -> RopeConfig:
    """Of layers that see everything: a share of a head's pairs turn, as fast as if all did."""
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "proportional"):
        raise CheckpointError(
            f"config.json asks for rope type {kind!r} on full layers; wanted proportional"
        )
    share = number(parameters, "partial_rotary_factor", 1.0) if kind == "proportional" else 1.0
    if share > 1:
        raise CheckpointError(
            f"config.json has partial_rotary_factor={share}; wanted no more than 1.0"
        )
    scaling = {
        "type": "proportional",
        "rope_type": "proportional",
        "partial_rotary_factor": share,
        "factor": number(parameters, "factor", 1.0) if kind == "proportional" else 1.0,
    }
    return RopeConfig(number(parameters, "rope_theta"), scaling, extra)


# Families that may turn a part of a head, and which share where nothing is said.
_SHARES = {
    "Phi3ForCausalLM": 1.0,
    "GlmForCausalLM": 0.5,
    "Glm4ForCausalLM": 0.5,
    "NemotronForCausalLM": 0.5,
    "StableLmForCausalLM": 0.25,
    "PhiForCausalLM": 0.5,
    "GPTNeoXForCausalLM": 0.25,
    "Glm4MoeForCausalLM": 0.5,
    "MiniMaxM2ForCausalLM": 1.0,
    **dict.fromkeys(("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"), 0.25),
}
# Families whose sliding layers turn by a base of their own: the default of the global layers', and
# of theirs; None: that of the global layers.
_BASES: dict[str, tuple[float, float | None]] = {
    "Gemma3ForCausalLM": (1e6, 1e4),
    "Olmo3ForCausalLM": (5e5, None),
    "Gemma4ForCausalLM": (1e6, 1e4),
    "Gemma3nForCausalLM": (1e6, 1e4),
}


def _by_layer_type(
    hf: Mapping[str, Any],
    parameters: dict[str, Any],
    old: dict[str, Any],
    global_base: float,
    local_base: float | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The global layers' rope, and the local base, which knows no scaling."""
    local = json_object(parameters, "sliding_attention")
    kind = local.get("rope_type") or local.get("type") or "default"
    if kind != "default":
        raise CheckpointError(
            f"config.json asks for rope type {kind!r} on sliding layers; wanted the default there"
        )
    if "full_attention" in parameters or local:
        parameters = json_object(parameters, "full_attention")
    parameters |= old
    if not (parameters.get("rope_theta") or hf.get("rope_theta")):
        parameters["rope_theta"] = global_base
    usual = local_base or number({**hf, **parameters}, "rope_theta")
    base = local.get("rope_theta") or hf.get("rope_local_base_freq")
    base = number({"rope_local_base_freq": base}, "rope_local_base_freq", usual)
    return parameters, {"rope_local_base_freq": base}
