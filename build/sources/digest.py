"""The digest of a source's files: by it an engine is known to be made of just these weights."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from enginehouse.runtime.engine import file_sha256
from enginehouse.runtime.errors import CheckpointError


class SourceDigest(NamedTuple):
    """files: {name: {"bytes", "mtime_ns", "sha256"}}; digest: "sha256:..." over all of them."""

    files: dict[str, dict[str, Any]]
    digest: str


def source_digest(
    files: Iterable[Path],
    known: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SourceDigest:
    """Digest files two at a time; those whose size and mtime are `known` are not read again.

    progress(bytes done, bytes in all) counts only what is read. The overall digest depends on
    names and contents, not on times.
    """
    paths = sorted({path.name: path for path in files}.items())
    found: dict[str, dict[str, Any]] = {}
    unread: list[tuple[str, Path]] = []
    for name, path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        found[name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        old = (known or {}).get(name, {})
        if old.get("sha256") and all(old.get(key) == found[name][key] for key in found[name]):
            found[name]["sha256"] = old["sha256"]
        else:
            unread.append((name, path))

    total = sum(found[name]["bytes"] for name, _ in unread)
    done, lock = 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    with ThreadPoolExecutor(max_workers=2) as pool:
        digests = pool.map(lambda item: _digest(item[1], advance), unread)
        for (name, _), digest in zip(unread, digests, strict=True):
            found[name]["sha256"] = digest
    whole = "".join(f"{name} {item['sha256']}\n" for name, item in found.items())
    return SourceDigest(found, "sha256:" + hashlib.sha256(whole.encode()).hexdigest())


def _digest(path: Path, advance: Callable[[int], None]) -> str:
    try:
        return file_sha256(path, advance)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
