"""A build's report and a plan's page: what the manifest says, in a file that needs nothing else."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from enginehouse.build import cli
from enginehouse.build.report.page import build_page
from enginehouse.runtime.engine import read_manifest

LOADS = {"script", "img", "link", "iframe", "object", "video", "audio", "source", "base"}


class Seen(HTMLParser):
    """The text outside of style, and that nothing is loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.labels: list[str] = []
        self._in_style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in LOADS, tag
        self._in_style = tag == "style"
        self.labels += [value or "" for name, value in attrs if name == "aria-label"]
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            assert "url(" not in data and "@import" not in data
        elif data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def source(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint


def run(*words: str | Path) -> int:
    return cli.main([*map(str, words), "--quiet"])


def test_a_build_is_reported_from_its_manifest(source: Path, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    engine = tmp_path / "e"
    words = [source, "-o", engine, "--quant", "int4", "--backend", "torch", "--html", html]
    assert run(*words) == 0
    manifest = read_manifest(engine)
    assert manifest.build is not None
    assert manifest.build.source_bytes == (source / "model.safetensors").stat().st_size
    names = [stage.name for stage in manifest.build.stages]
    assert names == "plan refuse fetch digest reuse convert compile verify".split()
    assert all(stage.peak_bytes > 1 << 20 for stage in manifest.build.stages)
    page = html.read_text(encoding="utf-8")
    seen = Seen(page)
    assert page == build_page(manifest)
    assert manifest.verify is not None
    for told in (manifest.digest, f"{manifest.verify['mean_kl']:.4f} nats", "int4, groups of"):
        assert told in seen.text
    [errors] = [label for label in seen.labels if "error by layer" in label]
    worst, largest = max(manifest.build.errors, key=lambda pair: pair[1])
    assert f"most at {worst}: {largest:.2%}" in errors
    html.unlink()
    assert run(*words) == 0  # nothing is built, and the page is the same
    assert html.read_text(encoding="utf-8") == page


def test_without_a_record_it_says_so_and_names_stay_text(source: Path, tmp_path: Path) -> None:
    assert run(source, "-o", tmp_path / "e", "--until", "compile", "--backend", "torch") == 0
    path = tmp_path / "e" / "manifest.json"
    older = json.loads(path.read_text(encoding="utf-8"))
    del older["build"]
    older["name"] = "<script>alert(1)</script>"
    path.write_text(json.dumps(older), encoding="utf-8")
    seen = Seen(build_page(read_manifest(tmp_path / "e")))
    assert "were not kept in the manifest" in seen.text
    assert "Build of <script>alert(1)</script>" in seen.text
    assert "was not asked for" in seen.text


def test_a_plan_is_a_page_with_the_same_figures(source: Path, tmp_path: Path) -> None:
    html = tmp_path / "plan.html"
    assert run(source, "--plan", "--gpu", "l40s", "--html", html) == 0
    seen = Seen(html.read_text(encoding="utf-8"))
    assert "Plan of tiny-llama" in seen.text and "on disk" in seen.text
    assert any("Memory of a l40s" in label for label in seen.labels)


@pytest.mark.parametrize("place", ["absent/x.html", "."])
def test_a_page_that_cannot_be_written_is_refused_first(
    source: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "-o", tmp_path / "e", "--html", tmp_path / place) == 2
    assert "name a file in a folder that is there" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_of_a_bare_checkpoint_there_is_no_report_and_that_is_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / "x.html"
    words = [source, "-o", tmp_path / "c", "--until", "convert", "--html", html]
    assert cli.main(list(map(str, words))) == 0
    assert "was not written" in capsys.readouterr().err and not html.exists()


def test_a_record_reads_back_as_it_was(source: Path, tmp_path: Path) -> None:
    assert run(source, "-o", tmp_path / "e", "--quant", "fp8", "--backend", "torch") == 0
    manifest = read_manifest(tmp_path / "e")
    again = msgspec.convert(msgspec.to_builtins(manifest.build), type=type(manifest.build))
    assert again == manifest.build and manifest.build is not None
    assert manifest.build.errors_of == "what leaves the layer"
