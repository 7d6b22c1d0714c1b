"""Every file of a checkpoint and of an engine with bytes flipped, cut, doubled and overwritten, and
its JSON with other values: it is read, or refused in one sentence, within little memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given

from enginehouse.build import cli
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.cpu.packed_check import check_packed
from enginehouse.runtime.cpu.packed_file import PACKED, PackedFile
from enginehouse.runtime.engine import read_config, read_engine, verify_files
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.prompt.chat import load_chat
from enginehouse.server.settings import read_model
from makers.fuzzing import files_like, little_memory, tries
from makers.source_folders import write_sources
from makers.text_engine import write_text_engine

pytestmark = pytest.mark.usefixtures("one_thread")

Reader = Callable[[Path], object]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged folder of each kind."""
    root = tmp_path_factory.mktemp("inputs")
    whole = write_sources(root)
    for name, flags in {
        "trtllm": ["--until", "convert", "--tp", "2"],
        "engine": ["--backend", "cpu", "--max-batch-size", "4", "--max-num-tokens", "64"],
    }.items():
        assert cli.main([str(whole), "-o", str(root / name), "--quiet", *flags]) == 0
    for name in TOKENIZER:
        shutil.copy(whole / name, root / "trtllm")
    write_text_engine(root / "text")
    return root


def read_source(folder: Path) -> None:
    """Plan it, read every tensor, and write its tokenizer."""
    file = folder / "x.gguf"
    source = resolve_source(str(file if file.exists() else folder), folder)
    make_plan(load_settings({}), source)
    for name in source.tensors.infos:
        source.tensors.read(name)
    written = folder / "written"
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir()
    source.tokenizer_writer(written)


def read_dequantized(folder: Path) -> None:
    source = resolve_source(str(folder), folder, dequantize=True)
    make_plan(load_settings({}), source)
    for name in source.tensors.infos:
        source.tensors.read(name)


def read_built(folder: Path) -> None:
    verify_files(read_engine(folder))


def read_weights(folder: Path) -> None:
    weights = CheckpointWeights(folder, read_config(folder))
    weights("transformer.layers.0.")
    weights("lm_head.")
    weights.kv_scales()


def read_packed(folder: Path) -> None:
    check_packed(PackedFile(folder / PACKED), read_config(folder))


def read_text(folder: Path) -> None:
    read_model(folder)
    load_chat(folder)


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CASES: list[tuple[str, Reader, tuple[str, ...]]] = [
    ("single", read_source, ("model.safetensors", "config.json", "generation_config.json")),
    ("single", read_source, TOKENIZER),
    ("sharded", read_source, ("model-00002-of-00003.safetensors", "model.safetensors.index.json")),
    ("gguf", read_source, ("x.gguf",)),
    ("gptq", read_source, ("config.json", "model.safetensors")),
    ("nf4", read_dequantized, ("model.safetensors",)),
    ("fp8", read_source, ("hf_quant_config.json",)),
    ("awq", read_source, ("hf_quant_config.json",)),
    ("trtllm", read_source, ("config.json", "rank1.safetensors")),
    ("engine", read_built, ("manifest.json",)),
    ("engine", read_weights, ("config.json", "rank0.safetensors")),
    ("engine", read_packed, (PACKED, "config.json")),
    ("text", read_text, ("manifest.json", "generation_config.json", "chat_template.jinja")),
    ("text", read_text, TOKENIZER),
]
EACH = [(kind, reader, name) for kind, reader, names in CASES for name in names]
IDS = [f"{kind} {reader.__name__} {name}" for kind, reader, name in EACH]


@pytest.mark.parametrize(("kind", "reader", "name"), EACH, ids=IDS)
def test_it_is_read_or_refused_in_a_sentence(
    kind: str, reader: Reader, name: str, inputs: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(inputs / kind, tmp_path / kind))
    good = (folder / name).read_bytes()
    reader(folder)
    outcomes: set[bool] = set()

    @tries(60)
    @given(files_like(good))
    def read_one(data: bytes) -> None:
        (folder / name).write_bytes(data)
        try:
            with little_memory():
                reader(folder)
            outcomes.add(True)
        except EnginehouseError as error:
            assert str(error).splitlines() == [str(error)]
            assert 0 < len(str(error).encode()) <= 8000
            outcomes.add(False)

    read_one()
    assert False in outcomes, "no damage was seen"


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "x/", ".", "..", "", "a\0b", "y" * 300]
)
def test_a_manifest_names_files_of_its_folder_alone(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(inputs / "engine", tmp_path / "engine"))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["config.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(EnginehouseError, match="wanted names of files in its folder"):
        read_engine(folder)


def test_an_index_leads_nowhere_else(inputs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(inputs / "sharded", tmp_path / "in" / "sharded"))
    shard = "model-00002-of-00003.safetensors"
    outside = shutil.copy(folder / shard, tmp_path / "in" / "x.safetensors")
    path = folder / "model.safetensors.index.json"
    good = path.read_text()
    for name in ("../x.safetensors", str(outside), f"./{shard}", f"../sharded/{shard}"):
        path.write_text(good.replace(shard, name))
        with pytest.raises(EnginehouseError, match="which is not in"):
            read_source(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_half_a_surrogate_pair_is_no_text(name: str, inputs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(inputs / "single", tmp_path / "single"))
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, "chat_template": "\U0001f600"}))
    read_source(folder)
    (folder / name).write_text(json.dumps({**data, "chat_template": "\ud800"}))
    with pytest.raises(EnginehouseError, match="holds half a surrogate pair"):
        read_source(folder)


def test_no_code_of_a_checkpoint_is_run(inputs: Path, tmp_path: Path) -> None:
    """Named by auto_map, in every config, and lying there: nothing imports it or copies it."""
    folder = Path(shutil.copytree(inputs / "single", tmp_path / "single"))
    code = f"open({str(tmp_path / 'run')!r}, 'w')"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "conftest.py"):
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        data = json.loads((folder / name).read_text())
        classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
        data["auto_map"] = {**classes, "AutoTokenizer": ["tokenization_x.X", None]}
        (folder / name).write_text(json.dumps(data))
    output = tmp_path / "engine"
    flags = ["--backend", "cpu", "--max-batch-size", "4", "--max-num-tokens", "64", "--quiet"]
    assert cli.main([str(folder), "-o", str(output), *flags]) == 0
    read_text(output)
    assert not (tmp_path / "run").exists()
    assert list(output.rglob("*.py")) == []
