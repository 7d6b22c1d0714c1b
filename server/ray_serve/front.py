"""Beside gunicorn: deploys the replicas, where that is asked, and names them to its workers.

    enginehouse serve ENGINE --ray --replicas N      deploys N, and takes them back at the end
    enginehouse serve ENGINE --ray --replicas 1-4    as many of those as the queue wants
    enginehouse serve ENGINE --ray                   those that `serve deploy` has deployed

Writes the replicas file as replicas come and go, and has gunicorn read the engine's folder again
once replicas of the engine that is there now answer. Where it deployed them and the folder is a
link, another engine behind the link is deployed in their place. Ends with the process that started
it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import ray
from ray import serve

from enginehouse.runtime.engine import read_manifest
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.host.log_lines import FORMATS, last_words, log_to_stderr
from enginehouse.server.ray_serve.application import Arguments, build
from enginehouse.server.ray_serve.directory import NAMESPACE, RayDirectory
from enginehouse.server.replicas.replicas_file import Replica, write_replicas

log = logging.getLogger("enginehouse.ray")

_LOOK_S = 0.25


class Front:
    """path: of the replicas file. engine: gunicorn's."""

    def __init__(self, path: Path, engine: Path) -> None:
        self._path, self._engine = path, engine
        self._told: set[Replica] | None = None
        self._read = _digest(engine)

    def look(self, replicas: Sequence[Replica]) -> bool:
        """Write the file anew where it has to be; whether gunicorn is to read the engine again."""
        found = set(replicas)
        if found != self._told:
            write_replicas(self._path, found)
            log.info("%d replicas answer", len(found))
            self._told = found
        there = _digest(self._engine)
        if there is None or there == self._read or there not in {each.digest for each in found}:
            return False
        log.info("replicas of another engine answer: gunicorn reads %s again", self._engine)
        self._read = there
        return True


def _digest(engine: Path) -> str | None:
    """Of what is there now; None while it cannot be read."""
    try:
        return read_manifest(engine).digest
    except EnginehouseError:
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m enginehouse.server.ray_serve.front")
    parser.add_argument("engine", type=Path)
    parser.add_argument("--file", type=Path, required=True, help="the replicas file")
    parser.add_argument("--own-folder", action="store_true", help="the file's goes at the end")
    parser.add_argument("--key-file", help="of the hosts")
    parser.add_argument("--app", default="enginehouse", help="the application in Serve")
    parser.add_argument(
        "--deploy", type=int, nargs=2, metavar="N", help="replicas, at least and at most"
    )
    parser.add_argument("--num-cpus", type=float, default=1.0, help="of each of them")
    parser.add_argument("--num-gpus", type=float, default=0.0)
    parser.add_argument("--log-format", choices=FORMATS, default="text")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="gunicorn's master")
    args, flags = parser.parse_known_args(argv)
    log_to_stderr("info", traffic=False, form=args.log_format)
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is gunicorn's, and then its end is seen
    ray.init(namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    deploy = partial(_deploy, args, flags)
    try:
        if args.deploy:
            deploy(args.engine.resolve())
        directory, front = RayDirectory(args.app), Front(args.file, args.engine)
        deployed = args.engine.resolve()
        while os.getppid() == args.parent and not ended:
            if front.look(directory.replicas()):
                os.kill(args.parent, signal.SIGHUP)
            if args.deploy and args.engine.resolve() != deployed and _digest(args.engine):
                deployed = args.engine.resolve()
                log.info("the replicas are exchanged, one after another, for those of %s", deployed)
                threading.Thread(target=deploy, args=(deployed,), daemon=True).start()
            time.sleep(_LOOK_S)
        if args.deploy:
            serve.delete(args.app)
            directory.close()
    except Exception as error:  # whatever Ray raises: gunicorn would wait for replicas for ever
        last_words("enginehouse", f"Ray Serve: {error}", args.log_format)
        if os.getppid() == args.parent:
            os.kill(args.parent, signal.SIGTERM)
        return 1
    finally:
        ray.shutdown()
        if args.own_folder:
            shutil.rmtree(args.file.parent, ignore_errors=True)
    return 0


def _deploy(args: argparse.Namespace, flags: list[str], engine: Path) -> None:
    """Returns once Serve has as many replicas of this engine as were asked for."""
    arguments = Arguments(
        engine=str(engine),
        key_file=args.key_file,
        app=args.app,
        min_replicas=args.deploy[0],
        max_replicas=args.deploy[1],
        num_cpus=args.num_cpus,
        num_gpus=args.num_gpus,
        flags=flags,
    )
    serve.run(build(arguments), name=args.app, route_prefix=None)


if __name__ == "__main__":
    sys.exit(main())
