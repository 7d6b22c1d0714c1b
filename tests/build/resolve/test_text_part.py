"""The text models of checkpoints with a tower for images, against transformers' whole models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.decoder import causal_attention
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import build_engine, train_tokenizer
from makers.family_models import DELTA, FAMILIES, SIZES, VOCAB, save_family

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = [7 * i % 500 + 3 for i in range(40)]
TEXT = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
TOWER = dict(hidden_size=32, num_attention_heads=2, intermediate_size=32, patch_size=14)
QWEN_TOWER = dict(
    depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=TEXT["hidden_size"]
)
MROPE = {"rope_theta": 1e6, "mrope_section": [4, 6, 6]}


def mistral3() -> PreTrainedModel:
    text = {**TEXT, "model_type": "mistral", "head_dim": 64, "sliding_window": None}
    tower = {**TOWER, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28}
    config = transformers.Mistral3Config(text_config=text, vision_config=tower, dtype="float32")
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen2_5_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", **MROPE}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=QWEN_TOWER,
        dtype="float32",
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_interleaved": True, **MROPE}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 32, "rope_parameters": rope},
        vision_config={**QWEN_TOWER, "deepstack_visual_indexes": [0]},
        dtype="float32",
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen3_5() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_interleaved": True, **MROPE, "mrope_section": [2, 1, 1]}
    config = transformers.Qwen3_5Config(
        text_config={**TEXT, **DELTA, "rope_parameters": rope, "partial_rotary_factor": 0.25},
        vision_config={**QWEN_TOWER, "num_position_embeddings": 16},
        dtype="float32",
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def gemma4() -> PreTrainedModel:
    tower = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        position_embedding_size=64,
    )
    text = {**TEXT, **FAMILIES["gemma4-small"][1]}
    config = transformers.Gemma4Config(text_config=text, vision_config=tower, dtype="float32")
    return transformers.Gemma4ForConditionalGeneration(config)


def gemma4_unified() -> PreTrainedModel:
    text = {**TEXT, **FAMILIES["gemma4"][1]}
    for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
        text.pop(name)
    config = transformers.Gemma4UnifiedTextConfig(**text, dtype="float32")
    return transformers.Gemma4UnifiedForCausalLM(config)


WHOLES = {
    "mistral3": mistral3,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "qwen3.5": qwen3_5,
    "gemma4": gemma4,
    "gemma4-unified": gemma4_unified,
}


def saved(name: str, path: Path) -> PreTrainedModel:
    torch.manual_seed(5)
    whole = WHOLES[name]().eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    whole.save_pretrained(path)
    train_tokenizer(VOCAB).save(str(path / "tokenizer.json"))
    return whole


def answers_as(whole: PreTrainedModel, path: Path, output: Path) -> None:
    source = resolve_source(str(path), path)
    built = build_engine(source, output, dtype="float32", until="compile", tp=2)
    executor = open_executor(built, ExecutorOptions(compute_dtype="float32"))
    assert isinstance(executor, TorchExecutor)
    ids, model = torch.tensor(IDS), executor.runner.model
    found = model.logits(model.hidden_states(ids, torch.arange(len(ids)), causal_attention))
    with torch.inference_mode():
        truth = whole(ids[None]).logits[0]
    torch.testing.assert_close(found, truth, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", WHOLES)
def test_a_text_model_equals_the_whole(name: str, tmp_path: Path) -> None:
    answers_as(saved(name, tmp_path / "whole"), tmp_path / "whole", tmp_path / "e")


def test_a_gemma_3ns_text_is_taken_out_of_the_whole(tmp_path: Path) -> None:
    """As transformers' own whole wants a tower that needs more packages: the text's tensors under
    their longer names, and one of a tower.
    """
    alone = resolve_source(str(save_family("gemma3n", tmp_path / "text")), tmp_path)
    path = Path(shutil.copytree(tmp_path / "text", tmp_path / "whole"))
    text = json.loads((path / "config.json").read_text())
    whole = {"architectures": ["Gemma3nForConditionalGeneration"], "text_config": text}
    (path / "config.json").write_text(json.dumps({**whole, "model_type": "gemma3n"}))
    tensors = load_file(path / "model.safetensors")
    longer = {f"model.language_model.{k.removeprefix('model.')}": t for k, t in tensors.items()}
    longer["model.vision_tower.weight"] = torch.ones(2, 2)
    save_file(longer, path / "model.safetensors", {"format": "pt"})
    found = resolve_source(str(path), path)
    assert model_config(found.config, "auto") == model_config(alone.config, "auto")
    assert found.tensors.infos == alone.tensors.infos
    assert found.config["architectures"] == ["Gemma3nForCausalLM"]


def test_a_qwen_of_the_older_layout_is_read_too(tmp_path: Path) -> None:
    """Keys of the text beside the tower's, mrope by its older name, and tensors' shorter names."""
    path = tmp_path / "whole"
    whole = saved("qwen2.5-vl", path)
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("rope_parameters")
    flat = {**text, **config, "rope_theta": 1e6}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    (path / "config.json").write_text(json.dumps(flat))
    tensors = load_file(path / "model.safetensors")
    shorter = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    save_file(shorter, path / "model.safetensors", {"format": "pt"})
    answers_as(whole, path, tmp_path / "e")


RELEASED = {
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"model_type": "qwen2_5_vl_text", "hidden_size": 2048, "num_attention_heads": 16},
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        {"model_type": "qwen3_vl_text", "hidden_size": 2560, "num_key_value_heads": 8},
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_what_a_text_config_leaves_out_is_what_transformers_takes(
    name: str, tmp_path: Path
) -> None:
    architecture, text = RELEASED[name]
    kind = {"mistral3": "mistral3", "qwen2.5-vl": "qwen2_5_vl", "qwen3-vl": "qwen3_vl"}[name]
    config = {"architectures": [architecture], "model_type": kind, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    source = resolve_source(str(tmp_path), tmp_path)
    whole = transformers.AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(whole.to_json_string(use_diff=False))
    told = resolve_source(str(tmp_path), tmp_path)
    assert model_config(source.config, "bfloat16") == model_config(told.config, "bfloat16")
