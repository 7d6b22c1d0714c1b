"""Command line of `enginehouse-build`: flags -> settings -> stages. Knows no tensor.

`enginehouse-build compile` goes on from a checkpoint for TensorRT-LLM, and `enginehouse-build
doctor` looks at the machine: their flags are their own. The front door `enginehouse` runs the same
under its own name.

Exit status: 0 done, 2 refused or failed in one sentence, 3 the GPU machine must finish the
build, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from enginehouse.build import doctor
from enginehouse.build.backends.base import BuildResult
from enginehouse.build.convert.share_costs import print_shares, share_costs
from enginehouse.build.convert.shares import parse_share
from enginehouse.build.plan.footprint import print_page
from enginehouse.build.plan.settings import GROUPS, BuildSettings, load_settings
from enginehouse.build.plan.tensorrt_targets import print_targets
from enginehouse.build.plan.this_machine import settle_backend
from enginehouse.build.progress import BuildProgress
from enginehouse.build.report.page import build_page, plan_page
from enginehouse.build.report.words import write_whole
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.stages import build, output_path, settle, with_settled_tokenizer
from enginehouse.build.tensorrt_llm.compile import planned_command, run_compile_checkpoint
from enginehouse.build.tensorrt_llm.kept_checkpoint import engine_path, open_compilable
from enginehouse.runtime.engine import MANIFEST, read_manifest
from enginehouse.runtime.errors import EnginehouseError, PlanError, unexpected_fault

_MOST_SHARES = 9999
_TYPES = {"str": str, "int": int, "float": float}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each of BuildSettings' fields, with its documentation and default, and those of
    the program itself.
    """
    settings = BuildSettings.__dataclass_fields__
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_setting(group, settings[name])
    group.add_argument("--config", type=Path, help="YAML file with any of these settings")
    group.add_argument(
        "--cache-dir",
        type=Path,
        default=Path(".cache"),
        help="where the sample model is kept (default .cache)",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="print what the engine takes on each GPU and the requests it allows, and stop",
    )
    group.add_argument(
        "--shard", metavar="I/N", help="convert a share of N, on any machine, for --join"
    )
    group.add_argument(
        "--join",
        action="store_true",
        help="make the engine of the shares that lie beside the output",
    )
    group.add_argument(
        "--shares",
        type=int,
        metavar="N",
        help="with --plan: what each of N shares would read, write and take",
    )
    group.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write what was built, or with --plan what it takes, as a page of one file",
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but the result")


def _add_setting(group: argparse._ArgumentGroup, item: Field[Any]) -> None:
    default = "" if item.default is None else f" (default {item.default})"
    help_text = item.metadata["doc"] + default
    flags = [f"--{item.name.replace('_', '-')}"]
    if item.name == "model":
        group.add_argument("model", nargs="?", help=help_text)
    elif item.name == "trtllm_build":
        group.add_argument(*flags, action="append", metavar="FLAG=VALUE", help=help_text)
    elif item.type == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(*flags, action=action, default=None, help=help_text)
    else:
        group.add_argument(
            *(["-o"] if item.name == "output" else []),
            *flags,
            type=_TYPES[str(item.type).removesuffix(" | None")],
            choices=item.metadata["choices"],
            metavar=None if item.metadata["choices"] else item.name.upper(),
            help=help_text,
        )


