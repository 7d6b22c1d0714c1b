"""Each trap, in a checkpoint that is sound else, is seen by its rule, and mended if it can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from enginehouse.build.check.mend import mend
from enginehouse.build.check.rules import RULES, RUNTIMES, faults_of
from enginehouse.build.check.stored import Stored
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.errors import CheckpointError
from enginehouse.verbs.main import main
from makers.engines import build_engine
from makers.family_models import save_family

Tensors = dict[str, Tensor]
Config = dict[str, Any]
Q, GATE = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 in ModelOpt's layout, as `--format hf` writes it, with FP8 keys and values."""
    path = tmp_path_factory.mktemp("check")
    source = open_checkpoint(save_family("llama", path / "llama"))
    choices: dict[str, Any] = {"format": "hf", "quant": "fp8", "kv_cache_dtype": "fp8"}
    built = build_engine(source, path / "fp8", exclude="*.1.mlp.*", **choices)
    (built / "tokenizer_config.json").write_text("{}")
    return built


def broken(sound: Path, folder: Path, change: Callable[[Tensors, Config], object]) -> Path:
    """A copy with a change to its tensors and its quantization_config."""
    shutil.copytree(sound, folder)
    (folder / "hf_quant_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def found(folder: Path, *runtimes: str) -> dict[str, list[str]]:
    """By the rules' names, where each fault is."""
    told: dict[str, list[str]] = {}
    for rule, fault in faults_of(Stored(folder), frozenset(runtimes or RUNTIMES)):
        told.setdefault(rule.name, []).append(fault.where)
    return told


def listed(config: Config) -> list[str]:
    entries: list[str] = config["quantization_config"]["ignore"]
    return entries


def without_scale(tensors: Tensors, module: str) -> None:
    for word in ("weight_scale", "input_scale"):
        tensors.pop(f"{module}.{word}")


def plain(tensors: Tensors, module: str) -> None:
    without_scale(tensors, module)
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].to(torch.bfloat16)


def quantised(tensors: Tensors, module: str) -> None:
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].to(torch.float8_e4m3fn)
    for word in ("weight_scale", "input_scale"):
        tensors[f"{module}.{word}"] = torch.tensor(0.5)


def no_kv_scales(tensors: Tensors, config: Config) -> None:
    for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]:
        del tensors[name]


def renamed(tensors: Tensors, config: Config) -> None:
    entries = listed(config)
    entries[:] = [name.replace("model.", "language_model.model.", 1) for name in entries]


