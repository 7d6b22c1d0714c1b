"""How a mixture's router chooses experts, read out of config.json's `moe`. No tensor.

Source: TensorRT-LLM 1.2.1's `MoeConfig`; DeepSeek-V3 Technical Report (2024), section 2.1.2, for
scores by sigmoid, their corrections and groups; GRIN (Liu et al., 2024) for SparseMixer.
"""

from __future__ import annotations

from typing import NamedTuple

from enginehouse.runtime.config import ModelConfig

_RENORMALIZE, _SPARSE_MIXER = 1, 2  # MoeConfig.ExpertScaleNormalizationMode


class Routing(NamedTuple):
    """experts are chosen by the largest scores, corrected where the router has corrections.

    sigmoid: scores are sigmoids of the logits, else their softmax. renormalize: the shares of the
    chosen, which are their scores, are scaled to sum to 1. groups: of the experts, which lie one
    after the other; chosen are of the chosen_groups best, which are judged by the sum of their
    group_best largest scores. scale: of all shares in the end. scales_inputs: shares are of what
    enters the experts, not of what they give. mixer_epsilon: SparseMixer's, else 0. With it the
    share of each is its softmax over the experts that are not chosen yet and whose logits are no
    further below its own than 2 * mixer_epsilon of its own, or of their magnitude if that is more.
    """

    experts: int
    chosen: int
    renormalize: bool
    sigmoid: bool = False
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 1
    scale: float = 1.0
    scales_inputs: bool = False
    mixer_epsilon: float = 0.0


def routing_of(config: ModelConfig) -> Routing:
    """Of a model that has experts."""
    moe = config.extra["moe"]
    mode = moe.get("normalization_mode")
    sigmoid = moe.get("scoring") in ("sigmoid", "sigmoid of inputs")
    return Routing(
        config.num_experts,
        int(moe["top_k"]),
        renormalize=mode == _RENORMALIZE,
        sigmoid=sigmoid,
        groups=int(moe.get("device_limited_n_group") or 1),
        chosen_groups=int(moe.get("device_limited_topk_group") or 1),
        group_best=2 if sigmoid else 1,
        scale=float(moe.get("device_limited_routed_scaling_factor", 1.0)),
        scales_inputs=moe.get("scoring") == "sigmoid of inputs",
        mixer_epsilon=float(moe["sparse_mixer_epsilon"]) if mode == _SPARSE_MIXER else 0.0,
    )
