"""A Ray actor that knows which replicas answer, and the policy by which Serve scales them.

Replicas tell it that they are there, again and again; one that was lost says nothing more and is
left out soon. Fronts ask it.
"""

from __future__ import annotations

import math
import time
from typing import Any

import ray

from enginehouse.server.replicas.replicas_file import Replica

NAMESPACE = "enginehouse"
LEASE_S = 15.0  # several of Serve's looks at a replica's health


class Leases:
    """Each replica and until when it counts as there. lease_s: after it was told last."""

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._found: dict[str, tuple[Replica, float]] = {}

    def put(self, replica: Replica) -> None:
        self._found[replica.name] = (replica, time.monotonic() + self._lease_s)

    def remove(self, name: str) -> None:
        self._found.pop(name, None)

    def replicas(self) -> list[Replica]:
        now_s = time.monotonic()
        self._found = {name: each for name, each in self._found.items() if each[1] > now_s}
        return [replica for replica, _ in self._found.values()]


class RayDirectory:
    """The one of an application, made where there is none. Ray must have been initialised."""

    def __init__(self, app: str) -> None:
        kept: dict[str, Any] = {"namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
        self._actor = (
            ray.remote(Leases)
            .options(name=f"replicas-of-{app}", get_if_exists=True, max_restarts=-1, **kept)
            .remote()
        )

    def put(self, replica: Replica) -> None:
        ray.get(self._actor.put.remote(replica))

    def remove(self, name: str) -> None:
        ray.get(self._actor.remove.remote(name))

    def replicas(self) -> list[Replica]:
        found: list[Replica] = ray.get(self._actor.replicas.remote())
        return found

    def close(self) -> None:
        """For every front and replica of the application."""
        ray.kill(self._actor)


def by_queue_depth(context: Any) -> tuple[int, dict[str, Any]]:
    """As many replicas as hold what runs and waits at all hosts, target_ongoing_requests at each.

    context: Serve's AutoscalingContext.
    """
    metrics = context.aggregated_metrics or {}
    names = ("num_running", "num_waiting")
    total = sum(sum((metrics.get(name) or {}).values()) for name in names)
    wanted = math.ceil(total / context.config.target_ongoing_requests)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, wanted)), {}
