"""A hub id is judged by config, headers and tokenizer; its weights come when the plan stands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from doubles.hub_double import Hub, hub_on_loopback
from enginehouse.build import cli
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import CheckpointError
from makers.bitsandbytes_writer import BITSANDBYTES
from makers.engines import write_tiny_checkpoint
from makers.quantized_writers import write_quantized

INDEX = "model.safetensors.index.json"
SHARDS = ("llama-a.safetensors", "llama-b.safetensors")
HEAD = 1 << 16
FLAGS = ["--max-batch-size", "4", "--max-num-tokens", "64", "--until", "compile"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    with hub_on_loopback() as hub:
        yield hub


@pytest.fixture
def hub(running: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub, which the hub's client knows, and an empty cache."""
    point_at(running.url, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    running.folders.clear()
    running.asked.clear()
    running.sent.clear()
    return running


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", form)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose shards are not called `model*`, beside files that no build needs."""
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("made") / "m", shards=2, vocab=2048)
    text = (path / INDEX).read_text()
    for number, name in enumerate(SHARDS, 1):
        old = f"model-{number:05}-of-00002.safetensors"
        (path / old).rename(path / name)
        text = text.replace(old, name)
        assert (path / name).stat().st_size > 4 * HEAD
    (path / INDEX).write_text(text)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_x.py"):
        (path / name).write_bytes(b"never asked for")
    (path / "original").mkdir()
    (path / "original" / "model.safetensors").write_bytes(b"never asked for")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("T {{ tools | tojson }}")
    return path


