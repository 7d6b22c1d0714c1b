"""Engines in float16: what a CPU's wider arithmetic does not show, and a GPU would trip over."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from enginehouse.build import cli
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.tensorrt_llm.smoke import greedy_answer, judge, refuse_garbage
from enginehouse.build.verify import PROMPT, watched_logits
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.engine import Engine, read_engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.executor import TorchExecutor
from enginehouse.runtime.torch.float16 import Float16Watch
from enginehouse.runtime.torch.linear import PrequantLinear
from makers.engines import build_engine, write_tiny_checkpoint

SMALL = ["--max-batch-size", "2", "--max-seq-len", "1024", "--quiet"]
# Factors of layer 1's tensors, and what then passes 65504 first.
OVERFLOWS: dict[str, dict[str, float]] = {
    "layer 1's mlp.proj's input": {
        "mlp.gate_proj": 32,
        "mlp.up_proj": 4096,
        "mlp.down_proj": 2**-12,
    },
    "layer 1's mlp.proj's output": {"mlp.up_proj": 512, "mlp.down_proj": 512},
    "layer 1's attention score": {"self_attn.q_proj": 256, "self_attn.k_proj": 256},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint for each overflow; "none": the same model as it was."""
    made = {}
    for number, (place, factors) in enumerate({**OVERFLOWS, "none": {}}.items()):
        path = write_tiny_checkpoint(tmp_path_factory.mktemp("float16") / f"m{number}")
        scale(path, factors)
        made[place] = path
    return made


def scale(path: Path, factors: dict[str, float]) -> None:
    """Multiply weights of layer 1 of a checkpoint."""
    tensors = load_file(path / "model.safetensors")
    for name, factor in factors.items():
        tensors[f"model.layers.1.{name}.weight"] *= factor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@torch.inference_mode()
