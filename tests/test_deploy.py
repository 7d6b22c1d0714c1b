"""configs/deploy/ and the base of Kubernetes' manifests: what they name is there, and their times
fit the server's.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from flask.testing import FlaskClient

from enginehouse.server.deploy.options import IMAGES
from makers.paths import ROOT

pytest_plugins = ["makers.api_fixtures"]
DEPLOY = ROOT / "configs" / "deploy"
BASE = ROOT / "server" / "deploy" / "base"
UNIT = (DEPLOY / "systemd" / "enginehouse@.service").read_text()
KINDS: dict[str, dict[str, Any]] = {
    document["kind"]: document
    for document in (yaml.safe_load(path.read_text()) for path in BASE.glob("*.yaml"))
}
POD = KINDS["Deployment"]["spec"]["template"]
[SERVER] = POD["spec"]["containers"]


def test_slurm_s_array_makes_shares_and_the_job_behind_it_joins_them(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    script = DEPLOY / "slurm" / "build-shares.sh"
    output = tmp_path / "e"
    known = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "MODEL": str(tiny_checkpoint),
        "OUTPUT": str(output),
        "BUILD": "--quant int4 --backend torch --until compile --quiet",
    }
    for task in ("1", "2"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        subprocess.run([script], env={**known, **array}, check=True, timeout=120)
    assert not output.exists()
    subprocess.run([script], env=known, check=True, timeout=120)
    assert (output / "manifest.json").is_file()


def test_the_images_are_those_that_the_recipes_make() -> None:
    assert set(IMAGES.values()) == {SERVER["image"], IMAGES["cpu"]}
    for tag, file in ((SERVER["image"], "Dockerfile"), (IMAGES["cpu"], "Dockerfile.cpu")):
        assert (
            f"docker build {'-f Dockerfile.cpu ' if 'cpu' in file else ''}-t {tag} ."
            in (ROOT / file).read_text()
        )


def test_probes_and_scrapers_ask_for_what_is_answered_without_a_key(http: FlaskClient) -> None:
    port = SERVER["ports"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = SERVER[probe]["httpGet"]
        assert asked["port"] == port["name"] and http.get(asked["path"]).status_code == 200
    assert SERVER["livenessProbe"]["httpGet"]["path"] == "/health/live", "no restart while it loads"
    notes = POD["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(port["containerPort"])
    assert http.get(notes["prometheus.io/path"]).status_code == 200
    metric = KINDS["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f"\n{metric} " in http.get("/metrics").text


def test_labels_lead_to_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert KINDS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert KINDS["Service"]["spec"]["selector"] == labels
    assert KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (
        "Deployment",
        KINDS["Deployment"]["metadata"]["name"],
    )


def test_whoever_stops_it_waits_until_answers_have_ended() -> None:
    text = (ROOT / "server" / "launch" / "gunicorn_conf.py").read_text()
    waits = int(re.search(r"^graceful_timeout = (\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
    stop = int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1])  # type: ignore[index]
    before = int(SERVER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert stop > waits and POD["spec"]["terminationGracePeriodSeconds"] > waits + before
    assert "KillMode=mixed" in UNIT and "ExecReload=/bin/kill -HUP $MAINPID" in UNIT


def test_every_variable_is_one_that_serving_knows() -> None:
    known = (ROOT / "docs" / "serving.md").read_text()
    [generated] = KINDS["Kustomization"]["configMapGenerator"]
    names = [literal.partition("=")[0] for literal in generated["literals"]]
    names += re.findall(r"ENGINEHOUSE_\w+", UNIT)
    for name in names:
        assert f"`{name}`" in known or name == "ENGINEHOUSE_API_KEYS_FILE", name
    mounted = {mount["mountPath"] for mount in SERVER["volumeMounts"]}
    keys = dict(literal.split("=") for literal in generated["literals"])[
        "ENGINEHOUSE_API_KEYS_FILE"
    ]
    assert {str(Path(keys).parent), "/engine"} <= mounted


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"Kustomization"}))
def test_kubernetes_takes_it(kind: str) -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate (108 MB) checks it offline"
    )
    validate.validate(KINDS[kind], validate.latest_version(), strict=True)
