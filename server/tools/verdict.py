"""Hold a text that was generated against its schema, within a time limit and without the network.

Knows nothing of what the engine enforced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from enginehouse.runtime.schemas.judge import judge_of

_LIMIT_S = 1.0


def verdict_of(schema: Mapping[str, Any], text: str, limit_s: float = _LIMIT_S) -> str:
    """valid or invalid by the schema, or unknown: it refers to elsewhere, has a pattern that cannot
    be read, or all its patterns together took more than limit_s.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return "invalid"
    try:
        return "valid" if judge_of(schema, limit_s).is_valid(value) else "invalid"
    except Exception:  # jsonschema has no one class for what it cannot decide
        return "unknown"
