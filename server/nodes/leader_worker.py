"""An engine over the pods of a LeaderWorkerSet: who they are, and how the leader reaches them.

mpirun starts its ranks by ssh. A worker's pod is an sshd of its own user that takes one key and
nothing else; the leader waits until every worker listens, then becomes mpirun. Both have the same
folder of keys: id, id.pub, and known_hosts, which is id.pub behind a `*`. Knows no engine.
Source: LeaderWorkerSet's variables and host names; Open MPI 4.1, plm_rsh_args.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from enginehouse.runtime.errors import EnginehouseError

LEADER, SIZE = "LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE"
SSH_PORT = 2222
KEY_FILES = ("id", "id.pub", "known_hosts")
_WAIT_S = 1200.0  # a worker's node may have to pull the image first
_HANDED_ON = ("PATH", "LD_LIBRARY_PATH")  # where orted and its libraries are


def group_hosts(env: Mapping[str, str]) -> list[str]:
    """The leader's host name, then those of the workers; EnginehouseError outside such a group."""
    leader, size = env.get(LEADER, ""), env.get(SIZE, "")
    first, dot, domain = leader.partition(".")
    if not dot or not size.isdecimal() or int(size) < 1:
        raise EnginehouseError(
            f"{LEADER}={leader!r} and {SIZE}={size!r}; wanted the two that a LeaderWorkerSet gives "
            "its pods: leave --ssh-keys out, and name the machines with --hostfile"
        )
    return [leader, *(f"{first}-{index}.{domain}" for index in range(1, int(size)))]


def check_keys(folder: Path) -> None:
    """EnginehouseError for a folder without one of the files."""
    for name in KEY_FILES:
        if not (folder / name).is_file():
            raise EnginehouseError(
                f"{folder / name} is not there; the folder of --ssh-keys has {', '.join(KEY_FILES)}"
            )


def ssh_settings(folder: Path) -> dict[str, str]:
    """What makes mpirun reach a worker's sshd, and be sure that it is one."""
    options = {
        "UserKnownHostsFile": folder / "known_hosts",
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
        "IdentitiesOnly": "yes",
    }
    words = ["-p", str(SSH_PORT), "-i", str(folder / "id")]
    words += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return {"OMPI_MCA_plm_rsh_args": " ".join(words)}


def sshd_command(folder: Path, env: Mapping[str, str]) -> list[str]:
    """The sshd that a worker's pod is: no root, no password, no terminal, no forwarding."""
    path = env.get("PATH", os.defpath)
    program = shutil.which("sshd", path=f"{path}{os.pathsep}/usr/sbin") or "/usr/sbin/sshd"
    handed = [f"{name}={shlex.quote(env[name])}" for name in _HANDED_ON if env.get(name)]
    options = {
        "Port": SSH_PORT,
        "HostKey": folder / "id",
        "AuthorizedKeysFile": folder / "id.pub",
        "StrictModes": "no",  # a secret's folder belongs to root, and its group may write
        "UsePAM": "no",
        "PidFile": "none",
        "AuthenticationMethods": "publickey",
        "DisableForwarding": "yes",
        "PermitTTY": "no",
        "PermitUserRC": "no",
        **({"SetEnv": " ".join(handed)} if handed else {}),
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return [program, "-D", "-e", "-f", "/dev/null", *words]


def wait_for_workers(
    hosts: Sequence[str], port: int = SSH_PORT, seconds: float = _WAIT_S, pause_s: float = 1.0
) -> None:
    """Returns when each listens; EnginehouseError names who does not in time.

    mpirun gives up at the first that does not answer, and the whole group would start anew.
    """
    deadline, missing = time.monotonic() + seconds, list(hosts)
    while missing := [host for host in missing if not _listens(host, port)]:
        if time.monotonic() > deadline:
            raise EnginehouseError(
                f"{', '.join(missing)}: nothing listens on port {port} after {seconds:g} s; see "
                "what the logs of these pods say"
            )
        time.sleep(pause_s)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True