@pytest.fixture
def model(hub: Hub, made: Path, tmp_path: Path) -> Path:
    """The folder that `owner/Name-1B` is on the hub; a test may change its own copy."""
    folder = Path(shutil.copytree(made, tmp_path / "served"))
    hub.folders["owner/Name-1B"] = {"main": folder}
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_plan_fetches_headers_and_small_files_alone(
    hub: Hub, model: Path, capsys: Capture
) -> None:
    assert cli.main(["owner/Name-1B", "--plan", "--tp", "2"]) == 0
    out, error = capsys.readouterr()
    assert "Name-1B (LlamaForCausalLM" in out
    assert "to fetch: 2 files" in error and "TOO LITTLE" not in error
    assert {name: hub.sent.pop(name) for name in SHARDS} == dict.fromkeys(SHARDS, HEAD)
    assert sum(hub.sent.values()) < 1 << 20
    assert hub.sent.keys() == {
        *("config.json", INDEX, "generation_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "additional_chat_templates/tool_use.jinja"),
    }


def test_a_header_longer_than_the_first_request_is_read_whole(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginehouse.build.resolve.hub._HEAD_BYTES", 100)
    infos = resolve_source("owner/Name-1B", model).tensors.infos
    assert dict(infos) == dict(resolve_source(str(model), model).tensors.infos)
    assert all(100 < hub.sent[name] < HEAD for name in SHARDS)


@pytest.mark.parametrize(
    ("differing", "planned", "built"),
    [(0, "", 0), (2048, "the stored head is kept", 0), (1, "", 2)],
    ids=["equal", "another", "one row, which is not seen at first"],
)
def test_a_stored_head_is_compared_by_a_few_rows_until_it_is_here(
    hub: Hub, model: Path, tmp_path: Path, capsys: Capture, differing: int, planned: str, built: int
) -> None:
    edit_json(model / "config.json", tie_word_embeddings=True)
    where = json.loads((model / INDEX).read_text())["weight_map"]
    head = load_file(model / where["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    head[100 : 100 + differing] *= 2
    shard = model / where["lm_head.weight"]
    save_file({**load_file(shard), "lm_head.weight": head.contiguous()}, shard)
    assert cli.main(["owner/Name-1B", "--plan"]) == 0
    assert planned in capsys.readouterr().err and sum(hub.sent.values()) < 1 << 20
    flags = ["-o", str(tmp_path / "e"), *FLAGS]
    assert cli.main(["owner/Name-1B", *flags]) == built
    said = capsys.readouterr().err
    assert ("holds other weights than a few of their rows said" in said) == (built == 2)
    assert cli.main(["owner/Name-1B", *flags]) == 0
    assert ("the stored head is kept" in capsys.readouterr().err) == (differing > 0)


@pytest.mark.parametrize(
    ("changes", "flags", "wanted"),
    [
        (
            {"architectures": ["MambaForCausalLM"], "tie_word_embeddings": True},
            [],
            "MambaForCausalLM is not supported",
        ),
        ({}, ["--tp", "3", "--no-pad"], "choose tp in 1, 2, 4, 8"),
        ({}, ["--quant", "fp8", "--gpu", "a100"], "a100"),
        ({"hidden_size": 128}, [], "config.json implies"),
        ({"chat_template": "{% if %}"}, [], "the chat template is not valid"),
        ({"tokenizer.json": None}, [], "no tokenizer.json, only tokenizer.model: make one"),
        ({"tokenizer.model": None, "tokenizer.json": None}, [], "with --tokenizer"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused_before_a_weight_is_fetched(
    hub: Hub,
    model: Path,
    tmp_path: Path,
    capsys: Capture,
    changes: dict[str, object],
    flags: list[str],
    wanted: str,
) -> None:
    (model / "tokenizer.model").write_bytes(b"slow")
    for name in [name for name in changes if name.startswith("tokenizer")]:
        (model / name).unlink()
    if "chat_template" in changes:
        edit_json(model / "tokenizer_config.json", **changes)
    elif "tokenizer.json" not in changes:
        edit_json(model / "config.json", **changes)
    assert cli.main(["owner/Name-1B", "-o", str(tmp_path / "e"), *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert wanted in error
    most = 0 if "architectures" in changes else HEAD
    assert all(hub.sent[name] <= most for name in SHARDS)
    assert hub.gets("tokenizer.model") == ("only tokenizer.model" in wanted)


def test_weights_that_the_disk_has_no_room_for_are_not_fetched(
    hub: Hub, model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = sum((model / name).stat().st_size for name in SHARDS) + 1000  # none for the engine
    monkeypatch.setattr("psutil.disk_usage", lambda path: SimpleNamespace(free=free))
    assert cli.main(["owner/Name-1B", "-o", str(tmp_path / "e"), *FLAGS]) == 2
    assert "the weights that are to be fetched and the engine need" in capsys.readouterr().err
    assert all(hub.sent[name] == HEAD for name in SHARDS)


def test_a_build_fetches_each_file_once_and_needs_no_hub_afterwards(
    hub: Hub, model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e"
    assert cli.main(["owner/Name-1B", "-o", str(out), *FLAGS, "--quant", "int4"]) == 0
    assert "fetch  " in capsys.readouterr().err
    assert {name: hub.gets(name) for name in SHARDS} == dict.fromkeys(SHARDS, 2)  # and its header
    for name in SHARDS:
        assert hub.sent[name] == (model / name).stat().st_size + HEAD
    manifest = read_engine(out).manifest
    assert manifest.model.name == "Name-1B"
    assert manifest.source["origin"] == f"owner/Name-1B@{hub.commit('owner/Name-1B', 'main')}"
    assert set(manifest.source["files"]) >= {*SHARDS, "tool_use.jinja"}
    templates = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert templates[-1] == {"name": "tool_use", "template": "T {{ tools | tojson }}"}

    local = tmp_path / "local"
    assert cli.main([str(model), "-o", str(local), *FLAGS, "--quant", "int4", "--quiet"]) == 0
    ours, theirs = (read_engine(path).manifest.files for path in (out, local))
    assert ours["rank0.safetensors"].sha256 == theirs["rank0.safetensors"].sha256

    hub.asked.clear()
    point_at("http://127.0.0.1:9", monkeypatch)  # the port for what is to be thrown away
    assert cli.main(["owner/Name-1B", "-o", str(out), *FLAGS, "--quant", "int4"]) == 0
    streams = capsys.readouterr()
    assert "up to date" in streams.out and "taken from the hub's cache here" in streams.err
    assert hub.asked == []
    with pytest.raises(CheckpointError, match=r"owner/Other could not be fetched.*HF_ENDPOINT"):
        resolve_source("owner/Other", tmp_path)


def test_a_revision_is_asked_for_by_its_name_and_by_its_commit(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    older = write_tiny_checkpoint(tmp_path / "older", layers=1)
    hub.folders["owner/Name-1B"]["v0.1"] = older
    commit = hub.commit("owner/Name-1B", "v0.1")
    for revision in ("v0.1", commit):
        source = resolve_source(f"owner/Name-1B@{revision}", tmp_path)
        assert (source.name, source.origin) == ("Name-1B", f"owner/Name-1B@{commit}")
        assert source.config["num_hidden_layers"] == 1
        assert len(source.missing) == 1
    assert resolve_source("owner/Name-1B", tmp_path).config["num_hidden_layers"] == 2
    with pytest.raises(CheckpointError, match="@v9 names a revision that the hub does not have"):
        resolve_source("owner/Name-1B@v9", tmp_path)


def test_what_a_repository_holds_instead_of_safetensors_is_said(hub: Hub, tmp_path: Path) -> None:
    gguf, pickles = tmp_path / "gguf", tmp_path / "pickles"
    for folder, names in ((gguf, ["A.Q4_K_M.gguf", "A.Q8_0.gguf"]), (pickles, ["x.bin"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"0" * 99)
    (pickles / "config.json").write_text("{}")
    (pickles / INDEX).write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    hub.folders = {"o/gguf": {"main": gguf}, "o/pickles": {"main": pickles}}
    with pytest.raises(CheckpointError, match=r"only \(A.Q4_K_M.gguf, A.Q8_0.gguf\): fetch one"):
        resolve_source("o/gguf", tmp_path)
    with pytest.raises(CheckpointError, match=r"o/pickles holds weights only as x\.bin: pickle"):
        resolve_source("o/pickles", tmp_path)
    assert hub.sent.keys() == {"config.json", INDEX}


@pytest.mark.usefixtures("one_thread")
def test_a_quantised_one_is_planned_without_its_weights_and_dequantised_when_they_are_here(
    hub: Hub, tmp_path: Path, capsys: Capture
) -> None:
    """Beside its header a few bytes of each module are read, which say its shape."""
    path = write_quantized("nf4 nested", tmp_path, kinds=BITSANDBYTES).quantized
    hub.folders["owner/Name-1B"] = {"main": path}
    flags = ["owner/Name-1B", "--dequantize", "--quant", "int4"]
    assert cli.main([*flags, "--plan"]) == 0
    assert "rounded twice, to bitsandbytes NF4 and then to int4" in capsys.readouterr().err
    size = (path / "model.safetensors").stat().st_size
    assert hub.sent["model.safetensors"] < size / 3
    output = str(tmp_path / "e")
    assert cli.main([*flags, *FLAGS, "--backend", "torch", "-o", output, "--quiet"]) == 0
    assert read_engine(Path(output)).manifest.source["dequantized"] == "bitsandbytes NF4"
