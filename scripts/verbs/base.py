"""The contract of a verb, and the parser that makes all of them speak alike.

A verb is a file with `main(argv) -> exit status` and a row in main.py's table: 0 done, 2 refused in
one sentence, 130 interrupted. It raises EnginehouseError for what a person can cause, and main.py
prints it. Importing the file costs nothing that `--help` does not need.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn, Protocol


class Verb(Protocol):
    """What main.py asks of a verb's file."""

    def main(self, argv: list[str]) -> int: ...


class VerbParser(argparse.ArgumentParser):
    """Refuses in one sentence; its help ends with examples."""

    def __init__(
        self, verb: str, usage: str, description: str, *examples: str, add_help: bool = True
    ) -> None:
        prog = f"enginehouse {verb}"
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
            formatter_class=_Screen,
            allow_abbrev=False,
            add_help=add_help,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` says what can be given\n")


class _Screen(argparse.HelpFormatter):
    """Wraps descriptions, and leaves examples as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example"):
            return text
        return super()._fill_text(text, width, indent)


def count_up_to(limit: int) -> Callable[[str], int]:
    """For add_argument's type: a number from 1 to limit."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= limit:
            raise argparse.ArgumentTypeError(f"{text} is out of range; wanted 1 to {limit}")
        return int(text)

    return parse
