"""The checkpoint on disk: the contract's tables, the source's numbers, bounded memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from enginehouse.build.quantize import pieces
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.checkpoint.packing import dequantize_fp8, dequantize_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.errors import QuantizationError
from makers.engines import EngineMaker, build_engine, write_tiny_checkpoint
from makers.paths import CONTRACT

DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8_e4m3fn",
}


def small_copy(table: dict[str, object], path: Path) -> SourceCheckpoint:
    """A random checkpoint with the table's proportions: same heads and layers, thinner."""
    config = table["meta"]["config"]  # type: ignore[index]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return open_checkpoint(
        write_tiny_checkpoint(
            path,
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
        )
    )


@pytest.fixture(scope="module")
def smollm_shaped(tmp_path_factory: pytest.TempPathFactory) -> SourceCheckpoint:
    table = json.loads((CONTRACT / "smollm2-135m.none.json").read_text())
    return small_copy(table, tmp_path_factory.mktemp("smollm") / "shape")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("smollm2-135m.none", {"quant": "none"}),
        ("smollm2-135m.fp8", {"quant": "fp8", "calib_samples": 1, "calib_length": 16}),
        (
            "smollm2-135m.fp8_kvfp8",
            {"quant": "fp8", "kv_cache_dtype": "fp8", "calib_samples": 1, "calib_length": 16},
        ),
        ("smollm2-135m.fp8_rowwise", {"quant": "fp8_rowwise"}),
        ("smollm2-135m.w8a16", {"quant": "int8"}),
        ("smollm2-135m-g64.w4a16_awq_nopqs", {"quant": "int4"}),
        (
            "smollm2-135m-g64.w4a16_awq",
            {"quant": "int4_awq", "calib_samples": 1, "calib_length": 16},
        ),
    ],
)
def test_rank_files_equal_the_contracts_tables(
    smollm_shaped: SourceCheckpoint, tmp_path: Path, name: str, settings: dict[str, object]
) -> None:
    table = json.loads((CONTRACT / f"{name}.json").read_text())
    legal = {case: stages for case, stages in table["cases"].items() if "illegal" not in stages}
    if "calib_samples" in settings:  # the finest cut alone: calibration takes its time
        legal = dict([max(legal.items())])
    checked = 0
    for case, stages in legal.items():
        tp, pp = (int(part[2:]) for part in case.split("_"))
        out = build_engine(
            smollm_shaped, tmp_path / case, tp=tp, pp=pp, until="convert", **settings
        )
        assert {path.name for path in out.iterdir()} == {
            "config.json",
            *(f"rank{rank}.safetensors" for rank in range(tp * pp)),
        }
        for stage in stages.values():
            for rank in stage["ranks"]:
                found = load_file(out / f"rank{rank}.safetensors")
                wanted = stage["checkpoint_tensors"]
                assert found.keys() == wanted.keys()
                for key, (shape, dtype) in wanted.items():
                    assert list(found[key].shape) == shape, key
                    assert DTYPES[found[key].dtype] in dtype.split("|"), key
                    checked += 1
    assert checked > 50


def merged(engine: Path) -> CheckpointWeights:
    return CheckpointWeights(engine, read_config(engine))


def fused(source: SourceCheckpoint, layer: int, *names: str) -> torch.Tensor:
    return torch.cat([source.tensors.read(f"model.layers.{layer}.{n}.weight") for n in names])


LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (2, 2), (8, 1)])
def test_unquantised_weights_come_back_bit_for_bit(
    tiny_source: SourceCheckpoint, make_engine: EngineMaker, tp: int, pp: int
) -> None:
    weights = merged(make_engine(quant="none", tp=tp, pp=pp))
    for layer in range(2):
        tensors = weights(f"transformer.layers.{layer}.")
        for ours, theirs in LINEARS.items():
            assert torch.equal(tensors[f"{ours}.weight"], fused(tiny_source, layer, *theirs))
    embedding = weights("transformer.vocab_embedding.")["weight"]
    assert torch.equal(embedding, tiny_source.tensors.read("model.embed_tokens.weight"))
    assert torch.equal(weights("lm_head.")["weight"], tiny_source.tensors.read("lm_head.weight"))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_int4_weights_are_within_half_a_step_unless_clipped(
    tiny_source: SourceCheckpoint, make_engine: EngineMaker, tp: int
) -> None:
    weights = merged(make_engine(quant="int4", group_size=64, tp=tp))
    for layer in range(2):
        tensors = weights(f"transformer.layers.{layer}.")
        for ours, theirs in LINEARS.items():
            scale = tensors[f"{ours}.weights_scaling_factor"]
            back = dequantize_int4(tensors[f"{ours}.weight"], scale)
            truth = fused(tiny_source, layer, *theirs).float()
            step = scale.float().repeat_interleave(64, dim=1)
            clipped = truth.abs() > 7 * step
            assert (clipped | ((back - truth).abs() <= 0.51 * step)).all()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 2)])
