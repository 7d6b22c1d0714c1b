"""`enginehouse doctor`: what of a build and of serving works on this machine. Knows no check."""

from __future__ import annotations

from enginehouse.verbs.base import VerbParser


def main(argv: list[str]) -> int:
    from enginehouse.build import doctor

    return doctor.run(
        VerbParser("doctor", "[--directory DIRECTORY]", doctor.WHAT, "enginehouse doctor"), argv
    )
