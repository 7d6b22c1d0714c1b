"""Whether the kernels of backend=cpu can be compiled here, and why a test is left out if not."""

from __future__ import annotations

import pytest

from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.errors import EngineError


def _missing() -> str | None:
    try:
        find_compiler()
    except EngineError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(_missing() is not None, reason=_missing() or "")
