"""An engine's facts and a person's options -> a kustomize folder, whole or not at all.

The base beside this file is where everything that every engine has stands; here it is only read.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import yaml

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.deploy import scaling
from enginehouse.server.deploy.engine_facts import EngineFacts
from enginehouse.server.deploy.group import group_secret, leader_worker_set
from enginehouse.server.deploy.options import DeployOptions
from enginehouse.server.deploy.pods import Document, deployment

_KUSTOMIZATION = "kustomization.yaml"
_REFERENCES = "references.yaml"
_GROUP = "spec/leaderWorkerTemplate"
_PICKER_CHART = "oci://registry.k8s.io/gateway-api-inference-extension/charts/inferencepool"
# What each file is, for whoever opens it.
_HEADS = {
    _KUSTOMIZATION: "kubectl apply -k .",
    _REFERENCES: "Where a LeaderWorkerSet names the ConfigMap: kustomize does not know it.",
    "deployment.yaml": "A server with its engine in each pod.",
    "leaderworkerset.yaml": "A server and the nodes of its engine in each group of pods.",
    "service.yaml": "The pods that are ready.",
    "disruption.yaml": "One pod at a time may be moved to another node.",
    "autoscaler.yaml": "By a pod's waiting requests, which prometheus-adapter has to tell. An\n"
    "# engine takes minutes to load: it is not given back at once.",
    "scaledobject.yaml": "By the waiting requests of all pods, for which KEDA asks Prometheus.",
    "inferencepool.yaml": "What a Gateway's endpoint picker chooses among, by queue and KV cache.",
    "httproute.yaml": "From the Gateway to that pool. No time limit: answers are streams.",
}


class Rendered(NamedTuple):
    """texts: of each file, by its name. wanted: what has to be there before, in words."""

    texts: dict[str, str]
    wanted: list[str]


def render(facts: EngineFacts, options: DeployOptions) -> Rendered:
    """The folder's files, and what they lean on."""
    base = {name: _base(name) for name in ("deployment", "service", "disruption", "autoscaler")}
    is_group = facts.num_nodes > 1
    pods = (leader_worker_set if is_group else deployment)(base["deployment"], facts, options)
    [container] = base["deployment"]["spec"]["template"]["spec"]["containers"]
    [port] = (each["containerPort"] for each in container["ports"])
    documents = {
        "leaderworkerset.yaml" if is_group else "deployment.yaml": pods,
        "service.yaml": scaling.service(base["service"], options),
        "disruption.yaml": scaling.disruption_budget(base["disruption"], options),
    }
    if options.keda is None:
        scaler = scaling.autoscaler(base["autoscaler"], pods, options)
        documents["autoscaler.yaml"] = scaler
    else:
        scaler = scaling.scaled_object(base["autoscaler"], pods, options)
        documents["scaledobject.yaml"] = scaler
    if options.gateway is not None:
        documents["inferencepool.yaml"] = scaling.inference_pool(port, options)
    if options.gateway:
        documents["httproute.yaml"] = scaling.http_route(options)
    kustomization = _kustomization(list(documents), facts, options)
    if is_group:
        kustomization["configurations"] = [_REFERENCES]
    documents[_KUSTOMIZATION] = kustomization
    if is_group:
        documents[_REFERENCES] = _references()
    texts = {name: f"# {_HEADS[name]}\n{_text(each)}" for name, each in documents.items()}
    return Rendered(texts, _wanted(facts, options))


def write_folder(texts: dict[str, str], directory: Path) -> None:
    """Each file under a temporary name first, so that none is ever half there.

    Raises EnginehouseError for a folder that holds anything which this does not write.
    """
    directory.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in directory.iterdir() if path.name not in _HEADS)
    if others:
        raise EnginehouseError(
            f"{directory} holds {others[0]}, which this does not write; give a folder of its own "
            "(your changes go into an overlay beside it)"
        )
    for name in _HEADS.keys() - texts.keys():  # of an earlier time, with other options
        (directory / name).unlink(missing_ok=True)
    for name, text in texts.items():
        unfinished = directory / f".{name}.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, directory / name)


def _kustomization(names: list[str], facts: EngineFacts, options: DeployOptions) -> Document:
    base = _base("kustomization")
    [generated] = base["configMapGenerator"]
    literals = [*generated["literals"]]
    if facts.kind == "hf":
        literals.append(f"ENGINEHOUSE_TP_SIZE={facts.num_gpus}")
    if facts.kv_cache_gib is not None:
        literals.append(f"ENGINEHOUSE_KV_CACHE_GIB={facts.kv_cache_gib:g}")
    return {
        "apiVersion": base["apiVersion"],
        "kind": base["kind"],
        **({"namespace": options.namespace} if options.namespace else {}),
        "resources": names,
        "configMapGenerator": [{"name": options.name, "literals": literals}],
    }


def _references() -> Document:
    paths = [
        f"{_GROUP}/{template}/spec/containers/envFrom/configMapRef/name"
        for template in ("leaderTemplate", "workerTemplate")
    ]
    fields = [{"path": path, "kind": "LeaderWorkerSet"} for path in paths]
    return {"nameReference": [{"kind": "ConfigMap", "version": "v1", "fieldSpecs": fields}]}


def _wanted(facts: EngineFacts, options: DeployOptions) -> list[str]:
    wanted = [
        f"the image {options.image} where nodes can pull it",
        f"a claim {options.claim} that holds the engine, and that pods on several nodes may read",
        "a secret enginehouse-keys with the file keys",
    ]
    if facts.num_nodes > 1:
        wanted += [
            group_secret(facts, options).wanted,
            "LeaderWorkerSet's controller",
        ]
    if options.keda is None:
        wanted.append("prometheus-adapter, which tells enginehouse_num_requests_waiting of pods")
    else:
        wanted.append(f"KEDA, and Prometheus at {options.keda}")
    if options.gateway is not None:
        wanted.append(
            f"the endpoint picker as the service {options.name}-epp: helm's release {options.name} "
            f"of {_PICKER_CHART}, installed first"
        )
    if options.gateway:
        wanted.append(f"a Gateway {options.gateway} that takes routes and InferencePools")
    if facts.sms or facts.gpu_bytes:
        wanted.append("NVIDIA's GPU feature discovery, whose labels choose the nodes")
    return wanted


def _base(name: str) -> Document:
    text = (files("enginehouse.server.deploy") / "base" / f"{name}.yaml").read_text(
        encoding="utf-8"
    )
    document: Document = yaml.safe_load(text)
    return document


def _text(document: Document) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=98)


class _Dumper(yaml.SafeDumper):
    """Says everything where it stands: no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True
