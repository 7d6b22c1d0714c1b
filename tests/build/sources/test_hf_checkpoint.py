"""A Hugging Face directory is read as it stands, and damage is named in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.sources.digest import source_digest
from enginehouse.build.sources.folder import DiskFolder
from enginehouse.build.sources.hf_checkpoint import SafetensorsSource, open_checkpoint
from enginehouse.build.sources.safetensors_file import SAFETENSORS_DTYPES, read_safetensors_header
from enginehouse.runtime.errors import CheckpointError
from enginehouse.server.prompt.chat import load_chat
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.text.message import ChatMessage
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from makers.engines import write_tiny_checkpoint
from makers.family_models import load_family, logits_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "sharded", shards=3, hidden=64, heads=2, kv_heads=1)


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_every_dtype_reads_back_as_safetensors_wrote_it(tmp_path: Path) -> None:
    raw = torch.randint(0, 2, (6, 16), dtype=torch.uint8)
    tensors = {name: raw.clone().view(dtype) for name, dtype in SAFETENSORS_DTYPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(DiskFolder(tmp_path))
    assert set(source.infos) == set(tensors)
    for name, wanted in tensors.items():
        found = source.read(name)
        assert source.infos[name] == (wanted.dtype, tuple(wanted.shape))
        assert found.dtype == wanted.dtype
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(start=st.integers(-2, 600), stop=st.integers(-2, 600))
def test_any_rows_equal_the_rows_of_the_whole(tiny: Path, start: int, stop: int) -> None:
    source, name = SafetensorsSource(DiskFolder(tiny)), "model.embed_tokens.weight"
    whole = load_file(tiny / "model.safetensors")[name]
    assert torch.equal(source.read(name, slice(start, stop)), whole[start:stop])


def test_a_tensor_is_fresh_and_writable(tiny: Path) -> None:
    source = SafetensorsSource(DiskFolder(tiny))
    first = source.read("model.norm.weight")
    first.zero_()
    assert source.read("model.norm.weight").abs().sum() > 0


def test_shards_are_read_through_the_index(sharded: Path) -> None:
    source = open_checkpoint(sharded)
    wanted = {
        name: tensor
        for path in sharded.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert set(source.tensors.infos) == set(wanted)
    assert all(torch.equal(source.tensors.read(name), wanted[name]) for name in wanted)
    assert {path.name for path in source.files} >= {path.name for path in sharded.iterdir()}


NORM, FIRST = "model.norm.weight", "model.embed_tokens.weight"


def shard_of(path: Path, name: str) -> Path:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return path / str(index["weight_map"][name])


def copy_into(path: Path, name: str, other: str, factor: float = 1.0) -> None:
    """A copy of a tensor, in the shard of another."""
    tensor, shard = load_file(shard_of(path, name))[name], shard_of(path, other)
    save_file({**load_file(shard), name: tensor * factor}, shard, {"format": "pt"})


def take_out(path: Path, name: str) -> None:
    shard = shard_of(path, name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})


def edit_index(path: Path, name: str, place: str | None) -> None:
    index = path / "model.safetensors.index.json"
    weight_map = {**json.loads(index.read_text())["weight_map"], name: place}
    edit_json(index, weight_map={key: value for key, value in weight_map.items() if value})


def move(path: Path) -> None:
    copy_into(path, NORM, FIRST)
    take_out(path, NORM)


STRAY: dict[str, Callable[[Path], None]] = {
    "a copy in a later shard": lambda path: copy_into(path, FIRST, NORM),
    "a copy in an earlier shard": lambda path: copy_into(path, NORM, FIRST),
    "another copy in an earlier shard": lambda path: copy_into(path, NORM, FIRST, factor=2.0),
    "in another shard": move,
    "another shard in the index": lambda path: edit_index(path, NORM, shard_of(path, FIRST).name),
    "not in the index": lambda path: edit_index(path, NORM, None),
}


@pytest.mark.parametrize("case", STRAY)
def test_shards_that_hold_more_than_the_index_says_are_read_as_transformers_reads_them(
    case: str, sharded: Path
) -> None:
    wanted = {
        name: tensor
        for path in sharded.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    STRAY[case](sharded)
    source = resolve_source(str(sharded), sharded)
    assert {name: source.tensors.read(name).tolist() for name in wanted} == {
        name: tensor.tolist() for name, tensor in wanted.items()
    }
    assert bool(source.remarks) == case.startswith("another copy")
    reference = ReferenceModel(model_config(source.config, "float32"), source)
    ids = torch.arange(40, 60)
    truth = logits_of(load_family(sharded), ids.tolist())
    found = reference.logits(reference.hidden_states([ids]))[0]
    torch.testing.assert_close(found, truth, atol=2e-4, rtol=2e-4)


def test_of_copies_that_differ_the_indexs_is_taken_and_said(sharded: Path) -> None:
    """transformers would take the last shard's."""
    wanted = load_file(shard_of(sharded, FIRST))[FIRST]
    copy_into(sharded, FIRST, NORM, factor=2.0)
    source = resolve_source(str(sharded), sharded)
    assert torch.equal(source.tensors.read(FIRST), wanted)
    [remark] = source.remarks
    assert f"both hold {FIRST}, and differ" in remark


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DAMAGE: dict[str, tuple[dict[str, Any] | bytes, bytes, str]] = {
    "data cut short": ({"a": F32}, bytes(12), "it is truncated"),
    "unknown dtype": ({"a": {**F32, "dtype": "F5"}}, bytes(16), "dtype F5; wanted one of BOOL"),
    "size against shape": ({"a": {**F32, "shape": [5]}}, bytes(16), "takes 20"),
    "negative shape": ({"a": {**F32, "shape": [-2, -2]}}, bytes(16), "gives tensor 'a'"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [8, 24]}}, bytes(24), "inside another"),
    "before the data": ({"a": {**F32, "data_offsets": [-16, 0]}}, bytes(16), "at byte -16"),
    "beyond the file": ({"a": {**F32, "data_offsets": [64, 80]}}, bytes(16), "it is truncated"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, bytes(16), "without dtype"),
    "not JSON": (b'{"a": ', b"", "not JSON"),
    "a JSON list": (b"[1]", b"", "not a JSON object"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_header_is_one_clear_sentence(tmp_path: Path, case: str) -> None:
    header, data, wanted = DAMAGE[case]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(path)
    assert wanted in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        read_safetensors_header(path)


def test_a_file_cut_while_it_is_read_is_noticed(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((tiny / "model.safetensors").read_bytes())
    source = SafetensorsSource(DiskFolder(tmp_path))
    last = max(source.infos)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="it changed while being read"):
        source.read(last)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names shard model-00002-of-00003.safetensors"):
        open_checkpoint(sharded).tensors.infos  # noqa: B018


def test_a_tensor_that_only_the_index_knows_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "ghost": "model-00001-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match="places tensor 'ghost' in model-00001"):
        open_checkpoint(sharded).tensors.infos  # noqa: B018


def test_a_shard_outside_the_directory_is_refused(sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={"a": "../x.safetensors"})
    with pytest.raises(CheckpointError, match="which is not in"):
        open_checkpoint(sharded).tensors.infos  # noqa: B018


def test_pickle_weights_are_refused_with_the_way_out(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"can run code.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_a_config_alone_can_be_opened_but_not_read(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    source = open_checkpoint(tmp_path)
    assert not source.has_weights and source.files == (tmp_path / "config.json",)
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        source.tensors.infos  # noqa: B018
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; give .* with --tokenizer"):
        source.write_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"only vocab\.json: make one .*AutoTokenizer"):
        source.write_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "has no config.json"),
        (b'{"a": 1,}', "not JSON: .* line 1, column"),
        (b"[]", "holds a JSON list; wanted an object"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_broken_config_is_one_sentence(
    tmp_path: Path, content: bytes | None, wanted: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=wanted):
        open_checkpoint(tmp_path)


def test_all_ends_of_sequence_are_collected(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "tiny", layers=1, hidden=64, heads=2, kv_heads=1)
    assert open_checkpoint(path).eos_token_ids == (2, 0)
    assert open_checkpoint(path).bos_token_id == 1
    edit_json(path / "config.json", eos_token_id=[7, 8], bos_token_id=None)
    edit_json(path / "generation_config.json", eos_token_id=9, bos_token_id=None)
    edit_json(path / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    source = open_checkpoint(path)
    assert source.eos_token_ids == (9, 7, 8, 0, 2)  # 2: <|im_end|>, because the template writes it
    assert source.bos_token_id == 1


def test_the_license_comes_from_the_model_card(tiny: Path) -> None:
    assert open_checkpoint(tiny).license is None
    card = tiny / "README.md"
    card.write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: other\n")
    assert open_checkpoint(tiny).license == "apache-2.0"
    card.unlink()


@pytest.mark.parametrize(
    ("in_config", "in_file", "wanted"),
    [
        ("from config", None, "from config"),
        ("from config", "from file", "from file"),
        (
            [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}],
            None,
            "D",
        ),
        ([{"name": "tool_use", "template": "T"}], None, "T"),
        (None, None, None),
    ],
)
def test_the_chat_template_is_extracted(
    tiny: Path, tmp_path: Path, in_config: Any, in_file: str | None, wanted: str | None
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny / name).read_text())
    edit_json(tmp_path / "tokenizer_config.json", chat_template=in_config)
    if in_file:
        (tmp_path / "chat_template.jinja").write_text(in_file)
    dest = tmp_path / "engine"
    dest.mkdir()
    names = open_checkpoint(tmp_path).write_tokenizer(dest)
    assert sorted(names) == sorted(path.name for path in dest.iterdir())
    template = dest / "chat_template.jinja"
    assert (template.read_text() if template.exists() else None) == wanted


