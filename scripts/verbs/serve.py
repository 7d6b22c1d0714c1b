"""`enginehouse serve`: an engine -> gunicorn in this process's place, as `make serve` runs it.

A flag sets a variable of the server's, whatever the environment says; what is not given is left to
the environment. What a variable means stands in docs/serving.md. Several nodes are
enginehouse-launch's.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.verbs.base import VerbParser, count_up_to

# Groups of: flag, the variable that it sets, what argparse makes of it, help.
_Flag = tuple[str, str, dict[str, Any], str]
_LISTEN: tuple[_Flag, ...] = (
    (
        *("--name", "MODEL_NAME", {"metavar": "NAME"}),
        "the model clients ask for; else the engine's",
    ),
    (
        *("--api-keys-file", "API_KEYS_FILE", {"metavar": "FILE"}),
        "let in who has one of these keys, one a line",
    ),
    (
        *("--cors-origins", "CORS_ORIGINS", {"metavar": "ORIGINS"}),
        "web pages that may ask, between commas; * for all",
    ),
    (
        *("--workers", "WORKERS", {"type": count_up_to(1024), "metavar": "N"}),
        "processes that speak HTTP (default 1)",
    ),
    (
        *("--replicas", "REPLICAS", {"metavar": "N"}),
        "engine hosts that share GPUs or threads (default 1)",
    ),
)
_SIZE: tuple[_Flag, ...] = (
    (
        *("--max-seq-len", "MAX_SEQ_LEN", {"type": count_up_to(10**9 - 1), "metavar": "N"}),
        "context, in tokens (vLLM's --max-model-len)",
    ),
    (
        *("--max-batch-size", "MAX_BATCH_SIZE", {"type": count_up_to(10**9 - 1), "metavar": "N"}),
        "sequences that run (vLLM's --max-num-seqs)",
    ),
    (
        *("--max-num-tokens", "MAX_NUM_TOKENS", {"type": count_up_to(10**9 - 1), "metavar": "N"}),
        "tokens computed in one iteration",
    ),
    (
        *("--prefill-ms", "PREFILL_MS", {"metavar": "MS"}),
        "of an iteration, for prompts beside answers",
    ),
    (
        *("--kv-cache-gib", "KV_CACHE_GIB", {"metavar": "GIB"}),
        "of keys and values, on each GPU or the CPU",
    ),
)
_LOG: tuple[_Flag, ...] = (
    (
        *("--log-level", "LOG_LEVEL", {"metavar": "LEVEL"}),
        "debug, info, warning or error (default info)",
    ),
    (
        *("--log-format", "LOG_FORMAT", {"choices": ("text", "json"), "metavar": "FORMAT"}),
        "of each line: text (default) or json",
    ),
    (
        *("--access-log", "ACCESS_LOG", {"choices": ("0", "1"), "metavar": "0|1"}),
        "a line for each request (default: 1 on a terminal)",
    ),
)
_ENGINE: tuple[_Flag, ...] = (
    (
        *("--deterministic", "DETERMINISTIC", {"action": "store_const", "const": "1"}),
        "no neighbour in the batch can change an answer",
    ),
    (
        *("--speculative", "SPECULATIVE", {"choices": ("ngram", "off"), "metavar": "HOW"}),
        "drafts of backend=cpu: ngram (default) or off",
    ),
    (
        *("--device", "DEVICE", {"choices": ("auto", "cpu", "cuda"), "metavar": "DEVICE"}),
        "of the torch backend: auto, cpu or cuda",
    ),
    (
        *("--tp-size", "TP_SIZE", {"type": count_up_to(9999), "metavar": "N"}),
        "GPUs that share a checkpoint of --format hf",
    ),
    (
        *("--start-s", "START_S", {"type": count_up_to(999_999), "metavar": "S"}),
        "seconds TensorRT-LLM may take (default 1200)",
    ),
)
_ANSWERS: tuple[_Flag, ...] = (
    (
        *("--tool-format", "TOOL_FORMAT", {"metavar": "FORMAT"}),
        "how the model writes calls, such as hermes",
    ),
    (
        *("--reasoning-format", "REASONING_FORMAT", {"metavar": "HOW"}),
        "<think> in answers: auto, none or think",
    ),
    (
        *("--price-input", "PRICE_INPUT", {"metavar": "DOLLARS"}),
        "of a million prompt tokens, for estimated_cost",
    ),
    (
        *("--price-output", "PRICE_OUTPUT", {"metavar": "DOLLARS"}),
        "of a million generated tokens",
    ),
)
_GROUPS = {
    "at once (default: as built; more than was compiled is refused)": _SIZE,
    "how it runs, and what it says of it": (*_ENGINE, *_LOG),
    "answers": _ANSWERS,
}
_FLAGS = [*_LISTEN, *(flag for group in _GROUPS.values() for flag in group)]


class Bind(NamedTuple):
    """Where to listen. host as a bind has it: an IPv6 address in brackets, '' for all."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def make_parser() -> VerbParser:
    parser = VerbParser(
        "serve",
        "ENGINE [--host HOST] [--port PORT] [flags]",
        "Serve a built engine over OpenAI's API. Flags override ENGINEHOUSE_ variables.",
        "enginehouse serve engines/mine --host 0.0.0.0 --port 9000 --workers 2",
        add_help=False,
    )
    # Usage names it, and who reads this has found --help: more takes the screen's last lines.
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("engine", nargs="?", metavar="ENGINE", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=count_up_to(65535), help="(default 8000)")
    _add(parser, _LISTEN)
    parser.add_argument(
        "--ray", action="store_true", help="Ray Serve runs the --replicas; 1-4: by the queue"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    for title, flags in _GROUPS.items():
        _add(parser.add_argument_group(title), flags)
    return parser


def _add(group: argparse._ActionsContainer, flags: Sequence[_Flag]) -> None:
    for flag, name, kind, text in flags:
        group.add_argument(flag, dest=name, help=text, **kind)


def main(argv: list[str]) -> int:
    """Become the server; returns only from a dry run."""
    args = make_parser().parse_args(argv)
    from enginehouse.runtime.machine.gpus import visible_gpus
    from enginehouse.server.launch.launcher import (
        become,
        gunicorn_command,
        plan_launch,
        read_served,
        tell,
    )
    from enginehouse.server.launch.process_settings import host_flags, log_format, num_replicas
    from enginehouse.server.launch.ray_front import RayFront
    from enginehouse.server.launch.shares import shares_of
    from enginehouse.server.settings import ServerSettings

    settings, bind = settings_of(args, os.environ)
    front = RayFront.of(settings, os.environ) if args.ray else None
    settings |= front.settings if front else {}
    launch = plan_launch(
        read_served(engine_of(args.engine, os.environ), {**os.environ, **settings}),
        os.environ,
        gunicorn=gunicorn_command(),
        settings=settings,
        num_gpus=len(visible_gpus()) or None,
    )
    # Each process reads it by itself: what is wrong is told here once, before there is any.
    host_flags(launch.env)
    shares_of(Path(launch.env["ENGINEHOUSE_ENGINE"]), num_replicas(launch.env), launch.env)
    ServerSettings.from_environment({"ENGINEHOUSE_HOST_ADDRESS": "ipc://unknown-yet", **launch.env})
    if not args.dry_run and bind is not None:
        check_free(bind)
    tell(launch, "text" if args.dry_run else log_format(launch.env))
    if args.dry_run:
        return 0
    if front:
        front.start(launch.env)
    become(launch)


def engine_of(given: Path | None, env: Mapping[str, str]) -> Path:
    """The engine directory that is given, else the environment's."""
    path = given or env.get("ENGINEHOUSE_ENGINE")
    if not path:
        raise EnginehouseError(
            "no engine is given; name a directory that `enginehouse build` made, or run "
            "`make serve` in a checkout, which makes the sample's and serves it"
        )
    return Path(os.path.abspath(path))


def settings_of(
    args: argparse.Namespace, env: Mapping[str, str]
) -> tuple[dict[str, str], Bind | None]:
    """Variables that flags set, and where it will listen; None where that is no host and port."""
    given = {name: getattr(args, name) for _, name, _, _ in _FLAGS}
    settings = {f"ENGINEHOUSE_{name}": str(v) for name, v in given.items() if v is not None}
    bind = _parse_bind(env.get("ENGINEHOUSE_BIND") or "127.0.0.1:8000")
    if args.host is None and args.port is None:
        return settings, bind
    known = bind or Bind("127.0.0.1", 8000)
    host = known.host if args.host is None else args.host
    bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
    bind = Bind(bracketed, args.port or known.port)
    return {**settings, "ENGINEHOUSE_BIND": str(bind)}, bind


def _parse_bind(text: str) -> Bind | None:
    host, colon, port = text.rpartition(":")
    return Bind(host, int(port)) if colon and port.isdigit() else None


def check_free(bind: Bind) -> None:
    """Raises EnginehouseError when nobody can listen there; gunicorn would try for 5 seconds."""
    host = bind.host.strip("[]") or "0.0.0.0"
    try:
        family = socket.getaddrinfo(host, bind.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, bind.port))
    except OSError as error:
        listener = _listener(bind.port) if error.errno == errno.EADDRINUSE else ""
        raise EnginehouseError(
            f"{bind} cannot be listened on: {error.strerror}{listener}; choose another with --host "
            "and --port, or HOST= and PORT= of make serve"
        ) from None


def _listener(port: int) -> str:
    """Who listens on a port, where the system tells this user."""
    with contextlib.suppress(psutil.Error):
        for each in psutil.net_connections("tcp"):
            listens = each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
            if listens and each.pid:
                return f" (by {psutil.Process(each.pid).name()}, process {each.pid})"
    return ""
