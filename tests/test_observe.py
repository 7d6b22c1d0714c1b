"""What configs/observe/ asks of Prometheus is what a server tells, and docs/operations.md has each
alert.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import yaml
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.request import FinishReason, TokenOutput
from makers.api_client import ask
from makers.paths import ROOT

pytest_plugins = ["makers.api_fixtures"]
OBSERVE = ROOT / "configs" / "observe"
RULES = yaml.safe_load((OBSERVE / "alerts.yml").read_text())["groups"][0]["rules"]
BOARD = json.loads((OBSERVE / "grafana.json").read_text())


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    yield from (target["expr"] for panel in BOARD["panels"] for target in panel["targets"])
    yield BOARD["templating"]["list"][1]["query"]


def test_every_name_is_told_by_a_server(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.script = [(0, TokenOutput(1, [5], FinishReason.LENGTH, queued_s=0.1))]
    ask(http)
    ask(http, temperature=9)
    told = {
        sample.name
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    } | {"enginehouse_schema_verdicts_total"}
    for expression in expressions():
        names = re.findall(r"enginehouse_\w+", expression)
        assert names and set(names) <= told, expression


def test_the_labels_that_are_asked_for_are_there() -> None:
    known = {"status", "code", "finish_reason", "verdict", "instance", "le", "reason", "phase"}
    for expression in expressions():
        asked = re.findall(r"by \(([^)]*)\)", expression)
        asked += re.findall(r"[{,]\s*(\w+)\s*=~?", expression)
        assert {name.strip() for each in asked for name in each.split(",")} <= known, expression


def test_each_alert_has_its_paragraph() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    for rule in RULES:
        assert f"**{rule['alert']}**" in text, rule["alert"]
        assert rule["for"] and rule["labels"]["severity"] in ("page", "warn")
    assert text.count("**Enginehouse") == len(RULES), "an alert that no rule has"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_files() -> None:
    for command in (["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"]):
        done = subprocess.run(["promtool", *command], cwd=OBSERVE, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
