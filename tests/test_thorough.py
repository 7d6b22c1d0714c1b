"""What `make test` leaves to THOROUGH=1 is there: no name in the list has gone stale."""

from __future__ import annotations

import re

import pytest

from makers.paths import TESTS
from makers.thorough import ASKED


@pytest.mark.parametrize("name", ASKED)
def test_every_test_that_is_listed_is_there(name: str) -> None:
    text = (TESTS / name).read_text(encoding="utf-8")
    for test, cases in ASKED[name].items():
        assert test == "*" or f"\ndef {test}(" in text, f"{name} has no {test}"
        if cases is not None:
            re.compile(cases)
            assert "parametrize" in text or "params=" in text
