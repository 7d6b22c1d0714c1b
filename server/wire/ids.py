"""Objects that are told and kept, and their ids: a word that says what one is, and 32 hex."""

from __future__ import annotations

import secrets
from typing import Any

Json = dict[str, Any]  # an object as it is told


def new_id(prefix: str) -> str:
    """`resp_`, `msg_`, `file_`, ..."""
    return f"{prefix}_{secrets.token_hex(16)}"
