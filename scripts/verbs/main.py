"""The program `enginehouse`: finds the verb's file, runs it, and says its refusals.

Knows the verbs by name and one line; adding one is its file and a row here.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import cast

from enginehouse.runtime.errors import EnginehouseError, unexpected_fault
from enginehouse.verbs.base import Verb

VERBS = {
    "build": "compile a Hugging Face checkpoint into an engine",
    "plan": "what an engine takes on each GPU, and the requests it allows",
    "families": "which architectures can be built, and which backends run them",
    "check": "will a quantised checkpoint load in another runtime, and be right",
    "doctor": "what works on this machine, and how to mend what does not",
    "compile": "finish a TensorRT-LLM build on the GPU machine",
    "serve": "serve an engine over OpenAI's API",
    "deploy": "write the manifests by which a cluster runs an engine",
    "chat": "talk to a server, or to an engine, in the terminal",
    "bench": "load a running server, measure it, and check what it sends",
    "run-batch": "answer a file of requests by an engine",
    "top": "watch a running server: load, latencies, errors, cost",
    "regress": "judge an engine against an older one: numerics, behaviour, speed",
}


def help_text() -> str:
    rows = [f"  {name:<9} {line}" for name, line in VERBS.items()]
    return "\n".join(
        [
            "usage: enginehouse VERB ...",
            "",
            "Compile Hugging Face checkpoints into engines, and serve them.",
            "",
            *rows,
            "",
            "examples:",
            "  enginehouse build path/to/hf-checkpoint -o engines/mine --quant int4",
            "  enginehouse serve engines/mine --port 8000",
            "  enginehouse chat http://127.0.0.1:8000",
            "",
            "`enginehouse VERB --help` says what a verb takes; --version is the version.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit status. Its refusals are one sentence in its name."""
    words = sys.argv[1:] if argv is None else argv
    prog = " ".join(["enginehouse", *words[:1]])
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except EnginehouseError as error:
        print(f"{prog}: {error}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{prog}: {where}{error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # what nobody thought of is one sentence too, and no status 1
        print(f"{prog}: {unexpected_fault(error, 'enginehouse')}", file=sys.stderr)
    return 2


def _run(words: list[str]) -> int:
    name = words[0] if words else ""
    if name in ("-h", "--help", "help"):
        print(help_text())
    elif name == "--version":
        from importlib.metadata import version

        print(f"enginehouse {version('enginehouse')}")
    elif name in VERBS:
        verb = cast(Verb, importlib.import_module(f"enginehouse.verbs.{name.replace('-', '_')}"))
        return verb.main(words[1:])
    else:
        print(_refusal(name), file=sys.stderr)
        return 2
    return 0


def _refusal(name: str) -> str:
    if not name:
        return help_text()
    near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(VERBS)}"
    return f"enginehouse: there is no verb {name!r}; {hint}"


if __name__ == "__main__":
    raise SystemExit(main())
