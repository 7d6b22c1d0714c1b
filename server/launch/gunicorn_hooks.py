"""What gunicorn's master does besides HTTP: it starts, exchanges and stops the engine host.

`gunicorn_conf.py` hangs these functions on gunicorn's hooks. The master forks workers,
so nothing here imports torch or ZeroMQ, or starts gevent's hub.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.host.log_lines import last_words, log_to_stderr
from enginehouse.server.launch import hosts, process_settings
from enginehouse.server.launch.metric_files import take_room
from enginehouse.server.launch.process_settings import host_flags, num_replicas, watchdog_s
from enginehouse.server.launch.shares import shares_of
from enginehouse.server.nodes.rank_group import say_that_it_serves

_LOG = logging.getLogger("enginehouse.launch")
RUN_DIR = "ENGINEHOUSE_RUN_DIR"
HOST_ADDRESS = "ENGINEHOUSE_HOST_ADDRESS"
REPLICAS_FILE = "ENGINEHOUSE_REPLICAS_FILE"
STARTED_S = "ENGINEHOUSE_STARTED_S"
PROMETHEUS_DIR = "PROMETHEUS_MULTIPROC_DIR"

_logs: int | None = None  # the process whose log is set up
_hosts: hosts.Hosts | None = None  # gunicorn runs its configuration again on SIGHUP
_failures: list[str] = []
_GRACE_AFTER_FAILURE_S = 3  # a worker that is still booting misses its SIGTERM


def prepare_environment() -> None:
    """Give this server a private folder for its socket and metrics; workers inherit the names.

    A HOST_ADDRESS or REPLICAS_FILE that is set already names hosts that run elsewhere: none is
    started.
    """
    if RUN_DIR in os.environ:  # gunicorn reads its configuration again on SIGHUP
        return
    run_dir = Path(tempfile.mkdtemp(prefix="enginehouse-"))
    os.environ[RUN_DIR] = str(run_dir)
    os.environ[STARTED_S] = f"{time.time():.3f}"
    (run_dir / "metrics").mkdir()
    os.environ.setdefault(PROMETHEUS_DIR, str(run_dir / "metrics"))
    os.environ.setdefault(HOST_ADDRESS, f"ipc://{run_dir}/engine")
    if num_replicas(os.environ) > 1:
        os.environ.setdefault(REPLICAS_FILE, str(run_dir / "replicas.json"))


def num_workers() -> int:
    """ENGINEHOUSE_WORKERS; ends the process with one sentence when it is no count."""
    text = os.environ.get("ENGINEHOUSE_WORKERS", "1")
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        end(f"ENGINEHOUSE_WORKERS={text!r}; wanted a number from 1 to 1024")
    return int(text)


def log_level() -> str:
    """gunicorn's own, ENGINEHOUSE_LOG_LEVEL; one sentence and the end when it is none."""
    try:
        process_settings.log_format(os.environ)
        return process_settings.log_level(os.environ)
    except EnginehouseError as error:
        end(str(error))


def end(reason: str) -> NoReturn:
    """With one sentence; in the log, where lines are JSON."""
    form = os.environ.get("ENGINEHOUSE_LOG_FORMAT", "")
    if form == "json" and _logs != os.getpid():
        log_to_stderr("error", traffic=False, form=form)
    last_words("enginehouse", reason, form)
    sys.exit(1)


def start_log() -> None:
    """What this process logs from now on: the master, and each worker once it is forked."""
    global _logs
    if _logs != os.getpid():
        _logs = os.getpid()
        form = process_settings.log_format(os.environ)
        log_to_stderr(log_level(), process_settings.logs_traffic(os.environ), form)


def begin_worker() -> None:
    """In a worker that was forked in this moment."""
    start_log()
    take_room(Path(os.environ[PROMETHEUS_DIR]))


