"""The gated delta rule by loops, in float64: Yang et al. (2024), equation 10."""

from __future__ import annotations

import torch
from torch import Tensor

from enginehouse.runtime.config_parts import Delta


def by_loops(
    delta: Delta, weight: Tensor, mixed: Tensor, decay: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """Of one sequence what each token reads, [tokens, key_heads, group, value_size], and the states
    behind the last, [key_heads, group, key_size, value_size].

    weight: of the convolution, [key_heads * mixed, kernel]; the others as DeltaRule has them, of
    one sequence.
    """
    mixed, decay, rate, weight = (x.double() for x in (mixed, decay, rate, weight))
    states = torch.zeros(delta.key_heads, delta.group, delta.key_size, delta.value_size).double()
    weight = weight.view(delta.key_heads, delta.mixed, delta.kernel)
    out = []
    for t in range(len(mixed)):
        seen = torch.zeros_like(mixed[0])
        for back in range(min(t + 1, delta.kernel)):
            seen += mixed[t - back] * weight[..., delta.kernel - 1 - back]
        seen = seen * seen.sigmoid()
        q, k, v = seen.split([delta.key_size, delta.key_size, delta.values], dim=-1)
        rows = []
        for head in range(delta.key_heads):
            query = q[head] / (q[head].square().sum() + 1e-6).sqrt() * delta.key_size**-0.5
            key = k[head] / (k[head].square().sum() + 1e-6).sqrt()
            for i, value in enumerate(v[head].view(delta.group, -1)):
                state = states[head, i] * decay[t, head, i].exp()
                state = state + torch.outer(key, rate[t, head, i] * (value - key @ state))
                states[head, i] = state
                rows.append(query @ state)
        out.append(torch.stack(rows).view(delta.key_heads, delta.group, -1))
    return torch.stack(out), states
