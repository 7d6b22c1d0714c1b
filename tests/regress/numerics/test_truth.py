"""The source's own log probabilities are those of transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from enginehouse.regress.numerics.truth import true_tops
from enginehouse.runtime.errors import EnginehouseError
from makers.quantized_writers import KINDS, write_quantized
from makers.stored_forms import STORED

TEXTS = [[3 + 7 * i % 400 for i in range(300)], [5, 6]]  # more rows than are computed at once


def test_they_are_those_of_transformers(tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    layers: list[str] = []
    found = true_tops(str(tiny_checkpoint), TEXTS, 4, layers.append)
    assert layers == ["layer 1 of 2", "layer 2 of 2"]
    for ids, (chosen, tops) in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            truth = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert len(chosen) == len(tops) == len(ids) - 1
        own = truth[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(chosen), own, atol=1e-4, rtol=1e-4)
        values, tokens = truth[:-1].topk(4)
        assert [set(top) for top in tops] == [set(row) for row in tokens.tolist()]
        told = torch.tensor([sorted(top.values(), reverse=True) for top in tops])
        torch.testing.assert_close(told, values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["deepseek fp8", "awq"])
def test_a_quantised_checkpoints_are_those_of_the_weights_that_it_means(
    kind: str, tmp_path: Path
) -> None:
    pair = write_quantized(kind, tmp_path, kinds={**KINDS, **STORED})
    found, wanted = (true_tops(str(path), TEXTS[1:], 2) for path in pair)
    assert found[0][0] == pytest.approx(wanted[0][0], abs=1e-5)


def test_what_is_no_source_of_these_texts_is_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(EnginehouseError, match="give the checkpoint that the engine was made of"):
        true_tops(str(tiny_checkpoint), [[1, 10**6]], 4)
    with pytest.raises(EnginehouseError):
        true_tops(str(tmp_path / "none"), TEXTS, 4)
