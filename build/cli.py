"""Command line of `enginehouse-build`: flags -> settings -> stages. Knows no tensor.

Exit status: 0 done, 2 refused or failed in one sentence, 3 the GPU machine must finish the
build, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path
from types import FrameType

from rich.console import Console

from enginehouse.build.footprint import print_page
from enginehouse.build.plan import make_plan
from enginehouse.build.progress import BuildProgress
from enginehouse.build.settings import BuildSettings, load_settings
from enginehouse.build.sources import resolve_source
from enginehouse.build.stages import BuildResult, build
from enginehouse.runtime.errors import EnginehouseError

_TYPES = {"str": str, "int": int, "float": float}


def make_parser() -> argparse.ArgumentParser:
    """One flag for each of BuildSettings' fields, with its documentation and default."""
    parser = argparse.ArgumentParser(
        prog="enginehouse-build",
        description="Compile a Hugging Face checkpoint into an engine directory.",
        epilog="Flags override the YAML file, which overrides the defaults.",
    )
    for item in fields(BuildSettings):
        default = "" if item.default is None else f" (default {item.default})"
        help_text = item.metadata["doc"] + default
        if item.name == "model":
            parser.add_argument("model", nargs="?", help=help_text)
            continue
        names = [f"--{item.name.replace('_', '-')}"]
        if item.name == "output":
            names.insert(0, "-o")
        parser.add_argument(
            *names,
            type=_TYPES[str(item.type).removesuffix(" | None")],
            choices=item.metadata["choices"],
            metavar=None if item.metadata["choices"] else item.name.upper(),
            help=help_text,
        )
    parser.add_argument("--config", type=Path, help="YAML file with any of these settings")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path(".cache"),
        help="where the sample model is kept (default .cache)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what the engine takes on each GPU and the requests it allows, and stop",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a build; returns the exit status."""
    args = vars(make_parser().parse_args(argv))
    config_file, quiet, cache_dir = args.pop("config"), args.pop("quiet"), args.pop("cache_dir")
    page = args.pop("plan")
    if page:
        args["until"] = "plan"
    progress = BuildProgress(quiet=quiet)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        settings = load_settings(args, config_file)
        source = resolve_source(settings.model, cache_dir, progress.note)
        if page:
            console = Console(highlight=False, soft_wrap=True)
            print_page(make_plan(settings, source), console)
            return 0
        result = build(settings, source, progress)
    except EnginehouseError as error:
        print(f"enginehouse-build: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or "the output"
        print(f"enginehouse-build: {where}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        left = str(interruption) or "nothing was left behind"
        print(f"enginehouse-build: interrupted; {left}", file=sys.stderr)
        return 130
    return _report(result)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _report(result: BuildResult) -> int:
    """Say on standard output what there is now."""
    if result.finish_command is not None:
        print(
            f"{result.path} is the TensorRT-LLM checkpoint. TensorRT-LLM compiles it on a GPU of "
            f"the kind that will serve it; on that machine, with tensorrt-llm==1.2.1, run:\n"
            f"{result.finish_command}"
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
