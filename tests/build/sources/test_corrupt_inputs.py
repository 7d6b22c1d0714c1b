"""Damaged input of every kind, through the real command line: one sentence, exit status 2, and
nothing at the output.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from enginehouse.build import cli
from enginehouse.build.gguf.file import read_gguf
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.runtime.errors import EnginehouseError
from makers.source_folders import write_sources

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
Damage = Callable[[Path], object]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged input of each kind; a test damages its own copy."""
    root = tmp_path_factory.mktemp("inputs")
    write_sources(root)
    flags = ["--until", "convert", "--quiet", "--tp", "2"]
    for name in ("single", "awq"):
        assert cli.main([str(root / name), "-o", str(root / f"trt-{name}"), *flags]) == 0
    return root


def damaged(inputs: Path, tmp_path: Path, kind: str, damage: Damage) -> Path:
    """A damaged copy; the file for a .gguf, else the directory."""
    path = Path(shutil.copytree(inputs / kind, tmp_path / "in" / kind))
    damage(path)
    return path / "x.gguf" if kind == "gguf" else path


def assert_refused(model: Path, output: Path, capsys: Capture, wanted: str, *flags: str) -> None:
    """One line on standard error, exit status 2, and nothing beside or at the output."""
    output.mkdir()
    capsys.readouterr()
    limits = ["--max-batch-size", "8", "--max-num-tokens", "64", "--quiet"]
    assert cli.main([str(model), "-o", str(output / "e"), *limits, *flags]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("enginehouse-build: ") and error.count("\n") == 1, error
    assert wanted in error and out == ""
    assert list(output.iterdir()) == []


def cut(name: str, keep: int) -> Damage:
    """The file's first `keep` bytes; of a negative count, all but so many."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:keep])

    return damage


def text(name: str, content: str | bytes) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(raw)


def without(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def header_length(name: str, change: int) -> Damage:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        length = int.from_bytes(content[:8], "little") + change
        (path / name).write_bytes(length.to_bytes(8, "little") + content[8:])

    return damage


def json_of(name: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        data = json.loads((path / name).read_text())
        edit(data)
        (path / name).write_text(json.dumps(data))

    return damage


def tensors_of(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path / name)
        edit(tensors)
        save_file(tensors, path / name)

    return damage


def spoiled(tensor: str, value: float, name: str = "model.safetensors") -> Damage:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor].view(-1)[-1] = value

    return tensors_of(name, edit)


def only_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def emptied(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def f8_header(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content.replace(b'"BF16"', b'"BF61"', 1))


WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj"
NAN, INF = float("nan"), float("inf")
PLACE = {"weight_map": {UP + ".weight": SHARD}}
CASES: dict[str, tuple[str, Damage, str]] = {
    "truncated data": ("single", cut(WEIGHTS, -100), "is truncated"),
    "truncated header": ("single", cut(WEIGHTS, 300), "truncated or no safetensors file"),
    "seven bytes": ("single", cut(WEIGHTS, 7), "truncated or no safetensors file"),
    "no bytes": ("single", cut(WEIGHTS, 0), "truncated or no safetensors file"),
    "truncated shard": ("sharded", cut(SHARD, -1), "00002-of-00003.safetensors has"),
    "header longer": ("single", header_length(WEIGHTS, 8), "a header that is not JSON"),
    "header shorter": ("single", header_length(WEIGHTS, -8), "a header that is not JSON"),
    "header vast": ("single", header_length(WEIGHTS, 1 << 50), "truncated or no safetensors"),
    "header a page": ("single", text(WEIGHTS, "<html>404 not found</html>"), "no safetensors file"),
    "wrong dtype word": ("single", f8_header, "with dtype BF61; wanted one of BOOL"),
    "NaN": ("single", spoiled(f"{UP}.weight", NAN), "up_proj.weight holds NaN or infinite"),
    "Inf": ("single", spoiled("model.norm.weight", INF), "model.norm.weight holds NaN or inf"),
    "-Inf": ("single", spoiled("lm_head.weight", -INF), "lm_head.weight holds NaN or inf"),
    "NaN in the last shard": (
        "sharded",
        spoiled("model.norm.weight", NAN, "model-00003-of-00003.safetensors"),
        "model.norm.weight holds NaN",
    ),
    "missing shard": ("sharded", without(SHARD), f"names shard {SHARD}, which is not in"),
    "missing tensor": (
        "single",
        tensors_of(WEIGHTS, lambda t: t.pop(f"{UP}.weight")),
        "up_proj.weight is missing from the checkpoint",
    ),
    "index names a missing tensor": (
        "sharded",
        json_of(INDEX, lambda d: d["weight_map"].update({"model.x.weight": SHARD})),
        f"places tensor 'model.x.weight' in {SHARD}, which does not hold it",
    ),
    "index outside": (
        "sharded",
        json_of(INDEX, lambda d: d["weight_map"].update({"model.norm.weight": "../x"})),
        "names shard ../x, which is not in",
    ),
    "index garbage": ("sharded", text(INDEX, "{\0"), "is not JSON"),
    "index empty": ("sharded", text(INDEX, "{}"), "has no weight_map"),
    "index a list": ("sharded", json_of(INDEX, lambda d: d.update(weight_map=[])), "no weight_map"),
    "no index": ("sharded", without(INDEX), "holds no model.safetensors and no model.safet"),
    "empty folder": ("single", emptied, "has no config.json"),
    "only pickle": ("single", only_pickle, "pickle files can run code when read"),
    "no weights": ("single", without(WEIGHTS), "holds no model.safetensors"),
    "no config": ("single", without("config.json"), "has no config.json"),
    "config a list": ("single", text("config.json", "[1, 2]"), "a JSON list; wanted an object"),
    "config null": ("single", text("config.json", "null"), "holds a JSON NoneType"),
    "config empty": ("single", text("config.json", ""), "config.json is not JSON"),
    "config cut": ("single", cut("config.json", 90), "config.json is not JSON"),
    "config nested": ("single", text("config.json", "[" * 100_000), "it is nested too deep"),
    "config not text": ("single", text("config.json", b"\xff\xfe{"), "is not UTF-8 text"),
    "config's words": (
        "single",
        json_of("config.json", lambda d: d.update(num_hidden_layers="two")),
        "num_hidden_layers='two'; wanted a positive number",
    ),
    "config's layers": (
        "single",
        json_of("config.json", lambda d: d.update(num_hidden_layers=10**30)),
        "num_hidden_layers=1e+30; wanted a whole number from 1 to 10000",
    ),
    "config of another model": (
        "single",
        json_of("config.json", lambda d: d.update(hidden_size=256)),
        "config.json implies",
    ),
    "config's dtype": (
        "single",
        json_of("config.json", lambda d: d.update(torch_dtype="float17")),
        "dtype 'float17' is not known",
    ),
    "config's rope": (
        "single",
        json_of("config.json", lambda d: d.update(rope_scaling="yarn")),
        "rope_scaling='yarn'; wanted a JSON object",
    ),
    "no tokenizer": ("single", without("tokenizer.json"), "has no tokenizer.json"),
    "tokenizer empty": ("single", text("tokenizer.json", ""), "tokenizer.json is not JSON"),
    "tokenizer of no kind": ("single", text("tokenizer.json", "{}"), "is no tokenizer"),
    "tokenizer's words": (
        "single",
        json_of("tokenizer.json", lambda d: d.update(added_tokens=[{"id": "x"}])),
        "has added_tokens that are no tokens",
    ),
    "tokenizer config cut": ("single", cut("tokenizer_config.json", 40), "is not JSON"),
    "template not text": ("single", text("chat_template.jinja", b"\xff"), "is not UTF-8 text"),
    "generation config": ("single", text("generation_config.json", "7"), "a JSON int; wanted"),
    "GPTQ without scales": (
        "gptq",
        tensors_of(WEIGHTS, lambda t: t.pop(f"{UP}.scales")),
        "up_proj.scales is missing from the GPTQ checkpoint",
    ),
    "GPTQ with a NaN scale": ("gptq", spoiled(f"{UP}.scales", NAN), "up_proj.scales holds NaN"),
    "FP8 with an infinite scale": (
        "fp8",
        spoiled(f"{UP}.input_scale", INF),
        "up_proj.input_scale holds NaN or infinite",
    ),
    "FP8 with a cut word": ("fp8", cut("hf_quant_config.json", 20), "is not JSON"),
    "AWQ with a NaN factor": (
        "awq",
        spoiled(f"{UP}.pre_quant_scale", NAN),
        "up_proj.pre_quant_scale holds NaN",
    ),
    "rank file cut": ("trt-single", cut("rank1.safetensors", -9), "rank1.safetensors has"),
    "rank file gone": ("trt-single", without("rank1.safetensors"), "has no rank1.safetensors"),
    "rank's config": (
        "trt-single",
        json_of("config.json", lambda d: d.update(mapping="tp2")),
        "mapping='tp2'; wanted a JSON object",
    ),
    "rank's layers": (
        "trt-single",
        json_of("config.json", lambda d: d.update(num_hidden_layers=10**30)),
        "wanted 1 to 10000",
    ),
    "rank's patterns": (
        "trt-awq",
        json_of("config.json", lambda d: d["quantization"].update(exclude_modules=[1])),
        "exclude_modules=[1]; wanted a list of words",
    ),
    "rank's NaN": (
        "trt-single",
        spoiled("transformer.layers.1.mlp.fc.weight", NAN, "rank1.safetensors"),
        "mlp.fc.weight holds NaN",
    ),
    "rank's NaN scale": (
        "trt-awq",
        spoiled("transformer.layers.1.mlp.fc.weights_scaling_factor", NAN, "rank1.safetensors"),
        "mlp.fc.weights_scaling_factor holds NaN",
    ),
    "no .gguf at all": ("gguf", text("x.gguf", "PK\3\4"), "it is no GGUF file"),
    "empty .gguf": ("gguf", cut("x.gguf", 0), "it is no GGUF file"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_sentence_and_leaves_nothing(
    case: str, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    kind, damage, wanted = CASES[case]
    model = damaged(inputs, tmp_path, kind, damage)
    convert = ("--until", "convert") if kind.startswith("trt") else ()
    assert_refused(model, tmp_path / "out", capsys, wanted, *convert)


@pytest.mark.parametrize("quant", ["none", "int4", "int8", "fp8_rowwise"])
def test_a_value_beyond_the_dtype_asked_for_is_refused(
    quant: str, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    """bfloat16 reaches further than float16: nothing infinite is written."""
    damage = spoiled("model.layers.1.input_layernorm.weight", -1e5)
    model = damaged(inputs, tmp_path, "single", damage)
    flags = ("--until", "convert", "--quant", quant, "--dtype", "float16")
    wanted = "input_layernorm.weight holds 99840, beyond the range of float16; choose another dtype"
    assert_refused(model, tmp_path / "out", capsys, wanted, *flags)


POINTERS = [
    ("single", WEIGHTS),
    ("single", "config.json"),
    ("single", "tokenizer.json"),
    ("single", "chat_template.jinja"),
    ("sharded", SHARD),
    ("sharded", INDEX),
    ("fp8", "hf_quant_config.json"),
    ("trt-single", "rank1.safetensors"),
    ("gguf", "x.gguf"),
    ("pickle", "pytorch_model.bin"),
]


@pytest.mark.parametrize(("kind", "name"), POINTERS)
def test_a_file_that_git_lfs_did_not_fetch_is_called_that(
    kind: str, name: str, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"

    def damage(path: Path) -> None:
        if kind == "pickle":
            (path / WEIGHTS).unlink()
        (path / name).write_text(pointer)

    model = damaged(inputs, tmp_path, "single" if kind == "pickle" else kind, damage)
    convert = ("--until", "convert") if kind.startswith("trt") else ()
    folder = model if model.is_dir() else model.parent
    wanted = f"{folder / name} is a git-lfs pointer, not the file: run `git lfs pull` in {folder}"
    assert_refused(model, tmp_path / "out", capsys, wanted, *convert)


REQUIRED = (
    "architectures",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_config_without_a_key_names_it(
    key: str, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = damaged(inputs, tmp_path, "single", json_of("config.json", lambda d: d.pop(key)))
    assert_refused(model, tmp_path / "out", capsys, f"config.json has no {key}; is it the")


TRT_REQUIRED = (
    "hidden_act",
    "hidden_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


@pytest.mark.parametrize("key", TRT_REQUIRED)
def test_a_checkpoint_folder_without_a_key_names_it(
    key: str, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = damaged(inputs, tmp_path, "trt-single", json_of("config.json", lambda d: d.pop(key)))
    assert_refused(model, tmp_path / "out", capsys, f"config.json has no '{key}'")


def gguf_places(path: Path) -> list[int]:
    """Within the magic, the counts, the keys, the vocabulary, the table of tensors, the data."""
    file, size = read_gguf(path), path.stat().st_size
    first = min(tensor.offset for tensor in file.tensors.values())
    return [2, 6, 13, 20, 40, first // 3, first // 2, first - 40, first, first + 1, size - 1]


@pytest.mark.parametrize("place", range(11))
def test_a_gguf_file_cut_at_every_kind_of_place(
    place: int, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    keep = gguf_places(inputs / "gguf" / "x.gguf")[place]
    model = damaged(inputs, tmp_path, "gguf", cut("x.gguf", keep))
    assert_refused(model, tmp_path / "out", capsys, "x.gguf")


def test_a_nan_in_a_gguf_file_is_found(inputs: Path, tmp_path: Path, capsys: Capture) -> None:
    def damage(path: Path) -> None:
        tensor = read_gguf(path / "x.gguf").tensors["blk.1.ffn_up.weight"]
        with (path / "x.gguf").open("r+b") as file:
            file.seek(tensor.offset)
            file.write(b"\xff\xff\xff\xff")

    model = damaged(inputs, tmp_path, "gguf", damage)
    assert_refused(model, tmp_path / "out", capsys, "layers.1.mlp.up_proj.weight holds NaN")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "mkdir"])
def test_an_output_that_fails_is_one_sentence(
    call: str,
    number: int,
    inputs: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner: Any = Path if call == "mkdir" else os
    real, hidden = getattr(owner, call), ".e.partial"

    def failing(first: object, *rest: object, **named: object) -> object:
        if call == "mkdir" and hidden not in str(first):
            return real(first, *rest, **named)
        raise OSError(number, os.strerror(number), None if call != "mkdir" else str(first))

    monkeypatch.setattr(owner, call, failing)
    assert_refused(inputs / "single", tmp_path / "out", capsys, os.strerror(number))


def run(flags: list[str], **limits: Any) -> subprocess.CompletedProcess[str]:
    script = "import sys; from enginehouse.build.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *flags, "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=False, **limits)


@pytest.mark.parametrize("largest", [100, 100_000])
def test_a_real_limit_on_file_sizes_is_one_sentence(
    largest: int, inputs: Path, tmp_path: Path
) -> None:
    """As on a full disk: a file may not grow, within its header or within its tensors."""
    (tmp_path / "out").mkdir()
    result = run(
        [str(inputs / "single"), "-o", str(tmp_path / "out" / "e"), "--until", "convert"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "rank0.safetensors cannot be" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("case", ["truncated data", "tokenizer of no kind"])
def test_the_command_itself_ends_with_status_2(case: str, inputs: Path, tmp_path: Path) -> None:
    kind, damage, wanted = CASES[case]
    model = damaged(inputs, tmp_path, kind, damage)
    (tmp_path / "out").mkdir()
    result = run([str(model), "-o", str(tmp_path / "out" / "e")])
    assert result.returncode == 2 and wanted in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_on_a_read_only_file_system_is_one_sentence(inputs: Path) -> None:
    """/proc takes no folder, whoever asks."""
    result = run([str(inputs / "single"), "-o", "/proc/enginehouse/e"])
    assert result.returncode == 2
    assert result.stderr.startswith("enginehouse-build: /proc/enginehouse cannot be used: ")
    assert result.stderr.count("\n") == 1


JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1.5, 10**30, NAN, "", "x", "4"]),
    st.lists(st.sampled_from([1, "a", None]), max_size=2),
    st.just({"a": 1}),
)
FILES = {
    "single": ("config.json", "tokenizer_config.json"),
    "gptq": ("config.json",),
    "fp8": ("hf_quant_config.json",),
    "ct": ("config.json",),
    "trt-awq": ("config.json",),
    "sharded": (INDEX,),
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in FILES.items() for n in names])
def test_any_value_in_a_json_file_is_taken_or_refused_in_a_sentence(
    kind: str, name: str, inputs: Path, tmp_path: Path
) -> None:
    """No other error escapes, wherever a value of a wrong kind stands."""
    path = Path(shutil.copytree(inputs / kind, tmp_path / kind))
    good = json.loads((path / name).read_text())

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.randoms(use_true_random=False), JSON)
    def check(choose: random.Random, value: Any) -> None:
        data = json.loads(json.dumps(good))
        at = data
        while True:
            key = choose.choice(sorted(at))
            if not isinstance(at[key], dict) or not at[key] or choose.random() < 0.3:
                break
            at = at[key]
        at[key] = value
        (path / name).write_text(json.dumps(data))
        try:
            make_plan(load_settings({}), resolve_source(str(path), path))
        except EnginehouseError as error:
            assert "\n" not in str(error)

    check()
