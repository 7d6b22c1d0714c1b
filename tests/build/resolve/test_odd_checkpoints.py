"""Checkpoints as they are met in the wild: read for what they are, or refused by that name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from enginehouse.build import cli
from enginehouse.build.forms.weight_forms import QUANT_CONFIGS
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.errors import CheckpointError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.decoder import causal_attention
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import build_engine, write_tiny_checkpoint
from makers.family_models import load_family, logits_of, save_family
from makers.gguf_writer import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

Capture = pytest.CaptureFixture[str]
VOCAB = 512


def edit_json(path: Path, **changes: Any) -> None:
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(data))


def edit_tokenizer(path: Path, edit: Callable[[Tokenizer], object]) -> None:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    edit(tokenizer)
    tokenizer.save(str(path / "tokenizer.json"))


def add_plain(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens(["Water", " the", "primary"])


def add_special(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three words of the calibration text were added to the tokenizer, and not to the model."""
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("odd") / "extended")
    edit_tokenizer(path, add_plain)
    return path


@pytest.mark.parametrize("quant", QUANT_CONFIGS)
@pytest.mark.parametrize("flags", [(), ("--plan",), ("--until=convert",)])
def test_tokens_beyond_the_vocabulary_are_refused_at_plan_time(
    extended: Path, quant: str, flags: tuple[str, ...], tmp_path: Path, capsys: Capture
) -> None:
    words = [str(extended), "-o", str(tmp_path / "e"), "--quiet", "--quant", quant, *flags]
    assert cli.main(words) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and out == "" and not (tmp_path / "e").exists()
    for words in (f"vocab_size={VOCAB}", "id 514 ('primary')", "resize_token_embeddings(515)"):
        assert words in error


