"""What a person decides of a deployment; the rest is the engine's own."""

from __future__ import annotations

import re
from dataclasses import dataclass

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.deploy.engine_facts import EngineFacts

_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # pods' names are longer, and hosts' are 63
_SUBDOMAIN = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)
IMAGES = {
    "tensorrt_llm": "enginehouse:1.2.1",
    "hf": "enginehouse:1.2.1",
    "cpu": "enginehouse:cpu",
    "torch": "enginehouse:cpu",
}


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """name: of every object. namespace None: whoever applies it names it. replicas: at least,
    max_replicas at most. claim: of the volume that holds the engine. keda: address of the
    Prometheus that KEDA asks; None: an autoscaler of Kubernetes' own. gateway: whose HTTPRoute
    leads to an InferencePool; empty: the pool alone; None: neither.
    """

    name: str
    image: str
    namespace: str | None = None
    replicas: int = 1
    max_replicas: int = 4
    claim: str = "engine"
    keda: str | None = None
    gateway: str | None = None


def choose_options(
    facts: EngineFacts,
    *,
    name: str | None = None,
    image: str | None = None,
    namespace: str | None = None,
    replicas: int = 1,
    max_replicas: int | None = None,
    claim: str = "engine",
    keda: str | None = None,
    gateway: str | None = None,
) -> DeployOptions:
    """As asked, else as the engine has it; EnginehouseError for what a cluster would not take."""
    name = label_of(facts.name) if name is None else name
    for flag, text in (("--name", name), ("--namespace", namespace), ("--claim", claim)):
        if text is not None and not _LABEL.fullmatch(text):
            raise EnginehouseError(
                f"{flag} {text}: wanted up to 40 small letters, digits and hyphens, with a letter "
                "first and no hyphen last"
            )
    image = image or IMAGES.get(facts.kind)
    if image is None:
        raise EnginehouseError(
            f"{facts.name} holds plans of backend {facts.kind}, and no Dockerfile here has the "
            "package that compiled them; name an image that has it with --image"
        )
    if keda is not None and not re.fullmatch(r"https?://[\w.:/-]+", keda, re.ASCII):
        raise EnginehouseError(
            f"--keda {keda}: wanted the address of Prometheus, such as http://prometheus:9090"
        )
    if gateway and not _SUBDOMAIN.fullmatch(gateway):
        raise EnginehouseError(
            f"--gateway {gateway}: wanted the name of a Gateway, in small letters, digits, hyphens "
            "and dots; leave it out for an InferencePool without an HTTPRoute"
        )
    most = 4 * replicas if max_replicas is None else max_replicas
    if most < replicas:
        raise EnginehouseError(
            f"--max-replicas {most} is below --replicas {replicas}; raise it, or leave it out for "
            "four times as many"
        )
    return DeployOptions(name, image, namespace, replicas, most, claim, keda, gateway)


def label_of(name: str) -> str:
    """An engine's name as a cluster takes one: `Qwen3_8B.fp8` becomes `qwen3-8b-fp8`."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return text if text[:1].isalpha() else f"engine-{text}"[:40].strip("-")
