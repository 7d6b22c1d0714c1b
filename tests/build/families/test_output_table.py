"""The contract's tables of Mistral, Qwen2 and Mixtral: what TensorRT-LLM holds after loading."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.forms.weight_forms import OutputTensor
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.plan.build_plan import QUANT_CONFIGS
from enginehouse.build.plan.cuts import check_mapping, choose_group_size
from enginehouse.runtime.config import Mapping
from makers.paths import CONTRACT

TABLES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((CONTRACT / "loaded").glob("*.json"))
}
CASES = [(table, case) for table, data in TABLES.items() for case in data["cases"]]
QUANTS = {"none": "none", "fp8": "fp8", "w4a16_awq": "int4"}
# The models' own config.json, but for the layers: the tables have two.
MODELS: dict[str, dict[str, Any]] = {
    "mistral-7b-v0": {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen2-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def after_loading(name: str, tensor: OutputTensor) -> list[Any]:
    """What the loader makes of a tensor on disk: int4 is turned, and two bytes seen as one."""
    shape = list(tensor.shape)
    if tensor.dtype == "int8":
        return [[shape[1], shape[0] // 2], "bfloat16"]
    if name.endswith("weights_scaling_factor") and tensor.dtype == "bfloat16":
        return [shape[::-1], "bfloat16"]
    return [shape, tensor.dtype]


@pytest.mark.parametrize(("table", "case"), CASES)
def test_rank_files_equal_the_contract_after_loading(table: str, case: str) -> None:
    tp, pp = (int(number) for number in re.findall(r"\d+", case))
    common = {"num_hidden_layers": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
    config = model_config({**MODELS[table.split(".")[0]], **common}, "auto")
    check_mapping(config, tp)
    config = config.with_mapping(Mapping(tp, pp))
    quantization = QUANT_CONFIGS[QUANTS[table.split(".")[-1]]]
    if quantization.quant_algo == "W4A16_AWQ":
        assert choose_group_size(config, 128) == 128
    config = replace(config, quantization=quantization)
    found = {n: after_loading(n, tensor) for n, tensor in output_tensors(config, 0).items()}
    wanted = {
        name: entry
        for name, entry in TABLES[table]["cases"][case].items()
        if not name.endswith("prequant_scaling_factor")  # int4 without AWQ has none
    }
    assert found == wanted


def test_all_loaded_tables_are_there() -> None:
    assert len(TABLES) == 8 and len(CASES) == 24
