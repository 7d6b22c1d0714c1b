"""Text that a page or a terminal can show, whatever stands in it; amounts for people; files."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Control characters; lone surrogates and non-characters, which no file of UTF-8 or XML takes; and
# what turns the direction of a line, in which a path could read as another.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def visible(text: str) -> str:
    """With nothing that a terminal obeys or XML forbids: control characters, newline and tab aside,
    become their pictures (escape is ␛), what cannot be written U+FFFD.
    """
    return _HIDDEN.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else "\ufffd"


def one_line(text: str, most: int) -> str:
    """Visible, in one line of at most `most` characters; a cut one ends with an ellipsis."""
    line = " ".join(visible(text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def amount(count: float) -> str:
    """Bytes for people: `1.23 GiB`, `45.6 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def write_whole(path: Path, content: bytes) -> Path:
    """The file, whole or not there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