def test_fp8_scales_are_shared_as_the_contract_wants(
    tiny_source: SourceCheckpoint, make_engine: EngineMaker, tp: int, pp: int
) -> None:
    weights = merged(make_engine(quant="fp8", tp=tp, pp=pp))
    for layer in range(2):
        tensors = weights(f"transformer.layers.{layer}.")
        for kind in ("weights_scaling_factor", "activation_scaling_factor"):
            assert torch.equal(tensors[f"mlp.fc.{kind}"], tensors[f"mlp.gate.{kind}"])
        for ours, theirs in LINEARS.items():
            truth = fused(tiny_source, layer, *theirs).float()
            scale = tensors[f"{ours}.weights_scaling_factor"]
            shared = "mlp.fc" if ours == "mlp.gate" else ours
            both = ("mlp.gate_proj", "mlp.up_proj") if shared == "mlp.fc" else theirs
            amax = fused(tiny_source, layer, *both).abs().max().float()
            torch.testing.assert_close(scale, (amax / 448).view(1))
            back = dequantize_fp8(tensors[f"{ours}.weight"], scale)
            assert float((back - truth).norm() / truth.norm()) < 0.05
            assert 0 < tensors[f"{ours}.activation_scaling_factor"] < 1


def test_activation_scales_equal_the_maxima_that_transformers_shows(
    tiny_checkpoint: Path, tiny_source: SourceCheckpoint, make_engine: EngineMaker
) -> None:
    """With the engine's weights, as a linear is calibrated on what stands before it then."""
    from transformers import AutoModelForCausalLM

    from enginehouse.build.quantize.calibration import calibration_sequences

    engine = make_engine(quant="fp8", calib_samples=16, calib_length=512)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for layer in range(2):
        tensors = merged(engine)(f"transformer.layers.{layer}.")
        for ours, theirs in LINEARS.items():
            scale = tensors[f"{ours}.weights_scaling_factor"]
            weight = dequantize_fp8(tensors[f"{ours}.weight"], scale)
            linears = [model.get_submodule(f"model.layers.{layer}.{name}") for name in theirs]
            parts = weight.split([len(linear.weight) for linear in linears])
            for linear, part in zip(linears, parts, strict=True):
                linear.weight.data = part
    maxima: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: maxima.__setitem__(
                    name, max(maxima.get(name, 0.0), float(args[0].abs().max()))
                )
            )
    first = tiny_source.bos_token_id
    with torch.inference_mode():
        for ids in calibration_sequences(tiny_checkpoint, 16, 512, first):
            model(ids.unsqueeze(0))
    for layer in range(2):
        tensors = merged(engine)(f"transformer.layers.{layer}.")
        for ours, theirs in LINEARS.items():
            found = float(tensors[f"{ours}.activation_scaling_factor"])
            wanted = maxima[f"model.layers.{layer}.{theirs[0]}"] / 448
            assert found == pytest.approx(wanted, rel=1e-5)


def test_an_odd_vocabulary_is_padded_in_the_shards_and_nowhere_else(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny_checkpoint(tmp_path / "odd", vocab=509))
    engine = build_engine(source, tmp_path / "engine", quant="none", tp=4, until="convert")
    with safe_open(engine / "rank3.safetensors", framework="pt") as file:
        head = file.get_tensor("lm_head.weight")
    assert head.shape[0] == 128 and not head[-3:].any()
    assert json.loads((engine / "config.json").read_text())["vocab_size"] == 509
    assert torch.equal(merged(engine)("lm_head.")["weight"], source.tensors.read("lm_head.weight"))


@pytest.mark.parametrize("quant", ["none", "int8", "fp8", "fp8_rowwise", "int4"])
def test_what_is_written_does_not_depend_on_the_pieces(
    tiny_source: SourceCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    settings = {"quant": quant, "tp": 4, "pp": 2, "until": "convert"}
    settings |= {"calib_samples": 1, "calib_length": 16}
    whole = build_engine(tiny_source, tmp_path / "whole", **settings)
    monkeypatch.setattr(pieces, "_ELEMENTS", 700)
    cut = build_engine(tiny_source, tmp_path / "cut", **settings)
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == 9
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_tied_embeddings_are_written_out(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny_checkpoint(tmp_path / "tied", tied=True))
    engine = build_engine(source, tmp_path / "engine", quant="none", tp=2, pp=2, until="convert")
    weights = merged(engine)
    assert torch.equal(
        weights("lm_head.")["weight"], weights("transformer.vocab_embedding.")["weight"]
    )


def test_damaged_weights_end_the_build_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = write_tiny_checkpoint(tmp_path / "nan")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(QuantizationError, match="model.layers.1.mlp.up_proj.weight holds NaN"):
        build_engine(open_checkpoint(path), tmp_path / "engine", quant="int4")
    assert [p.name for p in tmp_path.iterdir()] == ["nan"], "nothing is left behind"


def test_peak_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    """12 layers of 24 MiB and an embedding of 32 MiB: the model is 350 MiB, the growth is not."""
    path = write_tiny_checkpoint(
        tmp_path / "wide",
        hidden=1024,
        layers=12,
        heads=16,
        kv_heads=16,
        intermediate=2560,
        vocab=16384,
    )
    script = (
        "import resource, sys\n"
        "from enginehouse.build import cli\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "status = cli.main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "sys.exit(status)\n"
    )
    flags = [str(path), "-o", str(tmp_path / "out"), "--quant", "int4", "--tp", "2"]
    run = subprocess.run(
        [sys.executable, "-c", script, *flags, "--until", "convert", "--quiet"],
        check=True,
        capture_output=True,
        text=True,
    )
    model_kib = (path / "model.safetensors").stat().st_size >> 10
    grown_kib = int(run.stdout.splitlines()[-1])
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
    assert model_kib > 330 << 10
    assert grown_kib < 170 << 10, "the embedding twice, and a buffer"
