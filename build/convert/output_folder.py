"""Where a build writes: a hidden folder beside the output, which takes its place when all is done.

Nothing here knows what an engine is made of, beyond the names of its files.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from enginehouse.build.convert.journal import Journal
from enginehouse.build.sources.tokenizer_files import TOKENIZER_FILES
from enginehouse.runtime.engine import MANIFEST, Manifest
from enginehouse.runtime.errors import PlanError

_RANK_FILE = re.compile(r"rank\d+\.safetensors")


def refuse_foreign(output: Path, until: str) -> None:
    """Never replace what this project did not make, nor a verified engine by less than one."""
    if not output.exists():
        return
    if not output.is_dir():
        raise PlanError(f"{output} is a file; choose another output")
    names = {path.name for path in output.iterdir()}
    try:
        manifest = msgspec.json.decode((output / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        ours = {"config.json", *TOKENIZER_FILES}
        extra = {name for name in names - ours if not _RANK_FILE.fullmatch(name)}
        if names and "config.json" not in names:
            extra = names
    else:
        extra = names - {MANIFEST, *manifest.files}
        if until != "verify" and manifest.verify is not None and not extra:
            raise PlanError(
                f"{output} is a verified engine, which --until {until} would replace; "
                "choose another output"
            )
    if extra:
        raise PlanError(
            f"{output} holds {min(extra)}, which is no part of an engine or a checkpoint; "
            "choose another output, or move it away"
        )


@contextmanager
def made_parents(output: Path) -> Iterator[None]:
    """Folders above the output that come to be in the body, and stay empty, are gone after it."""
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        yield
    finally:
        for parent in missing:  # the lowest first
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def unfinished(output: Path, key: str) -> Iterator[tuple[Path, Journal]]:
    """A hidden folder beside `output`, for one build at a time, and the journal of what it holds.

    A build that is interrupted leaves both, and the next one with the same key goes on; after
    anything else they are gone. KeyboardInterrupt then says so.
    """
    hidden = output.with_name(f".{output.name}.partial")
    lock_path = output.with_name(f".{output.name}.lock")
    try:
        lock = lock_path.open("w")
    except OSError as error:
        raise PlanError(f"{output.parent} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = lock_path.stat().st_ino == os.fstat(lock.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            current = False  # held, or just unlinked by the build that held it
        if not current:
            raise PlanError(
                f"another build of {output} is running; wait for it or choose another output"
            )
        journal = Journal(hidden / "journal")
        kept = False
        try:
            _restore_older(output)
            if not journal.belongs_to(key):
                shutil.rmtree(hidden, ignore_errors=True)
                (hidden / "engine").mkdir(parents=True)
                journal.begin(key)
            yield hidden / "engine", journal
        except KeyboardInterrupt:
            kept = not journal.is_empty
            if kept:
                raise KeyboardInterrupt(
                    f"{hidden} keeps what is finished: give the same command again to go on, "
                    "or delete it"
                ) from None
            raise
        finally:
            if not kept:
                shutil.rmtree(hidden, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def replace_folder(new: Path, output: Path) -> None:
    """Put the finished folder in its place. An older one is moved aside first, then deleted;
    when the build is killed in between, the next one moves it back.
    """
    aside = _aside(output)
    if output.exists():
        output.rename(aside)
    new.rename(output)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def _restore_older(output: Path) -> None:
    """Undo what a build that was killed while it replaced the output left behind."""
    aside = _aside(output)
    if aside.exists() and not output.exists():
        aside.rename(output)
    shutil.rmtree(aside, ignore_errors=True)
