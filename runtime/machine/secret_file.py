"""The file of a secret that processes on several machines share."""

from __future__ import annotations

import re
from pathlib import Path

from enginehouse.runtime.errors import EnginehouseError

_WANTED = "wanted one line of 32 to 1024 characters, as `openssl rand -hex 32` writes"


def read_secret(path: Path) -> bytes:
    """Raises EnginehouseError for a file that holds none."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EnginehouseError(f"the key file {path} cannot be read ({error}); {_WANTED}") from None
    if not re.fullmatch(r"[!-~]{32,1024}", text):
        raise EnginehouseError(
            f"the key file {path} holds {len(text)} characters in {len(text.splitlines())} lines; "
            f"{_WANTED}"
        )
    return text.encode()
