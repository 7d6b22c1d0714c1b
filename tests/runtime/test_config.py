"""config.json of an engine with values of a wrong kind: one sentence, which names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.errors import EngineError

GOOD: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
WRONG: list[tuple[str, Any]] = [
    *[("vocab_size", value) for value in ("512", [], True, 0, -1, 1.5, 10**400, float("nan"))],
    ("num_attention_heads", 0),
    ("head_size", {}),
    ("norm_epsilon", []),
    ("rotary_base", 10**400),
    ("moe", {"num_experts": "four"}),
    ("moe", [1]),
    ("rotary_scaling", "yarn"),
    ("mapping", {"tp_size": "two"}),
    ("mapping", {"pp_size": 10**9}),
    *[("quantization", {"exclude_modules": value}) for value in (False, 0, "", {}, [1])],
    ("quantization", {"group_size": "all"}),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{k} {v!r}"[:40] for k, v in WRONG])
def test_a_value_of_a_wrong_kind_is_named(key: str, value: Any) -> None:
    assert ModelConfig.from_dict(GOOD).head_size == 32
    name = next(iter(value)) if isinstance(value, dict) and value and key != "moe" else key
    name = "num_experts" if isinstance(value, dict) and "num_experts" in value else name
    with pytest.raises(EngineError, match=f"{name}="):
        ModelConfig.from_dict({**GOOD, key: value})


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "[]", "5", "\xff"])
def test_what_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EngineError, match="config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_config": [GOOD]}))
    with pytest.raises(EngineError, match="holds no JSON object of a model"):
        read_config(tmp_path)