BREAKS: dict[str, tuple[Callable[[Tensors, Config], object], dict[str, list[str]]]] = {
    "a module that the list leaves out": (
        lambda t, c: listed(c).remove(GATE),
        {"unlisted": [GATE]},
    ),
    "a part of a fused module that stayed as it was": (
        lambda t, c: (plain(t, Q), listed(c).append(Q)),
        {"mixed": ["model.layers.0.self_attn.qkv_proj"]},
    ),
    "an entry for what is quantised": (lambda t, c: listed(c).append(Q), {"listed": [Q]}),
    "a head that is quantised": (
        lambda t, c: (quantised(t, "lm_head"), listed(c).remove("lm_head")),
        {"head": ["lm_head"]},
    ),
    "a head that is quantised and listed": (
        lambda t, c: quantised(t, "lm_head"),
        {"listed": ["lm_head"]},
    ),
    "no scale": (lambda t, c: without_scale(t, Q), {"missing-scale": [Q]}),
    "no scale of activations": (
        lambda t, c: t.pop(f"{Q}.input_scale"),
        {"missing-scale": [Q]},
    ),
    "a scale of nothing": (
        lambda t, c: t.update({f"{Q}.input_scale": torch.tensor(0.0)}),
        {"odd-scale": [f"{Q}.input_scale"]},
    ),
    "a scale that is no number": (
        lambda t, c: t.update({f"{Q}.input_scale": torch.tensor(float("nan"))}),
        {"odd-scale": [f"{Q}.input_scale"]},
    ),
    "scales apart": (
        lambda t, c: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"] * 2}),
        {"apart-scales": ["model.layers.0.self_attn.qkv_proj"]},
    ),
    "a head that is not the embedding": (
        lambda t, c: c.update(tie_word_embeddings=True),
        {"tied": ["lm_head"]},
    ),
    "no scales of keys and values": (no_kv_scales, {"kv-scales": ["kv_cache_scheme"]}),
    "keys and values in four bits": (
        lambda t, c: c["quantization_config"]["kv_cache_scheme"].update(num_bits=4),
        {"kv-scales": ["kv_cache_scheme"]},
    ),
    "scales of whole tensors apart": (
        lambda t, c: t.update(
            {
                f"{Q.replace('q_', n)}.weight_scale_2": torch.tensor(i + 1.0)
                for i, n in enumerate(("q_", "k_", "v_"))
            }
        ),
        {"apart-scales": ["model.layers.0.self_attn.qkv_proj"]},
    ),
    "a power of two that is no number": (
        lambda t, c: t.update({f"{Q}.weight_scale": torch.tensor([[0, 255]], dtype=torch.uint8)}),
        {"odd-scale": [f"{Q}.weight_scale"]},
    ),
    "parts of a fused module in forms of their own": (
        lambda t, c: c["quantization_config"].update(
            quantized_layers={
                Q: {"quant_algo": "NVFP4"},
                Q.replace("q_", "k_"): {"quant_algo": "FP8"},
                Q.replace("q_", "v_"): {"quant_algo": "FP8"},
            }
        ),
        {"forms-apart": ["model.layers.0.self_attn.qkv_proj"]},
    ),
    "a part that ends within a block": (
        lambda t, c: c["quantization_config"].update(weight_block_size=[96, 128]),
        {"blocks": ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"]},
    ),
    "groups that do not fit": (
        lambda t, c: c["quantization_config"].update(group_size=96),
        {"group-size": []},
    ),
}
MENDED = (
    "a module that the list leaves out",
    "an entry for what is quantised",
    "a head that is not the embedding",
)


def test_a_sound_checkpoint_has_no_fault(sound: Path) -> None:
    told = found(sound, "vllm-0.33", "trtllm-1.2.1", "trtllm-1.4")
    told.pop("apart-scales", None)  # of weights that were rounded each by itself
    assert told == {}


@pytest.mark.parametrize("name", BREAKS)
def test_each_trap_is_seen_by_its_rule(sound: Path, tmp_path: Path, name: str) -> None:
    change, wanted = BREAKS[name]
    folder = broken(sound, tmp_path / "b", change)
    before, told = found(sound), found(folder)
    for rule, places in wanted.items():
        assert told[rule] and (not places or set(places) <= set(told[rule])), told
    extra = {rule for rule in told if rule not in before}
    assert extra <= wanted.keys(), told
    if name in MENDED:
        changes = [f.change for _, f in faults_of(Stored(folder), frozenset(RUNTIMES)) if f.change]
        mend(folder, changes, tmp_path / "mended")
        again = found(tmp_path / "mended")
        assert not wanted.keys() & again.keys(), again
        weights = [path / "model.safetensors" for path in (folder, tmp_path / "mended")]
        assert weights[0].samefile(weights[1]), "the weights are the same file"


def test_names_of_another_spelling_are_told_apart_and_mended(sound: Path, tmp_path: Path) -> None:
    folder = broken(sound, tmp_path / "b", renamed)
    told = found(folder, "vllm-0.33")
    assert len(told["foreign-names"]) == 4 and len(told["unlisted"]) == 3
    changes = [f.change for _, f in faults_of(Stored(folder), frozenset(RUNTIMES)) if f.change]
    mend(folder, changes, tmp_path / "mended")
    again = found(tmp_path / "mended", "vllm-0.33")
    assert "unlisted" not in again


def test_sglang_looks_for_a_fused_name(sound: Path, tmp_path: Path) -> None:
    fused = "model.layers.1.mlp.gate_up_proj"
    assert found(sound, "sglang-0.5")["fused-names"] == [fused]
    assert "fused-names" not in found(sound, "vllm-0.33")
    changes = [f.change for _, f in faults_of(Stored(sound), frozenset({"sglang-0.5"})) if f.change]
    mend(sound, changes, tmp_path / "mended")
    assert "fused-names" not in found(tmp_path / "mended", "sglang-0.5")
    for name, key, where in (
        ("config.json", "ignore", "quantization_config"),
        ("hf_quant_config.json", "exclude_modules", "quantization"),
    ):
        assert fused in json.loads((tmp_path / "mended" / name).read_text())[where][key]


def test_files_that_are_missing_are_named(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(sound, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    assert found(folder)["files"] == ["tokenizer.json", "tokenizer_config.json"]


def test_every_rule_has_a_break_here() -> None:
    seen = {rule for _, wanted in BREAKS.values() for rule in wanted}
    assert seen | {"fused-names", "foreign-names", "files"} == {rule.name for rule in RULES}


def test_the_verb_says_what_it_found_and_ends_so(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken(sound, tmp_path / "b", BREAKS["a module that the list leaves out"][0])
    asked = ["check", str(folder), "--for", "vllm-0.33"]
    assert main([*asked, "--fix", str(tmp_path / "mended")]) == 1
    said = capsys.readouterr().out
    assert f"unlisted [vllm-0.33] does not load: {GATE} is stored as it was" in said
    assert "(--fix mends it)" in said and "mended 1 of" in said
    assert main(["check", str(tmp_path / "mended"), "--for", "vllm-0.33"]) == 0
    with pytest.raises(CheckpointError, match="is there already; name another folder"):
        mend(folder, [], tmp_path / "mended")
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    with pytest.raises(SystemExit):
        main(["check", str(folder), "--for", "ollama"])
    assert "ollama is not known; choose among vllm-0.33" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
