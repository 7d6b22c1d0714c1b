"""The Serve application, which Serve's own config files may name:

applications:
- name: enginehouse
  route_prefix: null
  import_path: enginehouse.server.ray_serve.application:build
  args: {engine: /engines/mine, key_file: /keys/host.key, min_replicas: 2}
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from enginehouse.server.ray_serve.directory import RayDirectory
from enginehouse.server.ray_serve.replica import EngineReplica

POLICY = "enginehouse.server.ray_serve.directory:by_queue_depth"


class Arguments(BaseModel):
    """num_cpus, num_gpus: of each replica, as Ray counts them. target: sequences that run or wait
    at a replica, as scaling aims at; autoscaling: what else Serve's AutoscalingConfig takes, such
    as downscale_delay_s. The others as EngineReplica has them.
    """

    model_config = ConfigDict(extra="forbid")

    engine: str
    key_file: str
    app: str = "enginehouse"
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target: float = Field(default=16.0, gt=0)
    autoscaling: dict[str, Any] = {}
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    host: str | None = None
    flags: list[str] = []
    max_drain_s: float = Field(default=600.0, gt=0)


def build(arguments: Arguments | dict[str, Any]) -> Any:
    """The application, for serve.run or `serve deploy`, which hands over what its file says."""
    given = Arguments.model_validate(arguments)
    flags = list(given.flags)
    if not given.num_gpus and "--num-threads" not in flags and given.num_cpus >= 1:
        flags += ["--num-threads", str(int(given.num_cpus))]
    scaling: dict[str, Any] = {"num_replicas": given.min_replicas}
    if given.max_replicas > given.min_replicas:
        config = AutoscalingConfig(
            min_replicas=given.min_replicas,
            max_replicas=given.max_replicas,
            target_ongoing_requests=given.target,
            policy=AutoscalingPolicy(policy_function=POLICY),
            **given.autoscaling,
        )
        scaling = {"autoscaling_config": config}
    deployment = serve.deployment(
        EngineReplica,
        name="engine",
        ray_actor_options={"num_cpus": given.num_cpus, "num_gpus": given.num_gpus},
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=given.max_drain_s + 30.0,
        **scaling,
    )
    directory = partial(RayDirectory, given.app)
    return deployment.bind(
        given.engine, given.key_file, directory, given.host, flags, given.max_drain_s
    )