def test_a_tokenizer_that_fits_mends_one_that_does_not(
    extended: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = [str(extended), "-o", str(tmp_path / "e"), "--quiet", "--until", "compile"]
    assert cli.main([*words, "--tokenizer", str(tiny_checkpoint)]) == 0
    assert cli.main([*words, "--tokenizer", str(tiny_checkpoint), "--plan"]) == 0
    capsys.readouterr()


def test_special_tokens_beyond_the_vocabulary_are_noted_and_the_model_built(
    tmp_path: Path, capsys: Capture
) -> None:
    """As Gemma 3's of 1B has a token for images, which it never sees."""
    path = write_tiny_checkpoint(tmp_path / "m")
    edit_tokenizer(path, add_special)
    assert cli.main([str(path), "-o", str(tmp_path / "e"), "--quant", "int4"]) == 0
    assert "vocab_size=512, but" in (note := capsys.readouterr().err) and "'<pad>'" in note
    edit_json(path / "config.json", bos_token_id=VOCAB)  # but each prompt begins with this one
    assert cli.main([str(path), "-o", str(tmp_path / "e"), "--quiet"]) == 2
    assert "up to id 512 ('<pad>')" in capsys.readouterr().err


def test_tokens_of_a_unigram_tokenizer_are_counted_by_their_place(
    tmp_path: Path, capsys: Capture
) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    vocab = [["<unk>", 0.0], *([f"w{i}", -1.0] for i in range(VOCAB))]
    data = {"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}}
    (path / "tokenizer.json").write_text(json.dumps(data))
    assert cli.main([str(path), "--plan"]) == 2
    assert "1 token(s) beyond it, up to id 512 ('w511')" in capsys.readouterr().err


def test_a_gguf_file_with_more_tokens_than_rows_is_refused(extended: Path, tmp_path: Path) -> None:
    data = json.loads((extended / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {word: VOCAB + i for i, word in enumerate(["Ax", "Bx", "Cx"])}
    path = write_tiny_checkpoint(tmp_path / "m")
    (path / "tokenizer.json").write_text(json.dumps(data))
    write_gguf(tmp_path / "x.gguf", open_checkpoint(path))
    with pytest.raises(CheckpointError, match="515 tokens, .* embedding ends after 512"):
        resolve_source(str(tmp_path / "x.gguf"), tmp_path)


CONFIG: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("LlamaForCausalLM", ("silu", "swish")),
        ("MixtralForCausalLM", ("silu", "swish")),
        ("Gemma2ForCausalLM", ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")),
    ],
)
def test_an_activation_has_all_of_its_names(family: str, words: tuple[str, ...]) -> None:
    """transformers' functions of these names are one."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 101)
    configs, values = [], []
    for word in words:
        hf = {**CONFIG, "architectures": [family], "hidden_act": word}
        configs.append(model_config(hf, "auto"))
        values.append(ACT2FN[word](x))
    assert all(config == configs[0] for config in configs)
    for value in values:
        torch.testing.assert_close(value, values[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "family", ["Mistral", "Mixtral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma2", "Gemma3"]
)
def test_a_sliding_window_of_zero_is_none(family: str) -> None:
    hf = {**CONFIG, "architectures": [f"{family}ForCausalLM"], "use_sliding_window": True}
    hf["max_window_layers"] = 0
    none, zero, whole, short = (
        model_config({**hf, "sliding_window": window}, "auto") for window in (None, 0, 256, 16)
    )
    assert none == zero == whole != short
    assert "max_attention_window" not in zero.extra and "max_attention_window" in short.extra


def qwen_as_llama(path: Path, **config: Any) -> Path:
    """A Qwen2's tensors under a Llama's name."""
    save_family("qwen2-tied", path)
    edit_json(path / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    edit_json(path / "config.json", **config)
    return path


@pytest.mark.parametrize("said", [{"attention_bias": True}, {}, {"qkv_bias": True}])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_llama_with_biases_on_q_k_v_alone_answers_as_the_qwen_that_it_is(
    said: dict[str, bool], tp: int, tmp_path: Path
) -> None:
    source = resolve_source(str(qwen_as_llama(tmp_path / "m", **said)), tmp_path)
    built = build_engine(source, tmp_path / "e", tp=tp, dtype="float32", until="compile")
    executor = open_executor(built, ExecutorOptions(compute_dtype="float32"))
    assert isinstance(executor, TorchExecutor)
    ids = torch.arange(40, 75)
    model = executor.runner.model
    found = model.logits(model.hidden_states(ids, torch.arange(len(ids)), causal_attention))
    truth = logits_of(load_family(save_family("qwen2-tied", tmp_path / "qwen")), ids.tolist())
    torch.testing.assert_close(found, truth, atol=2e-4, rtol=2e-4)
    zeros = executor.engine.config.attn_bias
    assert zeros, "TensorRT-LLM's Llama has all four biases or none"


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        ("model.layers.1.self_attn.k_proj.bias", "k_proj.bias is missing"),
        ("model.layers.0.input_layernorm.weight", "input_layernorm.weight is missing"),
    ],
)
def test_a_damaged_one_is_still_refused(damage: str, wanted: str, tmp_path: Path) -> None:
    path = qwen_as_llama(tmp_path / "m", attention_bias=True)
    tensors = load_file(path / "model.safetensors")
    del tensors[damage]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=wanted):
        build_engine(resolve_source(str(path), tmp_path), tmp_path / "e")


def test_biases_that_config_json_denies_are_refused(tmp_path: Path) -> None:
    path = qwen_as_llama(tmp_path / "m", attention_bias=False)
    with pytest.raises(CheckpointError, match="a bias that config.json does not announce"):
        build_engine(resolve_source(str(path), tmp_path), tmp_path / "e")


def test_one_bias_of_o_that_is_lost_is_not_taken_for_none(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "m", attention_bias=True)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.bias"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="layers.1.self_attn.o_proj.bias is missing"):
        build_engine(resolve_source(str(path), tmp_path), tmp_path / "e")


def test_an_empty_quantization_config_is_none(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    edit_json(path / "config.json", quantization_config={})
    source = resolve_source(str(path), tmp_path)
    assert source.quantized is None
    assert model_config(open_checkpoint(path).config, "auto") == model_config(source.config, "auto")
    built = build_engine(source, tmp_path / "e", quant="int4", until="convert", format="hf")
    assert json.loads((built / "config.json").read_text())["quantization_config"] != {}
    plain = build_engine(source, tmp_path / "p", until="convert", format="hf")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())


LORA = {"peft_type": "LORA", "base_model_name_or_path": "acme/base-7b"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"adapter_config.json": LORA, "adapter_model.safetensors": {}}, "merge_and_unload"),
        ({"adapter_config.json": LORA, "adapter_model.bin": {}}, "base model (acme/base-7b)"),
        (
            {"adapter_config.json": LORA, "adapter_model.safetensors": {}, "config.json": CONFIG},
            "LoRA adapter alone",
        ),
        ({"params.json": {}, "consolidated.safetensors": {}}, "(consolidated.safetensors, params"),
        ({"params.json": {}, "consolidated.00.pth": {}}, "(consolidated.00.pth, params.json)"),
    ],
)
def test_a_folder_of_another_kind_says_what_it_is(
    files: dict[str, Any], wanted: str, tmp_path: Path, capsys: Capture
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert cli.main([str(tmp_path), "--plan"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error and wanted in error


def test_a_model_beside_which_an_adapter_lies_is_still_read(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    (path / "adapter_config.json").write_text(json.dumps(LORA))
    (path / "params.json").write_text("{}")
    assert resolve_source(str(path), tmp_path).has_weights
