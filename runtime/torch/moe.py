"""A mixture of experts: the router's choice, and each expert's rows run together.

Knows one layer's MLP. Source: Mixtral of Experts (Jiang et al., 2024), section 2.1; DeepSeek-V3
Technical Report (2024), section 2.1.2; GRIN (Liu et al., 2024), as Phi-3.5-MoE computes it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from enginehouse.runtime.checkpoint.routing import Routing, routing_of
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.checkpoint.weights import expert_tensors, module_tensors
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.torch.linear import make_linear
from enginehouse.runtime.torch.mlp import PlainMlp, Run, gated

_LEAST_SUM = 1e-20


def route(router: Mapping[str, Tensor], x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Each token's experts and their shares: int64 and float32, both [tokens, chosen].

    router: weight [experts, hidden_size], and where a model has them bias,
    e_score_correction_bias and expert_scale, of the shares, [experts]; float32.
    """
    logits = functional.linear(x.float(), router["weight"], router.get("bias"))
    if routing.mixer_epsilon:
        return _sparse_mixer(logits, routing)
    scores = logits.sigmoid() if routing.sigmoid else logits.softmax(dim=-1)
    correction = router.get("e_score_correction_bias")
    judged = scores if correction is None else scores + correction
    if routing.chosen_groups < routing.groups:
        judged = judged.masked_fill(~_in_best_groups(judged, routing), float("-inf"))
    experts = judged.topk(routing.chosen, dim=-1).indices
    shares = scores.gather(-1, experts)
    if routing.renormalize:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + _LEAST_SUM)
    if "expert_scale" in router:
        shares = shares * router["expert_scale"][experts]
    return experts, shares * routing.scale


def _sparse_mixer(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The best expert, then the best of the others; logits: float32 [tokens, experts]."""
    left, experts, shares = logits, [], []
    for _ in range(routing.chosen):
        best, expert = left.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().maximum(best) > 2 * routing.mixer_epsilon
        near = left.masked_fill(far, float("-inf")).softmax(dim=-1)
        experts.append(expert)
        shares.append(near.gather(-1, expert))
        left = left.scatter(-1, expert, float("-inf"))
    return torch.cat(experts, dim=-1), torch.cat(shares, dim=-1)


def _in_best_groups(judged: Tensor, routing: Routing) -> Tensor:
    """bool [tokens, experts]"""
    groups = judged.unflatten(-1, (routing.groups, -1))
    best = groups.topk(routing.group_best, dim=-1).values.sum(dim=-1)
    mask = torch.zeros_like(best, dtype=torch.bool)
    mask.scatter_(-1, best.topk(routing.chosen_groups, dim=-1).indices, True)
    return mask.repeat_interleave(groups.shape[-1], dim=-1)


class ExpertMlp:
    """tensors: the layer's `mlp.*` tensors, whole, without the prefix.

    fc.weight: [experts, 2 * moe_intermediate_size, hidden_size], up first, then gate. A shared
    expert, which every token sees, stands beside them, and a gate of its own where it has one.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.traits = traits_of(config)
        self.routing = routing_of(config)
        self.router = {k: t.float() for k, t in module_tensors(tensors, "router").items()}
        self.fc, self.proj = (
            [make_linear([expert_tensors(module, i)], dtype) for i in range(self.routing.experts)]
            for module in (module_tensors(tensors, name) for name in ("fc", "proj"))
        )
        self.shared: PlainMlp | None = None
        if shared := module_tensors(tensors, "shared_expert"):
            self.shared = PlainMlp(config, shared, dtype, "mlp.shared_expert")
        gate = tensors.get("shared_expert_gate.weight")
        self.shared_gate = None if gate is None else gate.to(dtype)

    def __call__(self, x: Tensor, run: Run) -> Tensor:
        """x: [tokens, hidden_size] -> the same shape."""
        out = self.routed(x, x, run)
        return out if self.shared is None else out + self._shared(self.shared, x, run)

    def routed(self, x: Tensor, judged: Tensor, run: Run) -> Tensor:
        """What the chosen experts make of x. judged: what they are chosen by, of the same shape."""
        experts, shares = route(self.router, judged, self.routing)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            tokens, slots = torch.where(experts == expert)
            entering, share = x[tokens], shares[tokens, slots, None].to(x.dtype)
            if self.routing.scales_inputs:
                entering, share = entering * share, torch.ones_like(share)
            up, gate = run("mlp.fc", self.fc[expert], entering).chunk(2, dim=-1)
            y = run("mlp.proj", self.proj[expert], gated(gate, up, self.traits))
            out.index_add_(0, tokens, y * share)
        return out

    def _shared(self, shared: PlainMlp, x: Tensor, run: Run) -> Tensor:
        given = shared(x, run)
        if self.shared_gate is None:
            return given
        return torch.sigmoid(functional.linear(x, self.shared_gate)) * given
