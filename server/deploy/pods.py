"""The pods of an engine: the base's, with the GPUs, memory and nodes that this engine needs.

An engine that fits a node is a Deployment of them; one over several nodes has groups (`group.py`).
"""

from __future__ import annotations

import copy
from math import ceil
from typing import Any

from enginehouse.server.deploy.engine_facts import GIB, EngineFacts
from enginehouse.server.deploy.options import DeployOptions

Document = dict[str, Any]
APP = "app.kubernetes.io/name"
INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"
DIGEST = "enginehouse/engine-digest"  # another engine under the same name is rolled out
SERVER = "server"
_GPU = "nvidia.com/gpu"


def labels_of(options: DeployOptions, component: str | None = SERVER) -> dict[str, str]:
    """Of the pods that answer; of all pods where component is None."""
    labels = {APP: "enginehouse", INSTANCE: options.name}
    return labels if component is None else labels | {COMPONENT: component}


def deployment(base: Document, facts: EngineFacts, options: DeployOptions) -> Document:
    """The base's, for this engine.

    It names no number of replicas: the autoscaler does, and applying the folder again would undo
    what that has chosen.
    """
    made = copy.deepcopy(base)
    made["metadata"] = {"name": options.name, "labels": labels_of(options, None)}
    made["spec"].pop("replicas", None)
    made["spec"]["selector"]["matchLabels"] = labels_of(options)
    made["spec"]["template"] = serving_pod(base["spec"]["template"], facts, options)
    return made


def serving_pod(base: Document, facts: EngineFacts, options: DeployOptions) -> Document:
    """The template of a pod that serves."""
    pod = copy.deepcopy(base)
    pod["metadata"]["labels"] = labels_of(options)
    pod["metadata"]["annotations"][DIGEST] = facts.digest
    spec = pod["spec"]
    [container] = spec["containers"]
    container["image"] = options.image
    container["envFrom"] = [{"configMapRef": {"name": options.name}}]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    volumes["engine"]["persistentVolumeClaim"]["claimName"] = options.claim
    shm_gib = 8 if facts.gpus_per_node > 1 else 1  # the collectives of several GPUs
    volumes["shm"]["emptyDir"]["sizeLimit"] = f"{shm_gib}Gi"
    container["resources"] = _resources(facts, shm_gib)
    spec.update(_placement(facts))
    return pod


def _resources(facts: EngineFacts, shm_gib: int) -> Document:
    """For one pod. What lies in /dev/shm counts as its memory."""
    least, most = (ceil(n / GIB) + shm_gib for n in (facts.memory_bytes, facts.peak_bytes))
    cpus = 4 + 2 * max(0, facts.gpus_per_node - 1)
    limits = {"memory": f"{most}Gi"}
    if facts.num_gpus:
        limits[_GPU] = str(facts.gpus_per_node)
    return {"requests": {"cpu": str(cpus), "memory": f"{least}Gi"}, "limits": limits}


def _placement(facts: EngineFacts) -> Document:
    """Nodes by the labels that NVIDIA's GPU feature discovery gives them: the SM, and enough memory
    on each GPU. One SM is a selector; of several, each is a term of its own.
    """
    by_sm = [
        {
            f"{_GPU}.compute.major": str(sm // 10),
            f"{_GPU}.compute.minor": str(sm % 10),
        }
        for sm in facts.sms
    ]
    memory = []
    if facts.num_gpus and facts.gpu_bytes:
        mib = facts.gpu_bytes // 2**20
        memory = [{"key": f"{_GPU}.memory", "operator": "Gt", "values": [str(mib)]}]
    placement: Document = {"nodeSelector": by_sm[0]} if len(by_sm) == 1 else {}
    terms = [
        [{"key": key, "operator": "In", "values": [value]} for key, value in labels.items()]
        for labels in by_sm
        if len(by_sm) > 1
    ] or [[]]
    if any(terms) or memory:
        expressions = [{"matchExpressions": term + memory} for term in terms]
        required = {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": expressions}
        }
        placement["affinity"] = {"nodeAffinity": required}
    return placement
