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
    for link, place in re.findall(r"\]\(([^)#:]*)#?([\w-]*)\)", text):
        page = path.parent / link if link else path
        assert page.exists(), f"{path.name} links to {link}"
        if place:
            assert place in places_of(page), f"{path.name} links to {link}#{place}"


def places_of(page: Path) -> set[str]:
    """The names by which links reach a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_each_of_the_25_pains_has_its_line() -> None:
    text = (ROOT / "docs" / "pains.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    assert all(re.search(r"`(\w+/)*test_\w+\.py::test_\w+`", met) for _, met in rows)


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_room_that_a_page_names_is_there(path: Path) -> None:
    """`build/plan/settings.py` and `server/text/`; a bare `journal.py` in the room named last."""
    room = ROOT
    for name in re.findall(r"`([\w./*-]+(?:\.py|/))`", path.read_text(encoding="utf-8")):
        if re.match(r"(build|runtime|server|scripts|configs|tests)/", name):
            found = list(ROOT.glob(name.replace("NAME", "*")))
            assert found, f"{path.name} names {name}"
            room = found[0] if name.endswith("/") else found[0].parent
        elif name.endswith(".py") and "/" not in name and not name.startswith(("test_", "__")):
            assert list(room.glob(name)), f"{path.name} names {name}, which is not in {room.name}/"


def test_the_index_has_every_page() -> None:
    linked = re.findall(r"\]\(([\w]+\.md)\)", (ROOT / "docs" / "index.md").read_text("utf-8"))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(linked) == pages