def check_engine() -> None:
    """End the process with one sentence, before any fork, when there is no engine to serve."""
    path = Path(os.environ.get("ENGINEHOUSE_ENGINE") or "ENGINEHOUSE_ENGINE (not set)")
    try:
        host_flags(os.environ)
        watchdog_s(os.environ)
        hosts.check_engine(path)
        shares_of(path, num_replicas(os.environ), os.environ)
    except EnginehouseError as error:
        shutil.rmtree(os.environ[RUN_DIR], ignore_errors=True)
        end(str(error))


def start_host(url: str, shorten_grace: Callable[[int], None]) -> None:
    """Start the engine host beside gunicorn; its readiness is announced on standard output.

    shorten_grace(seconds): how long workers get to end when the host cannot serve its engine.
    """
    global _hosts
    address, run_dir = os.environ[HOST_ADDRESS], os.environ[RUN_DIR]
    own_file = f"{run_dir}/replicas.json"
    if address != f"ipc://{run_dir}/engine" or os.environ.get(REPLICAS_FILE, own_file) != own_file:
        return  # somebody else's hosts

    def give_up(reason: str) -> None:
        last_words("enginehouse", reason, process_settings.log_format(os.environ))
        _failures.append(reason)
        shorten_grace(_GRACE_AFTER_FAILURE_S)
        os.kill(os.getpid(), signal.SIGTERM)

    _hosts = hosts.Hosts(Path(run_dir), partial(announce, url), num_replicas(os.environ))
    _hosts.start(address, give_up)


def may_reload(last_worker: int) -> bool:
    """At SIGHUP: whether workers can be started anew at once. Another engine in the same place is
    loaded first, and SIGHUP comes again; with what is wrong the workers that run stay.

    last_worker: the age of the youngest of those that run.
    """
    try:
        return _hosts is None or _hosts.reload(
            last_worker, lambda: os.kill(os.getpid(), signal.SIGHUP)
        )
    except EnginehouseError as error:
        _LOG.error("nothing is read again, and all stays as it is: %s", error)
        return False


def worker_ended(ages: Collection[int]) -> None:
    """ages: of the workers that are left."""
    if _hosts is not None:
        _hosts.retire(min(ages, default=None))


def stop_host() -> None:
    """End the host and remove the private folder; workers have ended already.

    Exits with status 1 when the host could not serve its engine.
    """
    if _hosts is not None:
        _hosts.stop()
    shutil.rmtree(os.environ[RUN_DIR], ignore_errors=True)
    if _failures:
        sys.exit(1)


def announce(url: str, facts: dict[str, Any]) -> None:
    """Print where the server is, a line to paste, and what the engine can do; or log the facts."""
    say_that_it_serves(os.environ)
    if process_settings.log_format(os.environ) == "json":
        _LOG.info("ready", extra={"url": url, "engine": facts})
        return
    tokens = facts["num_kv_blocks"] * facts["kv_block_size"]
    full = tokens // facts["max_seq_len"]
    model = os.environ.get("ENGINEHOUSE_MODEL_NAME") or facts["model"]
    rows = {
        "model": model,
        "quantisation": facts["quantization"],
        "TP x PP": f"{facts['tp_size']} x {facts['pp_size']}  ({facts['backend']} backend)",
        "context": f"{facts['max_seq_len']:,} tokens",
        "KV blocks": f"{facts['num_kv_blocks']:,} of {facts['kv_block_size']} tokens",
        "KV memory": f"at most {facts['kv_cache_bytes'] / 2**20:,.1f} MiB; remembered prefixes "
        "fill it in time",
        "concurrency": f"{facts['max_batch_size']} requests, {full} of them at full context",
        "engine": f"{facts['name']}  {facts['digest'][:19]}",
    }
    lines = [f"  {key:<13} {value}" for key, value in rows.items()]
    question = '"messages": [{"role": "user", "content": "What is the capital of France?"}]'
    body = f'{{"model": "{model}", {question}, "temperature": 0, "max_tokens": 100}}'
    curl = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    print("\n".join(["", f"enginehouse is ready: {url}", *lines, "", curl, ""]), flush=True)
