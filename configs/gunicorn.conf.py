"""gunicorn -c configs/gunicorn.conf.py 'enginehouse.server.app:create_app()'

Environment: ENGINEHOUSE_ENGINE (engine directory, required), ENGINEHOUSE_BIND,
ENGINEHOUSE_WORKERS; the rest is listed in README.md.
"""

import os

from enginehouse.server.launch import gunicorn_hooks

bind = os.environ.get("ENGINEHOUSE_BIND", "127.0.0.1:8000")
workers = gunicorn_hooks.num_workers()
worker_class = "enginehouse.server.launch.worker.Worker"  # gevent, and it drains
worker_connections = 2000
timeout = 120
graceful_timeout = 600  # SIGTERM: as long as the longest stream may take
keepalive = 75
preload_app = False  # sockets and greenlets belong to a worker
control_socket_disable = True  # else gunicorn 27 opens one under the home folder
proc_name = "enginehouse"

gunicorn_hooks.prepare_environment()


def on_starting(server):
    """Nothing is open or forked yet: is there an engine at all?"""
    gunicorn_hooks.check_engine()


def when_ready(server):
    """The listening socket is open: start the engine host."""
    host, _, port = bind.rpartition(":")
    reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}.get(host, host)
    gunicorn_hooks.start_host(
        f"http://{reachable}:{port}", lambda s: server.cfg.set("graceful_timeout", s)
    )


def child_exit(server, worker):
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)


def on_exit(server):
    """Every worker has ended: end the engine host too."""
    gunicorn_hooks.stop_host()
