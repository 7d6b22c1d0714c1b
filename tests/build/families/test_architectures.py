"""Hugging Face's words become TensorRT-LLM's, and what cannot be run is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from enginehouse.build.families.architectures import stage_rows
from enginehouse.build.families.rows import TensorRow
from enginehouse.build.families.shapes import check_tensors, expected_shapes
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.source import TensorInfo
from enginehouse.runtime.config import Mapping as GpuMapping
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Headers:
    """A TensorSource of which only the headers exist."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


def test_a_llama_config_is_translated_word_by_word() -> None:
    config = model_config(LLAMA, "auto").to_dict()
    wanted = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "num_key_value_heads": 8,
        "head_size": 128,
        "norm_epsilon": 1e-05,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 500000.0,
        "rotary_scaling": None,
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "remove_duplicated_kv_heads": False,
    }
    assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
        {"rope_scaling": {"type": "llama3", **LLAMA3_ROPE}},
        {
            "rope_theta": None,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE},
        },
    ],
)
def test_every_spelling_of_rope_scaling_is_written_one_way(rope: dict[str, Any]) -> None:
    config = model_config({**LLAMA, **rope}, "auto")
    assert config.rotary_base == 500000.0
    assert config.rotary_scaling == {"type": "llama3", "rope_type": "llama3", **LLAMA3_ROPE}


@pytest.mark.parametrize(
    "rope",
    [{"rope_scaling": {"rope_type": "default"}}, {"rope_parameters": {"rope_type": "default"}}],
)
def test_the_default_rope_is_no_scaling(rope: dict[str, Any]) -> None:
    assert model_config({**LLAMA, **rope}, "auto").rotary_scaling is None


@pytest.mark.parametrize(
    ("asked", "keys", "wanted"),
    [
        ("auto", {}, "bfloat16"),
        ("auto", {"torch_dtype": "float16"}, "float16"),
        ("auto", {"torch_dtype": "float16", "dtype": "torch.bfloat16"}, "bfloat16"),
        ("auto", {"torch_dtype": "float32"}, "bfloat16"),
        ("auto", {"torch_dtype": None}, "bfloat16"),
        ("float32", {}, "float32"),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_asked(
    asked: str, keys: dict[str, Any], wanted: str
) -> None:
    assert model_config({**LLAMA, **keys}, asked).dtype == wanted


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"architectures": ["BertModel"]}, "BertModel is not supported; choose .*Llama.*Mistral"),
        ({"architectures": None}, "has no architectures"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"rms_norm_eps": None}, "has no rms_norm_eps"),
        ({"vocab_size": "many"}, "has vocab_size='many'; wanted a positive number"),
        ({"num_hidden_layers": 2.5}, "=2.5; wanted a whole number from 1 to 10000"),
        ({"num_attention_heads": 0}, "has num_attention_heads=0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5 does not divide"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; wanted 'silu'"),
        ({"rope_scaling": {"rope_type": "magic"}}, "rope type 'magic'; wanted none or one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no factor"),
        ({"rope_parameters": {"full_attention": {}}}, "for each layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not known"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq': .* quantised"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps=nan"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(keys: dict[str, Any], wanted: str) -> None:
    with pytest.raises(CheckpointError, match=wanted):
        model_config({**LLAMA, **keys}, "auto")


def test_an_explicit_head_size_wins() -> None:
    nemo = {"architectures": ["MistralForCausalLM"], "hidden_size": 5120, "head_dim": 128}
    assert model_config({**LLAMA, **nemo}, "auto").head_size == 128


def config_with(**changes: Any) -> ModelConfig:
    return model_config({**LLAMA, **changes}, "auto")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_biases_and_the_head_are_read_when_config_json_announces_them(
    tied: bool, biases: bool
) -> None:
    names = set(
        expected_shapes(
            config_with(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
        )
    )
    assert ("lm_head.weight" in names) != tied
    found = {name.split(".")[-2] for name in names if name.endswith(".bias")}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert found == (every if biases else set())


def test_stages_renumber_their_layers_and_keep_the_sources() -> None:
    config = config_with().with_mapping(GpuMapping(1, 2))
    first, second = stage_rows(config, 0), stage_rows(config, 1)
    assert first[0].target == "transformer.vocab_embedding.weight"
    assert [row.target for row in second[-2:]] == ["transformer.ln_f.weight", "lm_head.weight"]
    assert second[0].target == "transformer.layers.0.input_layernorm.weight"
    assert second[0].sources == ("model.layers.3.input_layernorm.weight",)
    fused = next(row for row in first if row.target.endswith("layers.2.attention.qkv.weight"))
    assert fused.sources == tuple(f"model.layers.2.self_attn.{x}_proj.weight" for x in "qkv")


def test_each_target_reads_its_own_source() -> None:
    rows = {row.target: row.sources for row in stage_rows(config_with(), 0)}
    wanted = {
        "attention.dense": "self_attn.o_proj",
        "mlp.fc": "mlp.gate_proj",  # TensorRT-LLM computes act(fc(x)) * gate(x)
        "mlp.gate": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
        "input_layernorm": "input_layernorm",
        "post_layernorm": "post_attention_layernorm",
    }
    for target, name in wanted.items():
        found = rows[f"transformer.layers.4.{target}.weight"]
        assert found == (f"model.layers.4.{name}.weight",)


def test_a_tied_head_reads_the_embedding() -> None:
    head = stage_rows(config_with(tie_word_embeddings=True), 0)[-1]
    assert head == TensorRow("lm_head.weight", ("model.embed_tokens.weight",))


def test_complete_headers_pass() -> None:
    config = config_with(attention_bias=True)
    check_tensors(Headers({**expected_shapes(config), "rotary.inv_freq": (64,)}), config)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("lm_head.weight", None, "tensor lm_head.weight is missing .*tie_word_embeddings"),
        ("model.norm.weight", None, "tensor model.norm.weight is missing"),
        ("model.norm.weight", (4095,), r"has shape \[4095\]; config.json implies \[4096\]"),
    ],
)
def test_a_tensor_at_fault_is_named(name: str, shape: tuple[int, ...] | None, wanted: str) -> None:
    config = config_with()
    shapes: dict[str, Any] = {**expected_shapes(config), name: shape}
    source = Headers({key: value for key, value in shapes.items() if value is not None})
    with pytest.raises(CheckpointError, match=wanted):
        check_tensors(source, config)


def test_quantised_weights_are_not_taken_for_plain_ones() -> None:
    config = config_with()
    source = Headers(expected_shapes(config))
    name = "model.layers.0.mlp.up_proj.weight"
    source.infos[name] = source.infos[name]._replace(dtype=torch.int8)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} has dtype int8")):
        check_tensors(source, config)