def logits_of(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """transformers' own, of a prompt, with scores that are kept as a product gives them."""
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(PROMPT).ids
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    found: torch.Tensor = model(torch.tensor([ids])).logits
    return found


@pytest.mark.parametrize("place", OVERFLOWS)
def test_transformers_gives_nan_in_float16_and_numbers_in_bfloat16(
    checkpoints: dict[str, Path], place: str
) -> None:
    """The premise of what follows, from an implementation that is not ours."""
    assert logits_of(checkpoints[place], torch.float16).isnan().any()
    assert logits_of(checkpoints[place], torch.bfloat16).isfinite().all()


@pytest.mark.parametrize(
    ("place", "quant"), [*((place, "none") for place in OVERFLOWS), (list(OVERFLOWS)[0], "int4")]
)
def test_activations_beyond_float16_fail_the_build_and_bfloat16_passes(
    checkpoints: dict[str, Path],
    place: str,
    quant: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [str(checkpoints[place]), "-o", str(tmp_path / "e"), "--quant", quant, *SMALL]
    assert cli.main([*flags, "--dtype", "float16"]) == 2
    said = capsys.readouterr().err
    assert re.match(
        f"enginehouse-build: {place} reaches [0-9]{{6,7}} on a text of some hundred tokens and "
        "float16 ends at 65504: .*; build with --dtype bfloat16\n$",
        said,
    )
    assert not (tmp_path / "e").exists()
    assert cli.main([*flags, "--dtype", "bfloat16"]) == 0
    verify = read_engine(tmp_path / "e").manifest.verify
    assert verify is not None and verify["largest_activation"] is None


def test_the_checkpoints_own_float16_is_tried_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_checkpoint(tmp_path / "m", dtype="float16")
    scale(path, OVERFLOWS["layer 1's mlp.proj's output"])
    assert cli.main([str(path), "-o", str(tmp_path / "e"), *SMALL]) == 2
    assert "layer 1's mlp.proj's output reaches" in capsys.readouterr().err


def test_a_healthy_model_passes_in_float16_and_says_how_far_it_reaches(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    flags = [str(checkpoints["none"]), "-o", str(tmp_path / "e"), *SMALL]
    assert cli.main([*flags, "--dtype", "float16"]) == 0
    verify = read_engine(tmp_path / "e").manifest.verify
    assert verify is not None
    value, place = verify["largest_activation"]
    assert 1 < value < 1000 and place.startswith("layer ")


def test_activations_near_the_end_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    scale(path, {"mlp.up_proj": 128, "mlp.down_proj": 96})
    flags = [str(path), "-o", str(tmp_path / "e"), "--dtype", "float16", *SMALL[:-1]]
    assert cli.main(flags) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "and float16 ends at 65504, which another text may pass: --dtype bfloat16" in said


@pytest.mark.parametrize("until", ["compile", "convert"])
def test_a_build_that_leaves_verify_out_says_what_was_not_tried(
    checkpoints: dict[str, Path],
    until: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [str(checkpoints["none"]), "-o", str(tmp_path / "e"), "--until", until, *SMALL[:-1]]
    for dtype in ("float16", "bfloat16"):
        assert cli.main([*flags, "--dtype", dtype]) == 0
        said = " ".join(capsys.readouterr().err.split())
        words = "whether its activations fit into float16 is found out by verify"
        assert (words in said) == (dtype == "float16")


def test_an_engine_of_tensorrt_llm_is_judged_by_more_than_its_short_answer(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Its answer may come out right, as here, where the judge's own arithmetic made it."""
    for name, path in checkpoints.items():
        source = open_checkpoint(path)
        built = build_engine(source, tmp_path / "e", until="compile", dtype="float16")
        executor = open_executor(built)
        try:
            prompt, answer = greedy_answer(executor, read_engine(built))
        finally:
            executor.close()
        figures = judge(read_engine(built), prompt, answer)
        assert figures.passed
        if name == "none":
            refuse_garbage(figures)
        else:
            with pytest.raises(EngineError, match=f"^{name} reaches .* --dtype bfloat16$"):
                refuse_garbage(figures)


def test_scores_of_queries_that_are_scaled_first_are_looked_at_as_such(tmp_path: Path) -> None:
    """As our own network does; TensorRT-LLM's kernels scale afterwards."""
    path = write_tiny_checkpoint(tmp_path / "m")
    scale(path, {"self_attn.q_proj": 60, "self_attn.k_proj": 60})
    engine = read_engine(
        build_engine(open_checkpoint(path), tmp_path / "e", until="compile", dtype="float16")
    )
    ids = torch.arange(64)
    for backend, beyond in (("torch", True), ("tensorrt", False)):
        manifest = msgspec.structs.replace(engine.manifest, backend=backend)
        _, watch = watched(Engine(engine.path, engine.config, manifest), ids)
        assert (watch.overflow is not None) == beyond
        assert watch.largest.place == "layer 1's attention score"


def test_what_awqs_factors_make_of_an_input_is_looked_at(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    settings = {"until": "compile", "dtype": "float16", "calib_samples": 1, "calib_length": 64}
    engine = read_engine(build_engine(tiny_source, tmp_path / "e", quant="int4_awq", **settings))
    executor = TorchExecutor(engine, ExecutorOptions(device="cpu"))
    try:
        attention = executor.runner.model.layers[1].attention
        assert attention is not None
        dense = attention.linears["attention.dense"]
        assert isinstance(dense, PrequantLinear)
        dense.factor *= 1e5
        _, watch = watched_logits(executor, torch.arange(64))
    finally:
        executor.close()
    assert watch is not None and watch.first_beyond is not None
    assert watch.first_beyond.place == "layer 1's attention.dense's input"


def watched(engine: Engine, ids: torch.Tensor) -> tuple[torch.Tensor, Float16Watch]:
    executor = TorchExecutor(engine, ExecutorOptions(device="cpu"))
    try:
        logits, watch = watched_logits(executor, ids)
    finally:
        executor.close()
    assert watch is not None
    return logits, watch
