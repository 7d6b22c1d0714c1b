"""Where things lie: the one place that knows it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "tests" / "contract"
DATA = ROOT / "tests" / "data"
DOUBLES = ROOT / "tests" / "doubles"
