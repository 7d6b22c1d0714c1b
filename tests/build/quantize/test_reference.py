"""The unquantised model, run layer by layer: where its tensors lie."""

from __future__ import annotations

import torch
from torch import Tensor

from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.traits import AttentionRule
from enginehouse.runtime.torch.decoder import CausalAttention, causal_attention


def test_all_that_the_reference_computes_with_lies_on_its_device(
    tiny_source: SourceCheckpoint,
) -> None:
    """torch refuses to mix devices, so a run on `meta`, which holds no numbers, meets every one."""
    device = torch.device("meta")
    reference = ReferenceModel(model_config(tiny_source.config, "float32"), tiny_source, device)
    seen: set[str] = set()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        seen.update(x.device.type for x in (q, k, v))
        return causal_attention(layer, q, k, v, rule)

    hidden = reference.hidden_states(
        [torch.arange(5), torch.arange(9)],
        attention=CausalAttention(attend),
    )
    assert seen == {"meta"}
    assert [tuple(x.shape) for x in hidden] == [(5, 256), (9, 256)]
    assert {x.device for x in hidden} == {device}
