"""`enginehouse run-batch`: answer a file of requests by an engine, without a server of yours.

The same batch as over HTTP (server/api/batches/), in a folder beside the output, by a server that
lives as long as this takes. What is interrupted goes on where it was when it is run again.
Exit status: 0, 1 when a line has an error instead of an answer, 2 when it could not run.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.api.batches.body import ENDPOINTS
from enginehouse.server.api.batches.folder import Folder
from enginehouse.server.api.batches.journal import Batch, Journal
from enginehouse.server.api.batches.new_batch import ENDED, new_batch, seconds_of
from enginehouse.server.client.own_server import OwnServer, free_port, serve_command
from enginehouse.verbs.base import VerbParser

_START_S, _POLL_S = 600.0, 0.2
_WINDOW = "365d"
_ANY_SIZE, _PIECE_BYTES = 1 << 62, 1 << 20


def make_parser() -> VerbParser:
    parser = VerbParser(
        "run-batch",
        "INPUT -o OUTPUT --engine DIR [--window 24h]",
        "Answer a file of requests, one on each line as POST /v1/batches takes them, by an engine "
        "on this machine. Lines that cannot be answered go to OUTPUT with .errors at its end. What "
        "is interrupted is kept in OUTPUT.batch/, and goes on when the same is run again. Exit "
        "status 1: a line has an error.",
        "enginehouse run-batch in.jsonl -o out.jsonl --engine engines/mine",
    )
    parser.add_argument("input", nargs="?", type=Path, metavar="INPUT", help="the requests")
    parser.add_argument("-o", "--output", type=Path, metavar="OUTPUT", help="their answers")
    parser.add_argument("--engine", metavar="DIR", help="the engine directory")
    parser.add_argument(
        "--window", help=f"how long it may take in all, such as 24h (default {_WINDOW})"
    )
    return parser


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("input", "output", "engine"):
        if getattr(args, name) is None:
            parser.error(f"{name} is not given")
    errors = args.output.with_name(f"{args.output.name}.errors")
    state = args.output.with_name(f"{args.output.name}.batch")
    asked = state / "asked.json"
    for path in (args.output, errors):
        if path.exists() and not asked.exists():  # else they are of a run that was cut
            raise EnginehouseError(f"{path} is there already; remove it, or name another output")
    digest, endpoint = _read_input(args.input)
    if args.window is not None:
        seconds_of(args.window)  # refused before anything is made
    folder = Folder(state, _ANY_SIZE)
    with _alone(state):
        journal = Journal(folder)
        batch = _batch_of(args, folder, journal, asked, digest, endpoint)
        if batch.data["status"] not in ENDED:
            batch = _run(args.engine, journal, batch, state)
        return _end(args, folder, batch, state, errors)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Nobody else works on it meanwhile."""
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnginehouseError(
                f"another run-batch works in {state}; wait for it, or name another output"
            ) from None
        yield


def _end(args: argparse.Namespace, folder: Folder, batch: Batch, state: Path, errors: Path) -> int:
    if batch.data["status"] == "failed":
        [error] = batch.data["errors"]["data"]
        shutil.rmtree(state)
        raise EnginehouseError(f"{args.input}: {error['message']}")
    for name, path in (("output_file_id", args.output), ("error_file_id", errors)):
        file_id = batch.data[name]
        if file_id is not None and folder.place(file_id).exists():
            folder.place(file_id).rename(path)
    shutil.rmtree(state)
    return _report(batch.data, args.output, errors)


def _read_input(path: Path) -> tuple[str, str]:
    """The digest of its bytes, and its endpoint."""
    try:
        return _digest_of(path), _endpoint(path)
    except OSError as error:
        raise EnginehouseError(f"{path} cannot be read: {error.strerror}") from None


def _batch_of(
    args: argparse.Namespace,
    folder: Folder,
    journal: Journal,
    asked: Path,
    digest: str,
    endpoint: str,
) -> Batch:
    """The one that is in the folder already, or a new one of the input."""
    if asked.exists():
        kept = json.loads(asked.read_text())
        if kept["digest"] != digest:
            raise EnginehouseError(
                f"{asked.parent} is of another input; remove it, or name another output"
            )
        if args.window not in (None, kept["window"]):
            raise EnginehouseError(
                f"--window: found {args.window}, but {asked.parent} was begun with "
                f"{kept['window']}; leave it out, or remove the folder to begin again"
            )
        batch = journal.get("", kept["batch"])
        assert batch is not None, "it is there before its name is written"
        return batch
    copy = asked.parent / "input.part"
    shutil.copyfile(args.input, copy)
    now = int(time.time())
    file = folder.add(copy, "", args.input.name, "batch", now)
    window = args.window or _WINDOW
    made = new_batch(file.id, endpoint, window, {}, now, str(args.engine))
    journal.add("", made)
    partial = asked.with_suffix(".part")
    partial.write_text(json.dumps({"digest": digest, "batch": made["id"], "window": window}))
    partial.rename(asked)
    return Batch("", made, False)


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _endpoint(path: Path) -> str:
    """That of the first line; the others are held to it."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        url = json.loads(first)["url"]
    except (ValueError, KeyError, TypeError):
        url = None
    if url not in ENDPOINTS:
        raise EnginehouseError(
            f"{path}: its first line asks {json.dumps(url)}; wanted an object with a url of "
            f"{', '.join(ENDPOINTS)}"
        )
    return str(url)


def _run(engine: str, journal: Journal, batch: Batch, state: Path) -> Batch:
    port = free_port()
    env = {**os.environ, "ENGINEHOUSE_FILES_DIR": str(state.resolve())}
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with OwnServer(serve_command(engine, port), port, state / "server.log", env) as server:
        console.print(f"{engine} is starting; what it says is in {state / 'server.log'}")
        server.wait_ready(_START_S)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("validating", total=None)
            while True:
                found = journal.get("", batch.id)
                assert found is not None, "nobody else removes it"
                told = found.data
                if told["status"] in ENDED:
                    return found
                total = told["request_counts"]["total"] or None
                done = sum(journal.counts(found))
                progress.update(task, description=told["status"], total=total, completed=done)
                _still_runs(server)
                time.sleep(_POLL_S)


def _still_runs(server: OwnServer) -> None:
    if not server.is_running:
        raise EnginehouseError(server.explain(EnginehouseError("it ended")))


def _report(told: dict[str, Any], output: Path, errors: Path) -> int:
    counts, usage = told["request_counts"], told["usage"]
    print(
        f"{counts['completed']} of {counts['total']} lines are answered in {output}; "
        f"{usage['input_tokens']} tokens in, {usage['output_tokens']} out, "
        f"${usage['estimated_cost']:.6f}"
    )
    if counts["failed"]:
        print(f"{counts['failed']} have an error, in {errors}", file=sys.stderr)
    return 1 if counts["failed"] else 0
