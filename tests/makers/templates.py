"""The chat templates of tests/data, by name."""

from __future__ import annotations

from makers.paths import DATA

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((DATA / "templates").glob("*.jinja"))
}
