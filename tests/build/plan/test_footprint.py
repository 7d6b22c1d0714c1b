"""The plan page's numbers against the same numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from enginehouse.build import cli
from enginehouse.build.forms.capabilities import GPU_SM
from enginehouse.build.plan.build_plan import BuildPlan, make_plan
from enginehouse.build.plan.footprint import (
    GIB,
    GPU_MEMORY_GIB,
    concurrent_requests,
    footprint,
    kv_budget,
    print_page,
)
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from makers.engines import SourceMaker
from makers.paths import ROOT


def nemotron(config: str, **flags: object) -> BuildPlan:
    """A plan from a config.json alone: no weight is there to be read."""
    source = resolve_source(str(ROOT / "configs" / "nemotron-70b"), Path(), lambda line: None)
    flags = {"model": str(source.path), "until": "plan", **flags}
    return make_plan(load_settings(flags, ROOT / "configs" / config), source)


def layer_weights(tp: int) -> int:
    """Elements of one Llama-3.1-70B layer's linears on one GPU."""
    hidden, inner, heads, kv_heads, head = 8192, 28672, 64, 8, 128
    qkv = (heads + 2 * kv_heads) * head * hidden
    return (qkv + heads * head * hidden + 3 * hidden * inner) // tp


@pytest.mark.parametrize("tp", [4, 8])
def test_fp8_weights_and_kv_of_nemotron_are_as_worked_out_by_hand(tp: int) -> None:
    needs = footprint(nemotron("nemotron-70b-fp8.yaml", tp=tp))
    norms = (2 * 80 + 1) * 8192 * 2
    scales = 80 * (5 * 2 + 1) * 4  # of the linears, and of the KV cache
    vocabulary = 2 * 128256 // tp * 8192 * 2
    assert needs.weights == 80 * layer_weights(tp) + norms + scales + vocabulary
    assert needs.kv_per_token == 2 * 80 * (8 // tp) * 128


@pytest.mark.parametrize("flag", ["gather_context_logits", "gather_all_token_logits"])
def test_an_engine_that_gives_the_logits_of_prompts_holds_those_of_an_iteration(flag: str) -> None:
    plain = nemotron("nemotron-70b-fp8.yaml")
    gathers = nemotron("nemotron-70b-fp8.yaml", trtllm_build={flag: True})
    rows = plain.max_num_tokens - plain.settings.max_batch_size
    more = footprint(gathers).activations - footprint(plain).activations
    assert more == rows * plain.config.padded_vocab_size() * 4


def test_int4_weights_of_nemotron_are_as_worked_out_by_hand() -> None:
    needs = footprint(nemotron("nemotron-70b-int4.yaml"))
    elements = 80 * layer_weights(2)
    norms = (2 * 80 + 1) * 8192 * 2
    assert needs.weights == elements // 2 + elements // 128 * 2 + norms + 128256 * 8192 * 2


def test_the_host_memory_counts_a_layer_and_its_inputs_where_fp8_is_calibrated() -> None:
    """A layer in float32; of the linears that share an input, the matrices of its width and seven
    copies; and 16 sequences of 512 tokens: within 24 GiB. AWQ has one matrix more, and its trials.
    Without calibration, a few pieces.
    """
    hidden, inner, tokens = 8192, 28672, 16 * 512
    layer = layer_weights(1) + 2 * hidden
    activations = tokens * (2 * 4 * hidden + 2 * (4 * hidden + inner))
    base = 4 * layer + activations + (640 << 20)

    def linears(matrices: int) -> int:
        fc_and_gate = matrices * hidden**2 + 7 * hidden * 2 * inner
        return 4 * max(fc_and_gate, matrices * inner**2 + 7 * inner * hidden)

    found = nemotron("nemotron-70b-fp8.yaml").peak_memory_bytes
    assert found == base + linears(2) and found < 19 * GIB
    awq = nemotron("nemotron-70b-int4.yaml", quant="int4_awq").peak_memory_bytes
    assert awq == base + linears(3) + (512 << 20) and awq < 22 * GIB
    assert nemotron("nemotron-70b-int4.yaml").peak_memory_bytes == 640 << 20


def test_the_budget_is_what_is_left_and_holds_that_many_requests() -> None:
    needs = footprint(nemotron("nemotron-70b-fp8.yaml"))
    used = needs.weights + needs.activations + needs.runtime
    budget = kv_budget(needs, 80.0)
    assert budget == int((80 * GIB - used) * 0.9)
    count = concurrent_requests(needs, 80.0, 131072)
    assert count * 131072 * needs.kv_per_token <= budget
    assert (count + 1) * 131072 * needs.kv_per_token > budget


def test_an_engine_that_does_not_fit_says_by_how_much() -> None:
    plan = nemotron("nemotron-70b-fp8.yaml", tp=1, gpu="l40s")
    console = Console(record=True, width=120, file=(Path("/dev/null")).open("w"))
    with console.file:
        print_page(plan, console)
        assert "GiB too little; choose more GPUs" in console.export_text()
    assert concurrent_requests(footprint(plan), GPU_MEMORY_GIB["l40s"], 2048) == 0


def test_the_plan_page_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "nemotron-70b-fp8.yaml")
    flags = [str(ROOT / "configs" / "nemotron-70b"), "--config", config, "--plan", "--tp", "4"]
    assert cli.main(flags) == 0
    page = capsys.readouterr().out
    for words in ("TP 4 x PP 1 = 4 GPUs", "1, 2, 4, 8, 16, 32, 64", "131,072", "40.0 KiB"):
        assert words in page


