"""Talk to a server with other people's clients, and print what was said.

    python scripts/client_transcripts.py --base-url http://127.0.0.1:8000/v1 --model NAME
    python scripts/client_transcripts.py --scripted --jobs 2

Each client is a file of scripts/clients: it asks for a plain answer, a stream, a tool's call and
JSON of a schema, by the client's own means; a judge is a client too. Python's run in environments
of their own, which uv makes and keeps; Node's in .cache/clients, where npm installs what
package.json there names. --scripted: the server is one of this script's own, with an engine whose
answers stand in scripts/scripted. A client whose runner or packages cannot be had is named and left
out. The exit status is 1 when anything is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from packages import NotHere, clean_environment, have, npm_install  # noqa: E402
from scripted.process import MODEL, scripted_server  # noqa: E402

CLIENTS = Path(__file__).resolve().parent / "clients"
NODE_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "clients"
LIMIT_S = 600  # of one client


class Outcome(NamedTuple):
    verdict: str
    said: str
    seconds: float


class NodePackages:
    """The Node clients and what package.json names, in a folder; installed once, by whoever asks
    first.
    """

    def __init__(self, folder: Path = NODE_FOLDER) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._tried = False
        self._missing: NotHere | None = None

    def command(self, path: Path) -> list[str]:
        """What runs one of the clients. Raises NotHere."""
        with self._lock:
            if not self._tried:
                self._tried = True
                self._install()
        if self._missing is not None:
            raise self._missing
        return ["node", str(self._folder / path.name)]

    def _install(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for source in (*CLIENTS.glob("*.mjs"), CLIENTS / "package.json"):
            shutil.copy(source, self._folder)
        try:
            npm_install(self._folder)
        except NotHere as missing:
            self._missing = missing


def files() -> dict[str, Path]:
    """The clients by name, Python's before Node's."""
    found = sorted(CLIENTS.glob("with_*.py")) + sorted(CLIENTS.glob("with_*.mjs"))
    return {path.stem.removeprefix("with_"): path for path in found}


def command(path: Path, packages: NodePackages) -> list[str]:
    """What runs a client's file, with all that it imports. Raises NotHere."""
    if path.suffix == ".mjs":
        return packages.command(path)
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    uv = shutil.which("uv", path=here)
    if uv is None:
        raise NotHere("uv is not installed")
    have([uv, "sync", "--quiet", "--script", str(path)])
    python = have([uv, "python", "find", "--script", str(path)]).strip()
    return [python, str(path)]


def run(path: Path, server: Mapping[str, str], packages: NodePackages) -> Outcome:
    began_s = time.monotonic()
    said = ""
    try:
        asked = command(path, packages)
        done = subprocess.run(
            asked,
            env={**clean_environment(), **server},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
        said = done.stdout
        verdict = f"FAILED: status {done.returncode}" if done.returncode else "works"
    except NotHere as missing:
        verdict = f"left out: {missing}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if error.stdout else ""
        verdict = f"FAILED: it took more than {LIMIT_S} s"
    return Outcome(verdict, said, time.monotonic() - began_s)


def try_all(chosen: Mapping[str, Path], server: Mapping[str, str], jobs: int) -> int:
    """Run them, each told when it ends, and print a line for each; the exit status."""
    packages = NodePackages()
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(jobs) as threads:
        running = {
            threads.submit(run, path, server, packages): name for name, path in chosen.items()
        }
        for future in as_completed(running):
            name = running[future]
            outcomes[name] = future.result()
            print(f"{name}:\n{outcomes[name].said}", end="", flush=True)
    print()
    for name in chosen:
        print(f"{name:<20} {outcomes[name].verdict} ({outcomes[name].seconds:.0f} s)")
    return int(any(outcome.verdict.startswith("FAILED") for outcome in outcomes.values()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--api-key", default="-", help="sent as the bearer key")
    parser.add_argument("--scripted", action="store_true", help="instead of the server at that URL")
    parser.add_argument("--client", choices=list(files()), action="append", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="so many clients at a time")
    args = parser.parse_args(argv)
    chosen = {k: v for k, v in files().items() if not args.client or k in args.client}
    server = {"OPENAI_BASE_URL": args.base_url, "OPENAI_API_KEY": args.api_key, "MODEL": args.model}
    if not args.scripted:
        return try_all(chosen, server, args.jobs)
    with scripted_server() as url:
        own = {"OPENAI_BASE_URL": f"{url}/v1", "MODEL": MODEL}
        return try_all(chosen, {**server, **own}, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
