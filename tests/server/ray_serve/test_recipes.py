"""configs/deploy/ray: what Serve is told, and the jobs of a conversion in shares."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from makers.paths import ROOT

RECIPES = ROOT / "configs" / "deploy" / "ray"


def test_serve_is_told_what_the_application_takes() -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: the extra `ray`")
    from ray.serve.schema import ServeDeploySchema

    from enginehouse.server.ray_serve import application

    [app] = yaml.safe_load((RECIPES / "serve.yaml").read_text())["applications"]
    schema = ServeDeploySchema.model_validate({"applications": [app]})
    assert schema.applications[0].route_prefix is None
    module, _, name = app["import_path"].partition(":")
    assert (module, getattr(application, name)) == (application.__name__, application.build)
    deployment = application.build(app["args"])._bound_deployment  # as Serve calls it
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
    assert deployment.ray_actor_options["num_gpus"] == 1


def test_a_job_for_each_share_and_one_that_joins_them(tmp_path: Path) -> None:
    """A `ray` that notes each job and fails the third."""
    stub = tmp_path / "ray"
    log = tmp_path / "log"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *3/3*) exit $FAILS;; esac\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "/m odel", "OUTPUT": "/o"}
    env |= {"SHARES": "3", "BUILD": "--quant int4 --tp 2"}
    script = RECIPES / "build-shares.sh"
    submitted = "job submit --entrypoint-num-cpus 4 -- enginehouse build /m odel -o /o "
    shares = {f"{submitted}--quant int4 --tp 2 --shard {part}/3" for part in (1, 2, 3)}
    for fails, joined in (("1", []), ("0", [f"{submitted}--quant int4 --tp 2 --join"])):
        log.unlink(missing_ok=True)
        done = subprocess.run([script], env={**env, "FAILS": fails}, timeout=30)
        assert (done.returncode == 0) == (fails == "0")
        lines = log.read_text().splitlines()
        assert set(lines[:3]) == shares and lines[3:] == joined
