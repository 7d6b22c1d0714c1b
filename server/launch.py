"""What gunicorn's master does besides HTTP: it starts and stops the engine host.

`configs/gunicorn.conf.py` hangs these functions on gunicorn's hooks. The master forks workers,
so nothing here imports torch, ZeroMQ or gevent.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from enginehouse.runtime.supervisor import HostSupervisor, host_command

RUN_DIR = "ENGINEHOUSE_RUN_DIR"
HOST_ADDRESS = "ENGINEHOUSE_HOST_ADDRESS"
PROMETHEUS_DIR = "PROMETHEUS_MULTIPROC_DIR"


class Launcher(NamedTuple):
    """A gunicorn master's engine host. supervisor None: the host is somebody else's."""

    run_dir: Path
    supervisor: HostSupervisor | None


def prepare_environment() -> None:
    """Give this server a private folder for its socket and metrics; workers inherit the names.

    A HOST_ADDRESS that is set already names a host that runs elsewhere: none is started.
    """
    if RUN_DIR in os.environ:  # gunicorn reads its configuration again on SIGHUP
        return
    run_dir = Path(tempfile.mkdtemp(prefix="enginehouse-"))
    os.environ[RUN_DIR] = str(run_dir)
    (run_dir / "metrics").mkdir()
    os.environ.setdefault(PROMETHEUS_DIR, str(run_dir / "metrics"))
    os.environ.setdefault(HOST_ADDRESS, f"ipc://{run_dir}/engine")


def start_host(url: str) -> Launcher:
    """Start the engine host beside gunicorn; its readiness is announced on standard output."""
    run_dir = Path(os.environ[RUN_DIR])
    address = os.environ[HOST_ADDRESS]
    if address != f"ipc://{run_dir}/engine":
        return Launcher(run_dir, None)
    engine = os.environ.get("ENGINEHOUSE_ENGINE", "")

    def give_up(reason: str) -> None:
        print(f"enginehouse: {reason}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    supervisor = HostSupervisor(
        host_command(engine, address), lambda facts: announce(url, facts), give_up
    )
    supervisor.start()
    return Launcher(run_dir, supervisor)


def stop_host(launcher: Launcher) -> None:
    """End the host and remove the private folder; workers have ended already."""
    if launcher.supervisor is not None:
        launcher.supervisor.stop()
    shutil.rmtree(launcher.run_dir, ignore_errors=True)


def announce(url: str, facts: dict[str, Any]) -> None:
    """Print where the server is, a line to paste, and what the engine can do."""
    tokens = facts["num_kv_blocks"] * facts["kv_block_size"]
    full = tokens // facts["max_seq_len"]
    model = os.environ.get("ENGINEHOUSE_MODEL_NAME") or facts["model"]
    rows = {
        "model": model,
        "quantisation": facts["quantization"],
        "TP x PP": f"{facts['tp_size']} x {facts['pp_size']}  ({facts['backend']} backend)",
        "context": f"{facts['max_seq_len']:,} tokens",
        "KV blocks": f"{facts['num_kv_blocks']:,} of {facts['kv_block_size']} tokens",
        "concurrency": f"{facts['max_batch_size']} requests, {full} of them at full context",
        "engine": f"{facts['name']}  {facts['digest'][:19]}",
    }
    lines = [f"  {key:<13} {value}" for key, value in rows.items()]
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    curl = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    print("\n".join(["", f"enginehouse is ready: {url}", *lines, "", curl, ""]), flush=True)
