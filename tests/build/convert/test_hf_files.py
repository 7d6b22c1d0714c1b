"""`--format hf` on disk: shards, what is refused and replaced, and the way back into an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from enginehouse.build import cli
from enginehouse.build.convert.conversion import convert
from enginehouse.build.convert.hf_export import MAX_SHARD_BYTES, HfCheckpoint, plan_shards
from enginehouse.build.convert.journal import Journal
from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.plan.build_plan import BuildPlan, make_plan
from enginehouse.build.plan.hf_layout import HfLayout
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.quantize.units import Calibration
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.engine import MANIFEST, read_engine
from enginehouse.runtime.errors import CheckpointError, EngineError, PlanError
from makers.engines import SourceMaker, build_engine
from makers.hf_checkpoints import SHORT, Tensors, choices, exported, save
from makers.paths import ROOT
from makers.quantized_writers import write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", ["fp8", "fp8_kvfp8", "fp8_rowwise", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_converts_to_the_bytes_of_the_direct_conversion(
    form: str, dtype: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    settings = choices(form) | {"dtype": dtype}
    source = family_source("biased")
    direct = build_engine(source, tmp_path / "direct", until="convert", tp=2, **SHORT, **settings)
    export = exported(source, tmp_path / "hf", **settings)
    again = resolve_source(str(export), tmp_path)
    # whatever is needed is in the export: no form, no scale is asked for or measured again
    engine = build_engine(again, tmp_path / "again", until="convert", tp=2)
    for name in ("config.json", "rank0.safetensors", "rank1.safetensors"):
        assert (engine / name).read_bytes() == (direct / name).read_bytes(), name


def test_an_awq_export_converts_to_the_same_integers_and_folded_norms(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    source, settings = family_source("biased"), choices("int4_awq")
    direct = build_engine(source, tmp_path / "direct", until="convert", **SHORT, **settings)
    export = exported(source, tmp_path / "hf", **settings)
    again = resolve_source(str(export), tmp_path)
    assert make_plan(load_settings({}), again).settings.quant == "int4_awq"
    engine = build_engine(again, tmp_path / "again", until="convert")
    wanted, found = (load_file(path / "rank0.safetensors") for path in (direct, engine))
    assert found.keys() == wanted.keys()
    changed = {name for name in wanted if not torch.equal(found[name], wanted[name])}
    norms = ("input_layernorm.weight", "post_layernorm.weight")
    linears = ("attention.qkv", "mlp.fc", "mlp.gate")
    factors = tuple(f"{linear}.prequant_scaling_factor" for linear in linears)
    assert all(name.endswith(norms + factors) for name in changed)
    ones = {name for name in wanted if name.endswith(factors)}
    assert all(bool((found[name] == 1).all()) for name in ones)
    assert ones & changed == {name for name in ones if bool((wanted[name] != 1).any())} != set()


def sharded(
    plan: BuildPlan, source: SourceCheckpoint, directory: Path, journal: Journal
) -> tuple[int, int]:
    """Go on with a conversion into shards of 600 kB; units found finished, and bytes written."""
    written: list[int] = []
    with HfCheckpoint(plan, source, directory, max_shard_bytes=600_000) as sink:
        finished = journal.finished(sink, lambda count: None)

        def advance(key: str, num_bytes: int) -> None:
            written.append(num_bytes)

        convert(plan, source, sink, Calibration({}), advance, journal, finished)
    return len(finished), sum(written)


def test_an_interrupted_export_goes_on_with_the_shards_that_are_missing(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("biased")
    plan = make_plan(load_settings({"quant": "int4", "format": "hf"}), source)
    (tmp_path / "e").mkdir()
    journal = Journal(tmp_path / "journal")
    journal.begin("key")
    found, total = sharded(plan, source, tmp_path / "e", journal)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}
    assert found == 0 and total == sum(plan.rank_bytes)
    lost = sorted(path for path in (tmp_path / "e").glob("*.safetensors"))[1]
    lost.unlink()
    found, again = sharded(plan, source, tmp_path / "e", journal)
    assert 0 < found and 0 < again < total
    assert {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()} == whole


def test_a_large_checkpoint_is_written_in_shards_with_an_index(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    source = family_source("biased")
    settings = load_settings({"quant": "fp8_rowwise", "format": "hf"})
    plan = make_plan(settings, source)
    journal = Journal(tmp_path / "journal")
    journal.begin("key")
    _, written = sharded(plan, source, tmp_path, journal)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    found: Tensors = {}
    for name in files:
        tensors = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 600_000
        assert {key for key, file in index["weight_map"].items() if file == name} == set(tensors)
        found |= tensors
    total = sum(tensor.nbytes for tensor in found.values())
    assert index["metadata"]["total_size"] == total == written == sum(plan.rank_bytes)
    whole = load_file(exported(source, tmp_path / "one", quant="fp8_rowwise") / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name].view(torch.uint8), whole[name].view(torch.uint8))
               for name in whole)  # fmt: skip


def test_shards_hold_at_most_their_limit_but_for_a_tensor_that_is_larger() -> None:
    config = json.loads((ROOT / "configs" / "nemotron-70b" / "config.json").read_text())
    path = ROOT / "configs" / "nemotron-70b"
    source = resolve_source(str(path), path)
    plan = make_plan(load_settings({"quant": "fp8", "format": "hf", "until": "plan"}), source)
    table = HfLayout(plan.config).table(output_tensors(plan.config, 0))
    shards = plan_shards(table, MAX_SHARD_BYTES)
    assert [name for shard in shards.values() for name in shard] == list(table)
    sizes = [sum(item.num_bytes for item in shard.values()) for shard in shards.values()]
    assert len(sizes) == 15 and max(sizes) <= MAX_SHARD_BYTES
    largest = 2 * config["vocab_size"] * config["hidden_size"]
    alone = [shard for shard in plan_shards(table, largest // 2).values() if len(shard) == 1]
    assert {name for shard in alone for name in shard} >= {"lm_head.weight"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tp": 2}, "tp=2 pp=1 is of no use with format=hf.*leave tp and pp out"),
    ({"pp": 2}, "tp=1 pp=2 is of no use with format=hf"),
    ({"quant": "int8"}, "quant=int8 has no layout .* choose none, fp8, fp8_rowwise, int4"),
    ({"quant": "fp8", "kv_cache_dtype": "int8"}, "kv_cache_dtype=int8 has no scales"),
    ({"quant": "int4", "kv_cache_dtype": "fp8"}, "an FP8 KV cache needs FP8 weights"),
    ({"backend": "tensorrt_llm"}, "backend=tensorrt_llm is of no use with format=hf"),
    ({"quant": "fp8", "dtype": "float32"}, "no fp8 kernels for dtype=float32"),
    ({"format": "safetensors"}, "format='safetensors' is not known; choose one of trtllm, hf"),
]


@pytest.mark.parametrize(("settings", "wanted"), REFUSED)
def test_what_the_layout_has_no_place_for_is_refused_before_a_weight_is_read(
    settings: dict[str, Any], wanted: str, family_source: SourceMaker
) -> None:
    with pytest.raises(PlanError, match=wanted) as caught:
        make_plan(load_settings({"format": "hf", **settings}), family_source("biased"))
    assert "\n" not in str(caught.value)


def test_sources_without_a_place_in_the_layout_are_refused(
    family_source: SourceMaker, tmp_path: Path
) -> None:
    zeros = resolve_source(str(write_quantized("awq", tmp_path).quantized), tmp_path)
    with pytest.raises(PlanError, match="has INT4 zero points.*choose format=trtllm"):
        make_plan(load_settings({"format": "hf"}), zeros)
    folder = build_engine(
        family_source("biased"), tmp_path / "folder", until="convert", quant="int4"
    )
    with pytest.raises(PlanError, match="folder is a TensorRT-LLM checkpoint, which lacks"):
        make_plan(load_settings({"format": "hf"}), resolve_source(str(folder), tmp_path))


def test_the_command_line_writes_a_checkpoint_says_so_and_replaces_only_its_own(
    family_source: SourceMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = family_source("biased")
    output = tmp_path / "hf"
    flags = [str(source.path), "--format", "hf", "--quant", "fp8_rowwise", "-o", str(output)]
    assert cli.main(flags) == 0
    said = capsys.readouterr()
    assert "(Hugging Face checkpoint, sha256:" in said.out
    assert "format=hf ends with convert" in said.err + said.out
    names = {path.name for path in output.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    own = {"config.json", "hf_quant_config.json", "model.safetensors", MANIFEST}
    assert names == own | tokenizer | {"chat_template.jinja"}
    with pytest.raises(EngineError, match="is a quantised Hugging Face checkpoint"):
        read_engine(output)
    assert cli.main([*flags, "--quiet", "--until", "convert"]) == 0, "its own is replaced"
    assert {path.name for path in output.iterdir()} == names
    (output / "notes.txt").write_text("mine")
    assert cli.main([*flags, "--quiet"]) == 2, "another's is not"
    assert "holds notes.txt" in capsys.readouterr().err


def test_the_default_output_is_named_after_the_format(
    family_source: SourceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "choices.yaml").write_text("format: hf\nquant: int4\n")
    flags = [str(family_source("biased").path), "--config", "choices.yaml", "--quiet"]
    assert cli.main(flags) == 0
    assert (tmp_path / "engines" / "biased-int4-hf" / "hf_quant_config.json").exists()


def spoil_ones(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.pre_quant_scale"][3] = 2
    save(tensors, path / "model.safetensors")


def spoil_scales(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"][0, 0] *= 1.0001
    save(tensors, path / "model.safetensors")


def spoil_dtype(path: Path) -> None:
    text = (path / "hf_quant_config.json").read_text()
    changed = text.replace('"weight_scale_dtype": "bfloat16"', '"weight_scale_dtype": "int3"')
    (path / "hf_quant_config.json").write_text(changed)


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (spoil_ones, "layers.1.mlp.down_proj.pre_quant_scale holds other factors than ones"),
        (spoil_scales, "has scales that are no values of torch.bfloat16"),
        (spoil_dtype, "weight_scale_dtype='int3'; wanted one of bfloat16, float16, float32"),
    ],
)
def test_an_export_that_contradicts_its_config_is_refused(
    spoil: Callable[[Path], None], wanted: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    path = exported(family_source("biased"), tmp_path / "hf", quant="int4")
    spoil(path)
    with pytest.raises(CheckpointError, match=wanted):
        build_engine(resolve_source(str(path), tmp_path), tmp_path / "e", until="convert")
