"""Templates of pages of one file: what they share stands here, beside them what is their own.

Whatever comes from a model or a path is text to a template, which escapes it; only plots, which the
standard library's XML wrote, are taken as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jinja2

from enginehouse.build.report.words import one_line

_FOLDER = Path(__file__).parent
_MOST_TEXT = 1000  # characters of a sentence


class Plot(NamedTuple):
    title: str
    caption: str
    svg: str


def templates(folder: Path = _FOLDER) -> jinja2.Environment:
    """Of a folder, and of this one: base.css, parts.html. The filter `text` makes one line."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = lambda value: one_line(value, _MOST_TEXT)
    return environment
