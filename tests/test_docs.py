"""What the documents cite is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from makers.paths import ROOT

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_cited_test_and_file_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for file, name in re.findall(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)::(test_\w+)`", text):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{path.name} cites {file}::{name}"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_each_of_the_25_pains_has_its_line() -> None:
    text = (ROOT / "docs" / "pains.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    assert all(re.search(r"`(\w+/)*test_\w+\.py::test_\w+`", met) for _, met in rows)
