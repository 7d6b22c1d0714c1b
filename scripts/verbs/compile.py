"""`enginehouse compile`: a TensorRT-LLM checkpoint -> its engine, on the GPU machine.

Knows no compiler: build/cli.py runs it.
"""

from __future__ import annotations

from enginehouse.verbs.base import VerbParser


def main(argv: list[str]) -> int:
    from enginehouse.build.command import prepare

    prepare()
    from enginehouse.build import cli

    parser = VerbParser(
        "compile",
        "CHECKPOINT [-o ENGINE] [--workers N] [--until STAGE] [--quiet]",
        "Compile a checkpoint that a build for TensorRT-LLM left, on this machine's GPU. Limits "
        "and flags are the ones it was built for.",
        "enginehouse compile engines/llama-fp8.checkpoint",
    )
    return cli.exit_status(lambda: cli.run_compile(parser, argv), parser.prog)
