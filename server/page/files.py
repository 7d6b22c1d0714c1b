"""The page's files, read once: each with its type, its tag and its bytes, gzipped where that helps.

Knows no route and no request.
Source: RFC 9110, sections 8.8.3 (entity tags) and 12.5.3 (codings).
"""

from __future__ import annotations

import gzip
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

STATIC = Path(__file__).with_name("static")
INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class StaticFile(NamedTuple):
    """tag: of its content. gzipped: of the same bytes in every worker."""

    content_type: str
    tag: str
    content: bytes
    gzipped: bytes


def static_file(content: bytes, content_type: str) -> StaticFile:
    tag = sha256(content).hexdigest()[:20]
    return StaticFile(content_type, tag, content, gzip.compress(content, 9, mtime=0))


def read_static(folder: Path = STATIC) -> dict[str, StaticFile]:
    """By name; a file of a kind that no browser is told of is a fault of ours."""
    return {
        path.name: static_file(path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(folder.iterdir())
    }