@pytest.mark.parametrize(
    ("files", "in_config"),
    [
        ({"additional_chat_templates/tool_use.jinja": "T"}, "old"),
        ({"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "T"}, None),
        ({}, [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]),
        ({"chat_template.json": json.dumps({"chat_template": "P"})}, "D"),
    ],
    ids=["folder", "file and folder", "list", "processor's beside"],
)
def test_a_server_has_the_templates_that_transformers_finds(
    tiny: Path, tmp_path: Path, files: dict[str, str], in_config: Any
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny / name).read_text())
    edit_json(tmp_path / "tokenizer_config.json", chat_template=in_config)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    dest = tmp_path / "engine"
    dest.mkdir()
    open_checkpoint(tmp_path).write_tokenizer(dest)
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    theirs = theirs if isinstance(theirs, dict) else {"default": theirs}
    for tools in (ToolUse((ToolFunction("f"),)), ToolUse()):
        wanted = theirs.get("tool_use" if tools.shown else "default") or theirs.get("default")
        if wanted is not None:  # where transformers has none, there is an older one
            text = load_chat(dest).render([ChatMessage("user", "x")], PromptOptions(tools=tools))
            assert text == wanted


def test_a_processors_template_is_taken_where_there_is_no_other(tiny: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny / name).read_text())
    edit_json(tmp_path / "tokenizer_config.json", chat_template=None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    dest = tmp_path / "engine"
    dest.mkdir()
    open_checkpoint(tmp_path).write_tokenizer(dest)
    theirs, _ = ProcessorMixin.get_processor_dict(tmp_path)
    assert (dest / "chat_template.jinja").read_text() == theirs["chat_template"] == "P"


def test_known_files_are_not_digested_again(tiny: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("b", "a")]
    for file in files:
        file.write_bytes(file.name.encode() * 10)
    seen: list[tuple[int, int]] = []
    first = source_digest(files, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20) and list(first.files) == ["a", "b"]
    assert source_digest(reversed(files)) == first

    seen.clear()
    assert source_digest(files, first.files, lambda *step: seen.append(step)) == first
    assert not seen
    os.utime(files[0], ns=(0, 0))
    again = source_digest(files, first.files, lambda *step: seen.append(step))
    assert again.digest == first.digest and seen == [(10, 10)]

    files[1].write_bytes(b"c" * 11)
    assert source_digest(files, first.files).digest != first.digest
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        source_digest([tmp_path / "absent"])


def test_equal_options_give_equal_checkpoints(tiny: Path, tmp_path: Path) -> None:
    again = open_checkpoint(write_tiny_checkpoint(tmp_path / "again"))
    other = open_checkpoint(write_tiny_checkpoint(tmp_path / "other", seed=1))
    digest = source_digest(open_checkpoint(tiny).files).digest
    assert source_digest(again.files).digest == digest != source_digest(other.files).digest
