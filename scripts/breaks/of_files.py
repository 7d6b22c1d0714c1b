"""Files under a running server: an engine's, cut, changed and removed; a disk that is full."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from breaks.case import Case, Fault
from breaks.clients import Crowd, ask, summary
from breaks.server import NeverHappened

_CLEAR = {"200", "200, then engine_unavailable", "503 engine_unavailable"}


def _weights(engine: Path) -> Path:
    """The file that is mapped while the engine runs."""
    packed = engine / "packed.safetensors"
    return packed if packed.exists() else engine / "rank0.safetensors"


def _harmed_by(harm):
    """The engine's weights are harmed in place, under load, and put back as they were."""

    def run(case: Case) -> None:
        path = _weights(case.engine.resolve())
        kept = shutil.copyfile(path, case.folder / "kept")
        crowd = Crowd(case.port, 2, 200, stream=True)
        case.wait(lambda: len(crowd.seen) > 2, "they ask")
        is_mapped = _is_mapped(case, path)
        harm(path)
        broken_s = time.monotonic()
        if not is_mapped:
            before = len(crowd.seen)
            case.wait(lambda: len(crowd.seen) > before + 20, "they are answered")
            shutil.copyfile(kept, path)
            seen = crowd.stop()
            case.saw = f"{summary(seen)}; its weights were copied when it was loaded"
            case.want({each.what for each in seen} == {"200"}, "all are answered")
            return
        refused = f"enginehouse-host: {path}"
        case.wait(lambda: refused in case.server.log, "the file is refused by its name")
        told_s = time.monotonic() - broken_s
        case.wait(lambda: case.server.log.count(refused) > 1, "and by the next host")
        case.wait(lambda: case.server.get("/health/ready")[0] == 503, "it is not ready")
        shutil.copyfile(kept, path)
        back_s = time.monotonic()
        case.wait(case.server.is_ready, "ready again")
        case.recovery_s = time.monotonic() - back_s
        seen = crowd.stop()
        case.saw = f"{summary(seen)}; refused after {told_s:.1f} s"
        found = {each.what for each in seen}
        case.want(found <= _CLEAR, "each is answered or told that the engine is unavailable")
        case.want(found != {"200"}, "no client saw it: answers were made from what was harmed")
        case.want(ask(case.port).what == "200", "it answers again")

    return run


def _is_mapped(case: Case, path: Path) -> bool:
    """Whether the host reads the file where it lies: the torch backend copies most weights."""
    host = case.server.host()
    if host is None:
        raise NeverHappened("there is no engine host")
    return str(path) in Path(f"/proc/{host.pid}/maps").read_text(encoding="utf-8")


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(4096)


def _change(path: Path) -> None:
    """The same size: nothing but its bytes tells."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(min(65536, size - size // 2)))


def removed(case: Case) -> None:
    """What runs has its files open; a reload refuses, and nothing changes."""
    engine = case.engine.resolve()
    away = engine.rename(engine.with_name("away"))
    seen = [ask(case.port) for _ in range(3)]
    case.server.process.send_signal(1)
    case.wait(lambda: "all stays as it is" in case.server.log, "a reload is refused")
    seen += [ask(case.port) for _ in range(3)]
    away.rename(engine)
    case.saw = summary(seen)
    case.want({each.what for each in seen} == {"200"}, "it answers all the while")


def disk_full(case: Case) -> None:
    """Metrics, the log and the shared counts are on a disk of 1 MiB, which fills up under load."""
    disk = case.folder / "disk"
    crowd = Crowd(case.port, 4, 20)
    case.wait(lambda: len(crowd.seen) > 4, "they ask")
    filler = disk / "filler"
    _fill(filler)
    broken_s, before = time.monotonic(), len(crowd.seen)
    pids = [each.pid for each in case.server.workers()]
    # A code of error that no metric has had yet: its count wants new room.
    seen = [ask(case.port, 8, n=-1), ask(case.port, 8, temperature=9), ask(case.port, stream=True)]
    pids_left = {each.pid for each in case.server.workers()}
    case.server.workers()[0].kill()  # the next one starts while the disk is full
    case.wait(lambda: len(crowd.seen) > before + 40, "they are answered")
    case.wait(case.server.is_ready, "ready on a full disk")
    seen.append(ask(case.port))
    filler.unlink()
    seen += crowd.stop()
    case.recovered(broken_s)
    case.saw = summary(seen)
    case.want(set(pids) == pids_left, "a full disk ends no worker")
    case.want(seen[3].what == "200", "a worker that starts on a full disk answers")
    case.want(case.server.get("/metrics")[0] == 200, "metrics are told")


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 512):
                pass
        except OSError:
            pass


def _small_disk(folder: Path, env: dict[str, str]) -> None:
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    subprocess.run(mount, check=True, capture_output=True, timeout=10)
    env["TMPDIR"] = str(disk)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder / "disk")], check=False, timeout=10)


def _lacks_mount() -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            _small_disk(Path(folder), {})
        except (OSError, subprocess.SubprocessError):
            return "the right to mount a disk, as root has it"
        _unmount(Path(folder))
        return ""


FAULTS = [
    Fault("engine-cut", _harmed_by(_cut), copy=True),
    Fault("engine-changed", _harmed_by(_change), copy=True),
    Fault("engine-removed", removed, copy=True),
    Fault(
        "disk-full", disk_full, quick=False, lacks=_lacks_mount, prepare=_small_disk, clean=_unmount
    ),
]