def main(argv: list[str] | None = None) -> int:
    """Run a build; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["doctor"]:
        return exit_status(lambda: doctor.main(words[1:]), "enginehouse-build")
    if words[:1] == ["compile"]:
        parser = argparse.ArgumentParser(
            prog="enginehouse-build compile",
            description="Compile a checkpoint that a build for TensorRT-LLM left, on this "
            "machine's GPU. Limits and flags are the ones it was built for.",
        )
        return exit_status(lambda: run_compile(parser, words[1:]), "enginehouse-build")
    parser = argparse.ArgumentParser(
        prog="enginehouse-build",
        description="Compile a Hugging Face checkpoint into an engine directory.",
        epilog="Flags override the YAML file, which overrides the defaults. `enginehouse-build "
        "compile` compiles a checkpoint on the GPU machine, `enginehouse-build doctor` looks at a "
        "machine; both have their own --help.",
    )
    return exit_status(lambda: run_build(parser, words), "enginehouse-build")


def exit_status(run: Callable[[], int], prog: str) -> int:
    """What `run` returns; a refusal and an interruption are one sentence in prog's name."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return run()
    except EnginehouseError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or "the output"
        print(f"{prog}: {where}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        left = str(interruption) or "nothing was left behind"
        print(f"{prog}: interrupted; {left}", file=sys.stderr)
        return 130
    except Exception as error:  # what nobody thought of is one sentence too
        print(f"{prog}: {unexpected_fault(error, 'enginehouse-build')}", file=sys.stderr)
        return 2


def run_build(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Build what the words ask for; parser gets the flags of a build."""
    add_settings(parser)
    args = vars(parser.parse_args(words))
    config_file, quiet, cache_dir = args.pop("config"), args.pop("quiet"), args.pop("cache_dir")
    page, html = args.pop("plan"), args.pop("html")
    share, joins, shares = args.pop("shard"), args.pop("join"), args.pop("shares")
    _check_html(html)
    if share is not None and (joins or page or html is not None):
        raise PlanError("--shard makes a share and nothing else; leave --join, --plan, --html out")
    if joins and page:
        raise PlanError("--join has nothing to join for --plan; leave one of them out")
    if shares is not None and not (page and 1 <= shares <= _MOST_SHARES):
        raise PlanError(
            f"--shares {shares}: wanted 1 to {_MOST_SHARES}, with --plan; --shard makes a share"
        )
    share = None if share is None else parse_share(share)
    if page:
        args["until"] = "plan"
    if args["trtllm_build"] is not None:
        args["trtllm_build"] = _pairs(args["trtllm_build"])
    progress = BuildProgress(quiet=quiet)
    settings = load_settings(args, config_file)
    source = resolve_source(settings.model, cache_dir, progress.note, settings.dequantize)
    if page:
        console = Console(highlight=False, soft_wrap=True)
        source = with_settled_tokenizer(settings, source)
        settings, _ = settle_backend(settings, source)
        plan, _ = settle(settings, source, progress)
        print_page(plan, console)
        if shares is not None:
            console.print()
            print_shares(plan, share_costs(plan, source, shares), console)
        if html is not None:
            write_whole(html, plan_page(plan).encode())
        if settings.backend == "tensorrt_llm":
            console.print("\nOn the GPU machine, `enginehouse-build compile` runs:")
            console.print(
                planned_command(plan, Path(os.path.relpath(output_path(plan)))), markup=False
            )
        if settings.backend == "tensorrt":
            console.print(f"\nCompiled for SM {', '.join(map(str, plan.targets))}. What is what:")
            print_targets(plan.config.dtype, console)
        return 0
    result = build(settings, source, progress, share, joins=joins)
    if share is not None:
        print(f"{result.path}  (share {share.index} of {share.count})")
        return 0
    if html is not None:
        _write_report(html, result, progress)
    return _report(result)


def _check_html(path: Path | None) -> None:
    """PlanError, before anything is done, for a page that could not be written."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is no folder"
        raise PlanError(f"--html {path} {what}; name a file in a folder that is there")


def _write_report(path: Path, result: BuildResult, progress: BuildProgress) -> None:
    manifest = result.manifest
    if manifest is None and result.path is not None and (result.path / MANIFEST).exists():
        manifest = read_manifest(result.path)  # a checkpoint that another machine compiles
    if manifest is None:
        progress.note(f"{path} was not written: what was made has no manifest to report on")
        return
    write_whole(path, build_page(manifest).encode())


def _pairs(words: Sequence[str]) -> dict[str, str]:
    """FLAG=VALUE words; a FLAG alone is switched on."""
    return {flag: value or "enable" for flag, _, value in (word.partition("=") for word in words)}


def run_compile(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Compile a checkpoint; parser gets the flags for it."""
    parser.add_argument("checkpoint", type=Path, help="engines/NAME.checkpoint")
    parser.add_argument("-o", "--output", type=Path, help="engine directory; without it, NAME")
    parser.add_argument("--workers", type=int, default=1, help="ranks compiled at once (default 1)")
    parser.add_argument(
        "--until",
        choices=("compile", "verify"),
        default="verify",
        help="compile leaves out the check of the engine's answer (default verify)",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    args = parser.parse_args(words)
    if args.workers < 1:
        parser.error("--workers is below 1")
    path = Path(os.path.abspath(args.checkpoint))
    output = args.output or engine_path(path)
    if output is None:
        parser.error(f"{path.name} does not end in .checkpoint; say where with --output")
    output = Path(os.path.abspath(output))
    progress = BuildProgress(quiet=args.quiet)
    checkpoint = open_compilable(path)
    manifest = run_compile_checkpoint(checkpoint, output, args.workers, args.until, progress)
    return _report(BuildResult(output, manifest))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _report(result: BuildResult) -> int:
    """Say on standard output what there is now."""
    if result.finish_commands is not None:
        ours, theirs = result.finish_commands
        print(
            f"{result.path} is the TensorRT-LLM checkpoint. TensorRT-LLM compiles it on a GPU of "
            "the kind that will serve it; on that machine, with tensorrt-llm==1.2.1, run:\n"
            f"{ours}\nwhich runs this, checks the answer and writes the manifest:\n{theirs}"
        )
        return 3
    if result.path is not None:
        if result.manifest is None:
            print(f"{result.path}  (TensorRT-LLM checkpoint)")
        elif result.manifest.choices["format"] == "hf":
            print(f"{result.path}  (Hugging Face checkpoint, {result.manifest.digest[:19]})")
        else:
            state = "up to date" if result.reused else "built"
            print(f"{result.path}  ({state}, {result.manifest.digest[:19]})")
    return 0
