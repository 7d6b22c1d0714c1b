"""Talk to a running server with other people's clients, and print what was said.

    python scripts/client_transcripts.py --base-url http://127.0.0.1:8000/v1 --model NAME

Each client is a file of scripts/clients: it asks for a plain answer, a stream, a tool's call and
JSON of a schema, by the client's own means. Python's run in environments of their own, which uv
makes and keeps; Node's in .cache/clients, where npm installs what package.json there names. A
client whose runner is missing is named and left out. The exit status is 1 when anything is not as
it should be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CLIENTS = Path(__file__).resolve().parent / "clients"
NODE_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "clients"
TIMEOUT_S = 600


def files() -> dict[str, Path]:
    """The clients by name, Python's before Node's."""
    found = sorted(CLIENTS.glob("with_*.py")) + sorted(CLIENTS.glob("with_*.mjs"))
    return {path.stem.removeprefix("with_"): path for path in found}


def command(path: Path) -> list[str] | None:
    """What runs a client's file; None where its runner is not installed."""
    if path.suffix == ".py":
        uv = shutil.which(
            "uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        )
        return None if uv is None else [uv, "run", "--quiet", "--script", str(path)]
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        return None
    NODE_FOLDER.mkdir(parents=True, exist_ok=True)
    for source in (*CLIENTS.glob("*.mjs"), CLIENTS / "package.json"):
        shutil.copy(source, NODE_FOLDER)
    install = [npm, "install", "--no-fund", "--no-audit", "--silent"]
    subprocess.run(install, cwd=NODE_FOLDER, check=True, timeout=TIMEOUT_S)
    return [node, str(NODE_FOLDER / path.name)]


def run(path: Path, environment: dict[str, str]) -> str:
    """Run one client, which prints for itself, and say how it went."""
    try:
        asked = command(path)
        if asked is None:
            return f"left out: {'uv' if path.suffix == '.py' else 'node or npm'} is not installed"
        status = subprocess.run(asked, env=environment, timeout=TIMEOUT_S).returncode
    except subprocess.TimeoutExpired:
        return f"FAILED: it took more than {TIMEOUT_S} s"
    except subprocess.CalledProcessError as error:
        return f"FAILED: its packages were not installed, status {error.returncode}"
    return "works" if status == 0 else f"FAILED: status {status}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--api-key", default="-", help="sent as the bearer key")
    parser.add_argument("--client", choices=list(files()), action="append", help="default: all")
    args = parser.parse_args(argv)
    server = {
        "OPENAI_BASE_URL": args.base_url,
        "OPENAI_API_KEY": args.api_key,
        "MODEL": args.model,
    }
    # uv gives each script its own packages: a path that holds ours would come before them.
    ours = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ours.pop("PYTHONSAFEPATH", None)  # a script imports what lies beside it
    outcomes = {}
    for name, path in files().items():
        if args.client and name not in args.client:
            continue
        print(f"{name}:", flush=True)
        start = time.monotonic()
        outcome = run(path, {**ours, **server})
        outcomes[name] = f"{outcome} ({time.monotonic() - start:.0f} s)"
    print()
    for name, outcome in outcomes.items():
        print(f"{name:<16} {outcome}")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
