"""A mixture of experts on a CPU: the router's choice, and each expert's rows run together.

Knows one layer's MLP. Source: Mixtral of Experts (Jiang et al., 2024), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.weights import expert_tensors, module_tensors
from enginehouse.runtime.torch.linear import Linear, make_linear

_RENORMALIZE = 1  # TensorRT-LLM's MoeConfig.ExpertScaleNormalizationMode


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
        self.fc, self.proj = (
            [make_linear([expert_tensors(module, i)], dtype) for i in range(count)]
            for module in (module_tensors(tensors, name) for name in ("fc", "proj"))
        )

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
