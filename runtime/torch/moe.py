"""A mixture of experts on a CPU: the router's choice, and each expert's rows run together.

Knows one layer's MLP. Source: Mixtral of Experts (Jiang et al., 2024), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.torch.linear import Linear, make_linear

_RENORMALIZE = 1  # TensorRT-LLM's MoeConfig.ExpertScaleNormalizationMode
_PER_EXPERT = ("weight", "weights_scaling_factor")


def route(router: Tensor, x: Tensor, moe: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Each token's experts and their shares: int64 and float32, both [tokens, top_k].

    router: float32 [experts, hidden_size]. Shares are the softmax over all experts; under
    normalization_mode 1 those of the chosen are scaled to sum to 1.
    """
    probabilities = functional.linear(x.float(), router).softmax(dim=-1)
    shares, experts = probabilities.topk(int(moe["top_k"]), dim=-1)
    if moe.get("normalization_mode") == _RENORMALIZE:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return experts, shares


class ExpertMlp:
    """tensors: the layer's `mlp.*` tensors, whole, without the prefix.

    fc.weight: [experts, 2 * moe_intermediate_size, hidden_size], up first, then gate.
    `run(name, linear, x)` computes a linear and lets calibration see its input.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], moe: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self.moe = moe
        self.router = tensors["router.weight"].float()
        count = len(self.router)
        self.fc = [make_linear([_expert(tensors, "fc.", i)], dtype) for i in range(count)]
        self.proj = [make_linear([_expert(tensors, "proj.", i)], dtype) for i in range(count)]

    def __call__(self, x: Tensor, run: Callable[[str, Linear, Tensor], Tensor]) -> Tensor:
        """x: [tokens, hidden_size] -> the same shape."""
        experts, shares = route(self.router, x, self.moe)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            tokens, slots = torch.where(experts == expert)
            up, gate = run("mlp.fc", self.fc[expert], x[tokens]).chunk(2, dim=-1)
            y = run("mlp.proj", self.proj[expert], functional.silu(gate) * up)
            out.index_add_(0, tokens, y * shares[tokens, slots, None].to(y.dtype))
        return out


def _expert(tensors: Mapping[str, Tensor], prefix: str, index: int) -> dict[str, Tensor]:
    """One expert's tensors of a module; what all share (the activation scale) stays whole."""
    module = {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}
    return {key: t[index] if key in _PER_EXPERT else t for key, t in module.items()}
