"""`enginehouse serve --ray`: what stands beside gunicorn and knows Ray, started before it.

Imports no Ray: that is server/ray_serve/'s, in a process of its own.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.machine.cpu import default_threads
from enginehouse.server.launch.process_settings import host_flags, log_format, range_of_replicas
from enginehouse.server.launch.shares import gpus_of_one


class RayFront(NamedTuple):
    """replicas: to deploy, at least and at most; 0: they are deployed already. settings: of
    gunicorn.
    """

    replicas: tuple[int, int]
    folder: Path
    key_file: str
    settings: dict[str, str]

    @classmethod
    def of(cls, settings: Mapping[str, str], env: Mapping[str, str]) -> RayFront:
        """Raises EnginehouseError where Ray is not installed, or a cluster has no key."""
        if find_spec("ray") is None:
            raise EnginehouseError("--ray wants Ray Serve; install enginehouse[ray]")
        text = {**env, **settings}.get("ENGINEHOUSE_REPLICAS")
        replicas = range_of_replicas(text) if text else (0, 0)
        key_file = env.get("ENGINEHOUSE_HOST_KEY_FILE", "").strip()
        if not key_file and (env.get("RAY_ADDRESS") or not text):
            raise EnginehouseError(
                "replicas on a cluster of Ray's need a key that each node finds at one path; set "
                "ENGINEHOUSE_HOST_KEY_FILE to a file that `openssl rand -hex 32` wrote"
            )
        folder = Path(tempfile.gettempdir()) / f"enginehouse-ray-{os.getpid()}"
        key_file = key_file or str(folder / "host.key")
        return cls(
            replicas,
            folder,
            key_file,
            {
                "ENGINEHOUSE_REPLICAS": "1",
                "ENGINEHOUSE_REPLICAS_FILE": str(folder / "replicas.json"),
                "ENGINEHOUSE_HOST_KEY_FILE": key_file,
            },
        )

    def start(self, env: Mapping[str, str]) -> None:
        """env: gunicorn's, which this process becomes: what is started here is its child."""
        self.folder.mkdir(mode=0o700)
        if not Path(self.key_file).exists():
            Path(self.key_file).write_text(secrets.token_hex(32))
        engine = env["ENGINEHOUSE_ENGINE"]
        command = [sys.executable, "-m", "enginehouse.server.ray_serve.front", engine]
        command += ["--file", env["ENGINEHOUSE_REPLICAS_FILE"], "--key-file", self.key_file]
        command += ["--own-folder"]
        command += ["--parent", str(os.getpid()), "--log-format", log_format(env)]
        least, most = self.replicas
        if least:
            num_gpus = gpus_of_one(Path(engine), env)
            num_cpus = 1 if num_gpus else max(1, default_threads() // most)
            command += ["--deploy", str(least), str(most), "--num-gpus", str(num_gpus)]
            command += ["--num-cpus", str(num_cpus), *host_flags(env)]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, env=dict(env), start_new_session=True)
