"""A following rank's process on doubles: what `enginehouse.runtime.tensorrt.rank` is on a GPU."""

from __future__ import annotations

import sys

import pytest

from doubles.tensorrt_machine import doubled_machine
from enginehouse.runtime.tensorrt import rank

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch, doubled_machine(patch, 2, processes=True):
        sys.exit(rank.main(sys.argv[1:]))
