"""The program `enginehouse-build`: a process that is set up for builds, and then cli.py in it."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 64 << 20
_MAPPED_FROM_BYTES = 32 << 20  # the most that glibc takes


def main() -> int:
    """cli.main; its exit status."""
    prepare()
    from enginehouse.build import cli

    return cli.main()


def prepare() -> None:
    """Set this process up, and import what a build needs."""
    _keep_freed_memory()
    gc.disable()  # what is imported stays, and to look through it takes a quarter of the time
    from enginehouse.build import cli  # noqa: F401

    gc.freeze()
    gc.enable()


def _keep_freed_memory() -> None:
    """Have malloc keep what a piece of a tensor took for the next one: fresh pages from the
    kernel cost more than the work that is done in them. Only glibc has the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
