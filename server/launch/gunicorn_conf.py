"""gunicorn's configuration: `gunicorn -c python:enginehouse.server.launch.gunicorn_conf APP`.

A module, so that an installed wheel has it too; `configs/gunicorn.conf.py` hands on its names.
Environment: ENGINEHOUSE_ENGINE (engine directory, required), ENGINEHOUSE_BIND,
ENGINEHOUSE_WORKERS; the rest is listed in docs/serving.md. Importing it gives this process its
private folder, before gunicorn loads anything that looks for it. What the hooks do is
gunicorn_hooks.py's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from enginehouse.server.launch import access_log, gunicorn_hooks, held_signals

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.http.message import Request
    from gunicorn.http.wsgi import Response

bind = os.environ.get("ENGINEHOUSE_BIND") or "127.0.0.1:8000"
workers = gunicorn_hooks.num_workers()
worker_class = "enginehouse.server.launch.worker.Worker"  # gevent, and it drains
worker_connections = 2000
timeout = 120
graceful_timeout = 600  # SIGTERM: as long as the longest stream may take
keepalive = 75  # seconds between two requests, and that the head of one may take
limit_request_line = 4094  # bytes
limit_request_fields = 100
limit_request_field_size = 8190  # bytes of a name and its value
preload_app = False  # sockets and greenlets belong to a worker
control_socket_disable = True  # else gunicorn 27 opens one under the home folder
proc_name = "enginehouse"
loglevel = gunicorn_hooks.log_level()
logger_class = "enginehouse.server.launch.gunicorn_log.Logger"  # its lines are ours

gunicorn_hooks.prepare_environment()


def on_starting(server: Arbiter) -> None:
    """Nothing is open or forked yet: is there an engine at all?"""
    gunicorn_hooks.check_engine()
    gunicorn_hooks.start_log()


def when_ready(server: Arbiter) -> None:
    """The listening socket is open: start the engine host."""
    host, _, port = server.cfg.bind[0].rpartition(":")
    reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}.get(host, host)
    gunicorn_hooks.start_host(
        f"http://{reachable}:{port}", lambda s: server.cfg.set("graceful_timeout", s)
    )
    reload = server.handle_hup

    def handle_hup() -> None:
        """A reload ends the old workers, and all of gunicorn if the new ones cannot start."""
        if gunicorn_hooks.may_reload(server.worker_age):
            reload()

    server.handle_hup = handle_hup  # type: ignore[method-assign]


def pre_fork(server: Arbiter, worker: Any) -> None:
    held_signals.hold()


def post_fork(server: Arbiter, worker: Any) -> None:
    gunicorn_hooks.begin_worker()


def pre_request(worker: Any, req: Request) -> None:
    access_log.begin(req)


def post_request(worker: Any, req: Request, environ: dict[str, Any], resp: Response | None) -> None:
    access_log.end(req, environ, resp)


def child_exit(server: Arbiter, worker: Any) -> None:
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
    gunicorn_hooks.worker_ended([each.age for each in server.WORKERS.values()])


def on_exit(server: Arbiter) -> None:
    """Every worker has ended: end the engine host too."""
    gunicorn_hooks.stop_host()
