"""Where things lie: the one place that knows it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
CONTRACT = TESTS / "contract"
DATA = TESTS / "data"
DOUBLES = TESTS / "doubles"
