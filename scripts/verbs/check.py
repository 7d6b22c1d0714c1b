"""`enginehouse check`: will a quantised checkpoint load in another runtime, and be right there?

Exit status: 0 nothing was found that keeps it from loading, 1 something was, 2 it cannot be read.
"""

from __future__ import annotations

from pathlib import Path

from enginehouse.verbs.base import VerbParser


def make_parser() -> VerbParser:
    parser = VerbParser(
        "check",
        "DIR [--for RUNTIME] [--fix OUTPUT]",
        "Look for what is known to keep a quantised Hugging Face checkpoint from loading in vLLM, "
        "SGLang or TensorRT-LLM, or to make it wrong there: names that a list leaves out or spells "
        "otherwise, scales that are missing, odd or apart, heads, KV cache, files. Exit status 1: "
        "it would not load.",
        "enginehouse check path/to/quantised --for vllm-0.33",
        "enginehouse check path/to/quantised --fix path/to/mended",
    )
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="the checkpoint")
    parser.add_argument(
        "--for",
        dest="runtimes",
        action="append",
        metavar="RUNTIME",
        help="vllm-0.33, sglang-0.5, trtllm-1.2.1 or trtllm-1.4; may be given again (default all)",
    )
    parser.add_argument(
        "--fix",
        type=Path,
        metavar="OUTPUT",
        help="write a copy with the JSON mended, beside hard links of the weights",
    )
    return parser


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.directory is None:
        parser.error("DIR is not given")
    from enginehouse.build.check.mend import mend
    from enginehouse.build.check.rules import RUNTIMES, faults_of
    from enginehouse.build.check.stored import Stored

    unknown = [name for name in args.runtimes or () if name not in RUNTIMES]
    if unknown:
        parser.error(f"{unknown[0]} is not known; choose among {', '.join(RUNTIMES)}")
    runtimes = frozenset(args.runtimes or RUNTIMES)
    found = list(faults_of(Stored(args.directory), runtimes))
    for rule, fault in found:
        caught = ", ".join(name for name in RUNTIMES if name in rule.catches & runtimes)
        kind = "loads, but" if fault.loads else "does not load:"
        mends = " (--fix mends it)" if fault.change else ""
        print(f"{rule.name} [{caught}] {kind} {fault.where} {fault.words}{mends}")
    changes = [fault.change for _, fault in found if fault.change is not None]
    if args.fix is not None:
        if changes:
            mend(args.directory, changes, args.fix)
            print(f"mended {len(changes)} of {len(found)}: {args.fix}")
        else:
            print("nothing that JSON would mend; nothing was written")
    stops = sum(not fault.loads for _, fault in found)
    print(f"{len(found)} found, {stops} of which keep it from loading")
    return 1 if stops else 0
