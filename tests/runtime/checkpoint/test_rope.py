"""Frequencies and magnitudes of every scaling against transformers' own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Phi3Config, PhimoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.runtime.checkpoint.rope import Rotary, rotary_frequencies, rotate
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError

SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
SHORT, LONG = [1.0 + i / 64 for i in range(32)], [1.0 + i for i in range(32)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": YARN,
    "yarn, its length left out": {"rope_type": "yarn", "factor": 4.0},
    "yarn, its betas": {**YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn, no truncation": {**YARN, "truncate": False},
    "yarn, a magnitude": {**YARN, "attention_factor": 0.75},
    "yarn, mscales": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2},
    "longrope": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    "longrope, a factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 16.0,
    },
    "longrope, a magnitude": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "attention_factor": 1.19,
    },
}


def converted(hf: Any, architecture: str) -> ModelConfig:
    return model_config({**hf.to_dict(), "architectures": [architecture]}, "float32")


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("context", [512, 4096])
def test_frequencies_equal_transformers(name: str, context: int) -> None:
    longrope = name.startswith("longrope")
    rope = {**SCALINGS[name], "rope_theta": 5e5}
    kind: Any = LlamaConfig
    if longrope:
        kind = Phi3Config
        hf = kind(
            **SIZES, rope_parameters=rope, original_max_position_embeddings=1024, pad_token_id=0
        )
    else:
        hf = kind(**SIZES, rope_parameters=rope)
    function = ROPE_INIT_FUNCTIONS[str(rope["rope_type"])]
    inverse, magnitude = function(hf, torch.device("cpu"), seq_len=context)
    config = converted(hf, "Phi3ForCausalLM" if longrope else "LlamaForCausalLM")
    found = rotary_frequencies(config, context)
    torch.testing.assert_close(found.inverse, inverse, rtol=1e-6, atol=0)
    assert found.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize("context", [512, 4096])
def test_a_phimoes_magnitudes_are_transformers(context: int) -> None:
    """Those of short and of long contexts, which no other family has apart."""
    magnitudes = {"short_mscale": 1.25, "long_mscale": 1.5}
    rope = {**SCALINGS["longrope"], **magnitudes, "original_max_position_embeddings": 1024}
    hf: Any = PhimoeConfig(**SIZES, rope_parameters={**rope, "rope_theta": 5e5}, pad_token_id=0)
    inverse, _ = ROPE_INIT_FUNCTIONS["longrope"](hf, torch.device("cpu"), seq_len=context)
    cos, _ = PhimoeRotaryEmbedding(hf)(torch.zeros(1), torch.tensor([[0, context - 1]]))
    found = rotary_frequencies(converted(hf, "PhiMoEForCausalLM"), context)
    torch.testing.assert_close(found.inverse, inverse, rtol=1e-6, atol=0)
    assert found.magnitude == pytest.approx(float(cos[0, 0, 0]))


def test_the_old_spelling_of_a_scaling_gives_the_same_frequencies() -> None:
    new = converted(
        LlamaConfig(**SIZES, rope_parameters={**YARN, "rope_theta": 1e6}), "LlamaForCausalLM"
    )
    old = {key: value for key, value in YARN.items() if key != "rope_type"}
    hf = {**SIZES, "rope_scaling": {**old, "type": "yarn"}, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    spelt = model_config({**hf, "architectures": ["LlamaForCausalLM"]}, "float32")
    first, second = rotary_frequencies(new, 64), rotary_frequencies(spelt, 64)
    assert torch.equal(first.inverse, second.inverse) and first.magnitude == second.magnitude


LLAMA3 = SCALINGS["llama3"]
GLOBAL = {"full_attention": {"rope_type": "default", "rope_theta": 2e5}}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("Llama", {"rope_scaling": {**LLAMA3, "rope_theta": 5e5}}),
        ("Llama", {"rope_scaling": {**LLAMA3, "rope_theta": 5e5}, "rope_theta": 1e5}),
        (
            "Llama",
            {
                "rope_scaling": LLAMA3,
                "rope_theta": 1e5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
        ),
        ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_theta": 1e5}),
        ("Llama", {"rope_parameters": LLAMA3, "rope_theta": 1e5}),
        ("Gemma3", {"rope_scaling": SCALINGS["linear"], "rope_theta": 1e5}),
        ("Gemma3", {"rope_scaling": SCALINGS["linear"], "rope_parameters": GLOBAL}),
    ],
)
def test_of_several_spellings_the_one_that_transformers_takes_counts(
    kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    names = [f"{kind}ForCausalLM"]
    model_type = {"Gemma3": "gemma3_text"}.get(kind, kind.lower())
    config = {**SIZES, **keys, "rms_norm_eps": 1e-6, "model_type": model_type, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert "rope_scaling" not in whole
    found, wanted = (
        model_config({**hf, "architectures": names}, "float32") for hf in (config, whole)
    )
    assert (found.rotary_base, found.rotary_scaling) == (wanted.rotary_base, wanted.rotary_scaling)
    key = "rope_local_base_freq"
    assert found.extra.get(key) == wanted.extra.get(key)


def test_elements_beyond_the_rotated_ones_stay() -> None:
    hf = Phi3Config(
        **SIZES, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}, pad_token_id=0
    )
    config = converted(hf, "Phi3ForCausalLM")
    assert config.rotary_dim == 32
    x = torch.randn(7, 4, 64, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, Rotary(config, 7).at(torch.arange(7))[0])
    assert torch.equal(turned[..., 32:], x[..., 32:])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned[1:, :, :32], x[1:, :, :32])


def test_an_unknown_scaling_is_refused_by_name() -> None:
    config = converted(LlamaConfig(**SIZES), "LlamaForCausalLM").to_dict()
    damaged = ModelConfig.from_dict({**config, "rotary_scaling": {"type": "magic"}})
    with pytest.raises(
        EngineError, match="type 'magic' .* linear, dynamic, llama3, yarn, longrope"
    ):
        rotary_frequencies(damaged, 64)