def windowed(backend: str, **flags: object) -> BuildPlan:
    """Gemma 3's pattern: 5 of 6 layers look back 1024 tokens."""
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262144,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "rms_norm_eps": 1e-6,
    }
    given = {"until": "plan", "backend": backend, **flags}
    source = resolve_source(str(ROOT / "configs" / "nemotron-70b"), Path(), lambda line: None)
    return make_plan(load_settings(given), replace(source, config=config))


LAYER = 2 * 4 * 256 * 2  # bytes of a token in one layer


def test_tensorrt_llm_keeps_a_window_and_the_others_all() -> None:
    needs = footprint(windowed("tensorrt_llm"))
    assert needs.kv_per_token == 12 * LAYER
    assert needs.kv_of(131072) == (10 * 1024 + 2 * 131072) * LAYER
    for backend, flags in (("torch", {}), ("tensorrt", {"gpu": "l40s"})):
        whole = footprint(windowed(backend, **flags))
        assert whole.kv_of(131072) == 131072 * 12 * LAYER
        assert whole.kv_of(777) == 777 * 12 * LAYER


def test_our_tensorrt_network_keeps_latents_once(family_source: SourceMaker) -> None:
    """Two layers of 48 numbers and 16 that are turned; the others keep them as values too."""
    for backend, copies in (("torch", 2), ("tensorrt", 1)):
        settings = load_settings({"until": "plan", "backend": backend, "tp": 2})
        needs = footprint(make_plan(settings, family_source("youtu")))
        assert needs.kv_per_token == 2 * copies * (48 + 16) * 2


@pytest.mark.parametrize("context", [256, 1024, 4096, 65536, 131072])
def test_requests_are_those_of_the_pool_that_is_full_first(context: int) -> None:
    """Pools as calculateMaxNumBlocks makes them: by the window's size times its layers' bytes."""
    needs = footprint(windowed("tensorrt_llm"))
    budget = kv_budget(needs, 80.0)
    layers = {1024: 10, 131072: 2}
    weights = {window: window * count for window, count in layers.items()}
    fits = []
    for window, count in layers.items():
        pool = budget * weights[window] / sum(weights.values())
        fits.append(pool / (count * LAYER * min(window, context)))
    assert concurrent_requests(needs, 80.0, context) == pytest.approx(min(fits), abs=1)


def test_a_window_on_every_layer_bounds_what_a_sequence_takes() -> None:
    """Mistral 7B 0.1: past 4096 tokens nothing is added."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-5,
    }
    source = resolve_source(str(ROOT / "configs" / "nemotron-70b"), Path(), lambda line: None)
    settings = load_settings({"until": "plan", "backend": "tensorrt_llm", "pp": 2})
    needs = footprint(make_plan(settings, replace(source, config=config)))
    assert needs.kv_of(32768) == needs.kv_of(4096) == 4096 * 16 * 2 * 8 * 128 * 2
    assert needs.kv_of(1024) * 4 == needs.kv_of(4096)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("tensorrt_llm", "a sequence of 131,072 keeps 1.04 GiB instead of 6.00"),
        ("torch", "backend=torch keeps all the same; tensorrt_llm 1.04 GiB instead of 6.00"),
    ],
)
def test_the_page_says_what_windows_spare_and_whom(backend: str, words: str) -> None:
    console = Console(record=True, width=160, file=(Path("/dev/null")).open("w"))
    with console.file:
        print_page(windowed(backend), console)
        page = console.export_text()
    assert f"10 of 12 layers look back 1,024 tokens: {words}" in page
    assert ("sequences of 131,072 tokens" in page) == (backend == "tensorrt_llm")


def test_every_gpu_of_the_capability_table_has_a_memory() -> None:
    assert set(GPU_MEMORY_GIB) == set(GPU_SM)
