"""An engine over several nodes as a LeaderWorkerSet: each replica is a group of pods.

The leader runs the server. TensorRT-LLM's ranks are started from there, by mpirun over ssh, so that
each other pod is an sshd; those of TensorRT plans are started by their own pods, and come to it.
Either way all pods of a group have one secret, and whichever restarts, its whole group starts anew.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

from enginehouse.server.deploy.engine_facts import EngineFacts
from enginehouse.server.deploy.options import DeployOptions
from enginehouse.server.deploy.pods import DIGEST, Document, labels_of, serving_pod
from enginehouse.server.nodes.leader_worker import SSH_PORT
from enginehouse.server.nodes.tensorrt_ranks import RANKS_PORT

_WORKER = "worker"
_READY_FILE = "/tmp/ranks-run"  # noqa: S108  the container's own


class Secret(NamedTuple):
    """What a group's pods prove to each other.

    volume: its name, and behind a slash where it is mounted. flags: of enginehouse-launch. wanted:
    in words, what whoever applies the folder has to make.
    """

    name: str
    volume: str
    flags: list[str]
    wanted: str


def group_secret(facts: EngineFacts, options: DeployOptions) -> Secret:
    """TensorRT-LLM's is for ssh; that of TensorRT plans is one line."""
    if facts.kind == "tensorrt":
        name = f"{options.name}-ranks"
        wanted = f"a secret {name} with the file key (openssl rand -hex 32)"
        return Secret(name, "ranks", ["--ranks-key", "/ranks/key"], wanted)
    name = f"{options.name}-ssh"
    wanted = f"a secret {name} with id, id.pub and known_hosts"
    return Secret(name, "ssh", ["--ssh-keys", "/ssh"], wanted)


def leader_worker_set(base: Document, facts: EngineFacts, options: DeployOptions) -> Document:
    """Like the base's Deployment, it names no number of replicas."""
    secret = group_secret(facts, options)
    leader = serving_pod(base["spec"]["template"], facts, options)
    _mount(leader["spec"], secret)
    worker = copy.deepcopy(leader)
    [server] = leader["spec"]["containers"]
    server["args"] = ["/engine", "--nodes", str(facts.num_nodes), *secret.flags]
    worker["metadata"]["labels"] = labels_of(options, _WORKER)
    worker["metadata"]["annotations"] = {DIGEST: facts.digest}  # nothing to scrape
    [container] = worker["spec"]["containers"]
    for field in ("startupProbe", "livenessProbe", "lifecycle", "ports"):
        del container[field]
    container |= {"name": _WORKER, "args": ["/engine", "--worker", *secret.flags]}
    if facts.kind == "tensorrt":
        server["ports"].append({"name": "ranks", "containerPort": RANKS_PORT})
        container["args"] += ["--ready-file", _READY_FILE]
        ready: Document = {"exec": {"command": ["test", "-e", _READY_FILE]}}
    else:
        container["ports"] = [{"name": "ssh", "containerPort": SSH_PORT}]
        ready = {"tcpSocket": {"port": "ssh"}}
    container["readinessProbe"] = {**ready, "periodSeconds": 5}
    _without_volume(worker["spec"], "keys")  # of the API: a worker answers nobody
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": options.name, "labels": labels_of(options, None)},
        "spec": {
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxUnavailable": 0, "maxSurge": 1},
            },
            "leaderWorkerTemplate": {
                "size": facts.num_nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": worker,
            },
        },
    }


def _mount(spec: Document, secret: Secret) -> None:
    source = {"secretName": secret.name, "defaultMode": 0o440}
    spec["volumes"].append({"name": secret.volume, "secret": source})
    mount = {"name": secret.volume, "mountPath": f"/{secret.volume}", "readOnly": True}
    spec["containers"][0]["volumeMounts"].append(mount)


def _without_volume(spec: Document, name: str) -> None:
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] != name]
    for container in spec["containers"]:
        mounts = [mount for mount in container["volumeMounts"] if mount["name"] != name]
        container["volumeMounts"] = mounts
