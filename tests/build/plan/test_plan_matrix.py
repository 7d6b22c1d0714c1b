"""`--plan` of every family in every form, for every GPU and every backend: a page or a sentence."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from enginehouse.build import cli
from enginehouse.build.families.architectures import ARCHITECTURES
from enginehouse.build.forms.capabilities import GPU_SM, refusal
from enginehouse.build.forms.weight_forms import QUANT_CONFIGS
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.hf_keys.support import NOTES
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.footprint import footprint, print_page
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.runtime.errors import PlanError

Configs = Callable[[str], Path]
# What no family's config can leave out; sizes that every form takes, whole and in two.
SIZES: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
NORMED_BEHIND = (
    *("Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM", "FlexOlmoForCausalLM"),
    "OlmoForCausalLM",  # whose norms do not multiply
)
# Their own tensors hold all experts of a layer.
STACKED = (
    *("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "GptOssForCausalLM"),
    "Llama4ForCausalLM",
)
LATENT = (
    *("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"),
    "YoutuForCausalLM",
)
LINEAR = ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
BEYOND_TENSORRT = (
    *LINEAR,
    *("Gemma3nForCausalLM", "Gemma4ForCausalLM"),
)
# Dense, with windows, with gaps, a mixture, one with shared experts: what a GPU's page counts.
OF_ALL_KINDS = (
    *("LlamaForCausalLM", "Gemma3ForCausalLM", "DeciLMForCausalLM", "MixtralForCausalLM"),
    "Glm4MoeForCausalLM",
)
# Every family in three forms, some in all.
IN_EVERY_FORM = (*OF_ALL_KINDS, *NORMED_BEHIND, *STACKED, *LATENT, *LINEAR)
FAMILY_AND_FORM = [
    (family, quant)
    for family in ARCHITECTURES
    for quant in QUANT_CONFIGS
    if family in IN_EVERY_FORM or quant in ("none", "fp8", "int4")
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Configs:
    """config("Gemma2ForCausalLM"): a folder with its config.json and nothing else."""

    def make(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / "configs" / family
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(
            json.dumps({"architectures": [family], **SIZES, **NOTES[family].keys})
        )
        return path

    return make


def has_experts(family: str) -> bool:
    keys = {"architectures": [family], **SIZES, **NOTES[family].keys}
    return model_config(keys, "bfloat16").num_experts > 0


def has_form(family: str, quant: str) -> bool:
    """Whether TensorRT-LLM's tables know the form for the family (docs/families.md)."""
    return not has_experts(family) or quant in ("none", "fp8")


def has_own_form(family: str, quant: str) -> bool:
    """Whether our own backends run it."""
    return has_form(family, quant) or quant in ("fp8_rowwise", "int4")


@pytest.mark.parametrize(("family", "quant"), FAMILY_AND_FORM)
def test_a_plan_is_a_page_or_one_sentence(
    config: Configs, family: str, quant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_natively = family not in BEYOND_TENSORRT and quant != "w4a8_awq"
    folds = family not in (*NORMED_BEHIND, *LINEAR) or "awq" not in quant
    # Its latents' 576 outputs are no groups of 128, which other runtimes want.
    parted = (family, quant) != ("YoutuForCausalLM", "w4a8_awq")
    cases = {
        "--backend=torch": has_own_form(family, quant),
        "--backend=cpu": has_own_form(family, quant),
        "--backend=tensorrt_llm": has_form(family, quant) and ARCHITECTURES[family].for_trtllm,
        "--backend=tensorrt": has_form(family, quant) and runs_natively,
        "--format=hf": has_form(family, quant) and quant != "int8" and folds and parted,
    }
    for flag, legal in cases.items():
        tp = ["--tp=2"] if flag.startswith("--backend") else []
        status = cli.main([str(config(family)), "--plan", "--quant", quant, flag, *tp])
        page, sentence = capsys.readouterr()
        assert (status, "KV per token" in page) == ((0, True) if legal else (2, False)), sentence
        assert legal or (sentence.count("\n") == 1 and "choose" in sentence), sentence


@pytest.mark.parametrize("quant", QUANT_CONFIGS)
@pytest.mark.parametrize("family", OF_ALL_KINDS)
def test_a_plan_for_each_gpu_is_a_page_or_names_what_it_runs(
    config: Configs, family: str, quant: str
) -> None:
    source = resolve_source(str(config(family)), Path())
    for gpu, sm in GPU_SM.items():
        settings = load_settings({"quant": quant, "gpu": gpu, "until": "plan"})
        if has_own_form(family, quant) and refusal(quant, sm, "auto") is None:
            page = io.StringIO()
            print_page(make_plan(settings, source), Console(file=page))
            assert f"each {gpu} " in page.getvalue()
        else:
            with pytest.raises(PlanError, match="; choose "):
                make_plan(settings, source)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "tensorrt"])
def test_a_mixtures_activations_are_those_of_the_chosen_experts(
    config: Configs, backend: str, tp: int
) -> None:
    """Two of Mixtral's eight: for each token two copies of it, up, gate and their product. In our
    TensorRT network the last three, of all eight.
    """
    source = resolve_source(str(config("MixtralForCausalLM")), Path())
    settings = {"backend": backend, "tp": tp, "until": "plan", "max_num_tokens": 100}
    plan = make_plan(load_settings(settings), source)
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"] // tp
    widest = 8 * 3 * inner if backend == "tensorrt" else 2 * (hidden + 3 * inner)
    tokens = 100 * (2 * hidden + widest) * 2
    assert footprint(plan).activations == tokens + 64 * SIZES["vocab_size"] * 4


@pytest.mark.parametrize("words", [["MODEL", "--plan"], ["compile", "e.checkpoint"], ["doctor"]])
def test_an_error_that_nobody_thought_of_is_a_sentence_with_the_place_of_its_traceback(
    words: list[str],
    config: Configs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("mlp.fc\nof a layer")

    for name in ("settle", "open_compilable"):
        monkeypatch.setattr(cli, name, fail)
    monkeypatch.setattr(cli.doctor, "main", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = str(config("LlamaForCausalLM"))
    assert cli.main([model if word == "MODEL" else word for word in words]) == 2
    sentence = capsys.readouterr().err
    (log,) = tmp_path.glob("enginehouse-build-*.log")
    assert sentence.count("\n") == 1 and "unexpected KeyError" in sentence
    assert sentence.rstrip().endswith(str(log))
    assert "Traceback" in log.read_text() and "in fail" in log.read_text()


def test_an_unexpected_error_is_a_sentence_where_no_log_can_be_written(
    config: Configs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "settle", lambda *args: 1 / 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert cli.main([str(config("LlamaForCausalLM")), "--plan"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "could not be kept: No such file" in sentence
