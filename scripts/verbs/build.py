"""`enginehouse build`: a checkpoint -> an engine; and what `plan` shares with it.

Help is a screen of the settings that matter first. What a setting means is said where it is
declared, build/plan/settings.py, and nowhere here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from enginehouse.verbs.base import VerbParser

SHOWN = (
    *("name", "pp", "format", "gpu", "kv_cache_dtype", "exclude", "dequantize", "max_seq_len"),
    *("max_batch_size", "until"),
)
_OTHERS = (
    ("--config FILE", "YAML file with any of the settings; flags override it"),
    ("--html FILE", "write what was built, or with --plan what it takes, as a page of one file"),
    ("--shard I/N, --join", "convert a share of N, on any machine; make the engine of all shares"),
    ("--shares N", "with --plan: what each of N shares would read, write and take"),
    ("--help-all", "every setting, and every choice of it"),
)
_WIDTH, _COLUMN = 98, 22


def main(argv: list[str]) -> int:
    return run(
        "build",
        "Compile a Hugging Face checkpoint into an engine directory. A build that was interrupted "
        "goes on where it was; --plan prints what the engine takes, and stops.",
        SHOWN,
        "enginehouse build path/to/hf-checkpoint -o engines/mine --quant int4 --tp 2",
        argv,
    )


def run(verb: str, what: str, shown: Sequence[str], example: str, argv: list[str]) -> int:
    """A build's command line under that name; --help shows the first settings and those."""
    parser = VerbParser(verb, "[MODEL] [SETTINGS]", what, example, add_help=False)
    if {"-h", "--help"} & set(argv):
        print(_screen(parser, what, shown))
        return 0
    from enginehouse.build.command import prepare

    prepare()
    from enginehouse.build import cli

    parser.add_argument("--help-all", action="help", help="print this list")
    return cli.exit_status(lambda: cli.run_build(parser, argv), parser.prog)


def _screen(parser: VerbParser, what: str, shown: Sequence[str]) -> str:
    from enginehouse.build.plan.settings import GROUPS

    lines = [f"usage: {parser.usage}", "", *textwrap.wrap(what, _WIDTH)]
    first, *others = GROUPS.values()
    beside = [name for group in others for name in group if name in shown]
    for rows in (map(_row, first), [*map(_row, beside), *_OTHERS]):
        lines.append("")
        for flag, text in rows:
            start, *more = textwrap.wrap(text, _WIDTH - _COLUMN - 2)
            lines.append(f"  {flag:<{_COLUMN}}{start}")
            lines += [" " * (_COLUMN + 2) + line for line in more]
    return "\n".join([*lines, "", str(parser.epilog)])


def _row(name: str) -> tuple[str, str]:
    """A setting's flag, and what it is, with its choices where they are not too many to read."""
    from enginehouse.build.plan.settings import BuildSettings

    setting = BuildSettings.__dataclass_fields__[name]
    text, choices = str(setting.metadata["doc"]), setting.metadata["choices"] or ()
    if choices:
        some = ", ".join(choices[:9]) + (", ..." if len(choices) > 9 else "")
        text += f": {some}"
    if setting.default not in (None, "auto"):
        text += f" (default {setting.default})"
    if name == "model":
        return "MODEL", text
    flag = "-o, --output" if name == "output" else f"--{name.replace('_', '-')}"
    return flag, text
