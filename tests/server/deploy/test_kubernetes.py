"""`enginehouse deploy kubernetes`: what it writes of an engine, against schemas and the product."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from flask.testing import FlaskClient

from enginehouse.server.deploy.options import label_of
from enginehouse.server.http.metric_names import NAMES
from enginehouse.server.launch import launcher
from enginehouse.verbs.main import main
from makers.kustomize import Document, render_folder
from makers.paper_engines import GIB, HEAD_SIZE, KV_HEADS, LAYERS, paper_engine
from makers.paths import DATA, ROOT

pytest_plugins = ["makers.api_fixtures"]
PICKER = "vllm:num_requests_waiting vllm:num_requests_running vllm:kv_cache_usage_perc"
ENGINES: dict[str, dict[str, Any]] = {
    "one-gpu": {"sm": "90", "rank_bytes": 5 * GIB, "needs": (5 * GIB, GIB, 2 * GIB)},
    "tp2": {"sm": "120", "tp": 2, "rank_bytes": 3 * GIB},
    "two-nodes": {"sm": "100", "tp": 8, "pp": 2, "rank_bytes": 2 * GIB},
    "native": {"backend": "tensorrt", "targets": [86, 89], "rank_bytes": GIB},
    "native-nodes": {"backend": "tensorrt", "targets": [90], "tp": 16, "rank_bytes": GIB},
    "cpu": {"backend": "cpu", "rank_bytes": 2 * GIB},
    "unknown-sm": {},
    "checkpoint": {"backend": "tensorrt_llm", "format": "hf"},
}
GROUPS = {"two-nodes", "native-nodes"}
WORDS = {
    "native": ["--image", "mine:1"],
    "native-nodes": ["--image", "mine:1", "--gateway"],
    "tp2": ["--keda", "http://prometheus:9090", "--namespace", "models", "--gateway", "front.door"],
    "two-nodes": ["--keda", "http://prometheus:9090", "--gateway", "--replicas", "2"],
    "checkpoint": ["--tp-size", "4", "--name", "mine"],
}


def deploy(engine: Path, output: Path, *words: str) -> list[Document]:
    assert main(["deploy", "kubernetes", str(engine), "-o", str(output), *words]) == 0
    return render_folder(output)


def deployed(name: str, folder: Path, *words: str) -> dict[str, Document]:
    """By kind."""
    engine = paper_engine(folder / name, **ENGINES[name])
    documents = deploy(engine, folder / "k8s", *WORDS.get(name, []), *words)
    kinds = {document["kind"]: document for document in documents}
    assert len(kinds) == len(documents)
    return kinds


def templates_of(kinds: dict[str, Document]) -> list[Document]:
    """Of pods, the one that serves first."""
    if "Deployment" in kinds:
        return [kinds["Deployment"]["spec"]["template"]]
    group = kinds["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]]


def containers_of(kinds: dict[str, Document]) -> list[Document]:
    return [each for template in templates_of(kinds) for each in template["spec"]["containers"]]


@pytest.mark.parametrize("name", ENGINES)
def test_each_document_is_one_that_its_schema_takes(name: str, tmp_path: Path) -> None:
    kinds = deployed(name, tmp_path)
    assert ("LeaderWorkerSet" in kinds) == (name in GROUPS)
    known = {path.stem: json.loads(path.read_text()) for path in (DATA / "crds").iterdir()}
    ours = {kind: document for kind, document in kinds.items() if kind.lower() in known}
    for kind, document in ours.items():
        jsonschema.validate(document, known[kind.lower()])
    assert len(ours) == {"two-nodes": 3, "native-nodes": 2, "tp2": 3}.get(name, 0)


@pytest.mark.parametrize("name", ENGINES)
def test_kubernetes_takes_it(name: str, tmp_path: Path) -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate (108 MB) checks it offline"
    )
    kinds = deployed(name, tmp_path)
    for document in kinds.values():
        if (
            "." not in document["apiVersion"].partition("/")[0]
            or "k8s.io" in document["apiVersion"]
        ):
            if document["kind"] not in ("LeaderWorkerSet", "InferencePool", "HTTPRoute"):
                validate.validate(document, validate.latest_version(), strict=True)
    for template in templates_of(kinds):  # those of a group too
        labels = template["metadata"]["labels"]
        spec = {"selector": {"matchLabels": labels}, "template": template}
        pods = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}}
        validate.validate({**pods, "spec": spec}, validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ENGINES)
def test_what_names_another_object_names_one_that_is_there(name: str, tmp_path: Path) -> None:
    kinds = deployed(name, tmp_path)
    [serving, *workers] = templates_of(kinds)
    labels, all_labels = serving["metadata"]["labels"], kinds["PodDisruptionBudget"]["spec"]
    assert kinds["Service"]["spec"]["selector"] == labels
    assert all_labels["selector"]["matchLabels"].items() <= labels.items()
    for worker in workers:
        assert all_labels["selector"]["matchLabels"].items() <= worker["metadata"]["labels"].items()
        assert not labels.items() <= worker["metadata"]["labels"].items(), "a worker answers nobody"
    if "Deployment" in kinds:
        assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    if "InferencePool" in kinds:
        pool = kinds["InferencePool"]["spec"]
        assert pool["selector"]["matchLabels"] == labels
        ports = serving["spec"]["containers"][0]["ports"]
        [port] = (each["containerPort"] for each in ports if each["name"] == "http")
        assert pool["targetPorts"] == [{"number": port}]
    assert ("HTTPRoute" in kinds) == (name == "tp2")
    if "HTTPRoute" in kinds:
        route = kinds["HTTPRoute"]["spec"]
        assert [parent["name"] for parent in route["parentRefs"]] == ["front.door"]
        [[backend]] = (rule["backendRefs"] for rule in route["rules"])
        reached = kinds["InferencePool"]
        assert f"{backend['group']}/v1" == reached["apiVersion"]
        assert (backend["kind"], backend["name"]) == (reached["kind"], reached["metadata"]["name"])
    [scaler] = (
        kinds[kind] for kind in ("HorizontalPodAutoscaler", "ScaledObject") if kind in kinds
    )
    [target] = (kinds[kind] for kind in ("Deployment", "LeaderWorkerSet") if kind in kinds)
    reference = scaler["spec"]["scaleTargetRef"]
    assert (reference["apiVersion"], reference["kind"], reference["name"]) == (
        *(target["apiVersion"], target["kind"], target["metadata"]["name"]),
    )
    assert "replicas" not in target["spec"], "the autoscaler's, which applying it again would undo"
    for template in templates_of(kinds):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            [source] = container["envFrom"]
            assert source["configMapRef"]["name"] == kinds["ConfigMap"]["metadata"]["name"]
    namespaces = {document["metadata"].get("namespace") for document in kinds.values()}
    assert namespaces == {"models" if name == "tp2" else None}


def test_gpus_nodes_and_memory_are_the_manifests(tmp_path: Path) -> None:
    wanted = {"one-gpu": (1, ("9", "0")), "tp2": (2, ("12", "0")), "two-nodes": (8, ("10", "0"))}
    wanted["native-nodes"] = (8, ("9", "0"))
    for name, (num_gpus, (major, minor)) in wanted.items():
        kinds = deployed(name, tmp_path / name)
        for template in templates_of(kinds):
            [container] = template["spec"]["containers"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == str(num_gpus)
            assert template["spec"]["nodeSelector"] == {
                "nvidia.com/gpu.compute.major": major,
                "nvidia.com/gpu.compute.minor": minor,
            }
            files = ENGINES[name]["rank_bytes"] * num_gpus  # of this node's ranks
            [shm] = (v["emptyDir"] for v in template["spec"]["volumes"] if v["name"] == "shm")
            shm_gib = int(shm["sizeLimit"].removesuffix("Gi"))
            memory = int(container["resources"]["requests"]["memory"].removesuffix("Gi"))
            assert files / GIB + shm_gib < memory <= files / GIB + shm_gib + 9
            most = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
            assert most >= 2 * files / GIB + shm_gib


def test_a_gpu_has_room_for_what_was_planned(tmp_path: Path) -> None:
    pod = templates_of(deployed("one-gpu", tmp_path))[0]["spec"]
    node = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    [[expression]] = (term["matchExpressions"] for term in node["nodeSelectorTerms"])
    assert (expression["key"], expression["operator"]) == ("nvidia.com/gpu.memory", "Gt")
    assert expression["values"] == [str(8 * 1024)]  # MiB, as the label counts


def test_several_targets_are_several_kinds_of_nodes(tmp_path: Path) -> None:
    pod = templates_of(deployed("native", tmp_path))[0]["spec"]
    assert "nodeSelector" not in pod
    node = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    found = [
        tuple(each["values"][0] for each in term["matchExpressions"])
        for term in node["nodeSelectorTerms"]
    ]
    assert found == [("8", "6"), ("8", "9")]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_an_sm_that_nobody_recorded_is_not_guessed(tmp_path: Path) -> None:
    pod = templates_of(deployed("unknown-sm", tmp_path))[0]["spec"]
    assert "nodeSelector" not in pod and "affinity" not in pod
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("asked", [None, 1.5])
def test_a_cpu_engine_is_told_what_its_pod_has_room_for(
    asked: float | None, tmp_path: Path
) -> None:
    engine = paper_engine(tmp_path / "e", "cpu", rank_bytes=2 * GIB, kv_cache_gib=asked)
    kinds = {d["kind"]: d for d in deploy(engine, tmp_path / "k8s")}
    told = float(kinds["ConfigMap"]["data"]["ENGINEHOUSE_KV_CACHE_GIB"])
    sequence = 1024 * LAYERS * 2 * KV_HEADS * HEAD_SIZE * 2  # bfloat16
    most = 8 * sequence  # of the batch
    assert told == (asked or ceil(4 * min(most, max(4 * sequence, 2 * GIB)) / GIB) / 4)
    [container] = containers_of(kinds)
    assert container["image"] == "enginehouse:cpu"
    assert set(container["resources"]["limits"]) == {"memory"}
    memory = int(container["resources"]["requests"]["memory"].removesuffix("Gi"))
    assert 2 + told < memory <= 2 + told + 5


def test_a_checkpoint_is_cut_as_asked(tmp_path: Path) -> None:
    kinds = deployed("checkpoint", tmp_path)
    assert kinds["ConfigMap"]["data"]["ENGINEHOUSE_TP_SIZE"] == "4"
    [container] = containers_of(kinds)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert kinds["Deployment"]["metadata"]["name"] == "mine"


def test_every_variable_is_one_that_serving_knows(tmp_path: Path) -> None:
    known = (ROOT / "docs" / "serving.md").read_text()
    for name in ("checkpoint", "cpu"):
        for variable in deployed(name, tmp_path / name)["ConfigMap"]["data"]:
            assert f"`{variable}`" in known or variable == "ENGINEHOUSE_API_KEYS_FILE", variable


@pytest.mark.parametrize("name", ENGINES)
def test_each_command_is_one_that_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The images' own entry, with the container's arguments, in its environment."""
    kinds = deployed(name, tmp_path)
    capsys.readouterr()
    for variable, value in kinds["ConfigMap"]["data"].items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "paper-8b-fp8-0.paper-8b-fp8.default")
    monkeypatch.setenv("LWS_GROUP_SIZE", "2")
    monkeypatch.setenv("LWS_WORKER_INDEX", "1")
    monkeypatch.setattr(launcher, "visible_gpus", list)
    recipe = (ROOT / "Dockerfile").read_text()
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", recipe, re.MULTILINE)[0])
    always = json.loads(re.findall(r"^CMD (.*)$", recipe, re.MULTILINE)[0])
    said = []
    for container in containers_of(kinds):
        words = [*entry[1:], *container.get("args", always), "--dry-run"]
        here = {"/engine": str(tmp_path / name)}
        config = str(ROOT / "configs" / "gunicorn.conf.py")
        words = [config if w.endswith("gunicorn.conf.py") else here.get(w, w) for w in words]
        assert launcher.main(words) == 0
        said.append(shlex.split(capsys.readouterr().out))
    if name == "two-nodes":
        leader, worker = said
        hosts = leader[leader.index("--host") + 1]
        assert hosts == (
            "paper-8b-fp8-0.paper-8b-fp8.default:8,paper-8b-fp8-0-1.paper-8b-fp8.default:8"
        )
        assert leader[leader.index("-n") + 1] == "16" and "trtllm-llmapi-launch" in leader
        [rsh] = (word for word in leader if word.startswith("OMPI_MCA_plm_rsh_args="))
        assert "-p 2222 -i /ssh/id " in rsh
        assert worker[0].endswith("/sshd") and "HostKey=/ssh/id" in worker
        pod = templates_of(kinds)[1]["spec"]
        assert f"Port={pod['containers'][0]['ports'][0]['containerPort']}" in worker
        assert {"name": "ssh", "mountPath": "/ssh", "readOnly": True} in (
            pod["containers"][0]["volumeMounts"]
        )
    else:
        assert any(word.endswith("gunicorn") for word in said[0])
    if name == "native-nodes":
        leader, worker = said
        assert {
            "ENGINEHOUSE_RANKS_ADDRESS=0.0.0.0:5600",
            "ENGINEHOUSE_RANKS_KEY_FILE=/ranks/key",
            "ENGINEHOUSE_LOCAL_RANKS=8",
        } <= set(leader)
        assert [n for word, n in pairwise(worker) if word == "--rank"] == [*map(str, range(8, 16))]
        leaders = {to for word, to in pairwise(worker) if word == "--leader"}
        assert leaders == {"paper-8b-fp8-0.paper-8b-fp8.default:5600"}
        assert {key for word, key in pairwise(worker) if word == "--key-file"} == {"/ranks/key"}


def test_ranks_of_plans_come_to_a_port_and_prove_a_secret_that_all_pods_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = deployed("native-nodes", tmp_path)
    wanted = capsys.readouterr().out
    assert "a secret paper-8b-fp8-ranks with the file key (openssl rand -hex 32)" in wanted
    for template in templates_of(kinds):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["ranks"]["secret"]["secretName"] == "paper-8b-fp8-ranks"
        [container] = template["spec"]["containers"]
        key = container["args"][container["args"].index("--ranks-key") + 1]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(Path(key).parent) == mounts["ranks"]
    leader, worker = containers_of(kinds)
    assert {"name": "ranks", "containerPort": 5600} in leader["ports"]
    ready_file = worker["args"][worker["args"].index("--ready-file") + 1]
    assert worker["readinessProbe"]["exec"]["command"] == ["test", "-e", ready_file]
    assert "ports" not in worker and "startupProbe" not in worker


def test_an_engine_of_plans_can_have_a_few_gpus_of_each_node(tmp_path: Path) -> None:
    engine = paper_engine(tmp_path / "e", "tensorrt", tp=8, targets=[90])
    words = ["--image", "mine:1", "--nodes", "4"]
    kinds = {each["kind"]: each for each in deploy(engine, tmp_path / "k8s", *words)}
    assert kinds["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["size"] == 4
    for container in containers_of(kinds):
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"


def test_a_named_gateway_has_a_route_without_a_time_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    route = deployed("tp2", tmp_path)["HTTPRoute"]["spec"]
    [rule] = route["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/"}}]
    assert rule["timeouts"] == {"request": "0s"}, "a stream takes as long as its answer"
    wanted = capsys.readouterr().out
    assert "paper-8b-fp8-epp: helm's release paper-8b-fp8 of oci://registry.k8s.io/" in wanted
    assert "a Gateway front.door that takes routes" in wanted
    output = tmp_path / "k8s"
    deploy(tmp_path / "tp2", output, "--gateway")
    assert (output / "inferencepool.yaml").exists() and not (output / "httproute.yaml").exists()
    wanted = capsys.readouterr().out
    assert "paper-8b-fp8-epp: helm's release" in wanted and "a Gateway" not in wanted
    deploy(tmp_path / "tp2", output)
    assert not (output / "inferencepool.yaml").exists()


def test_each_metric_is_one_that_is_told(http: FlaskClient, tmp_path: Path) -> None:
    told = http.get("/metrics").text
    asked = deployed("one-gpu", tmp_path / "a")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert f"\n{asked[0]['pods']['metric']['name']} " in told
    kinds = deployed("tp2", tmp_path / "b")
    [trigger] = kinds["ScaledObject"]["spec"]["triggers"]
    query = re.fullmatch(
        r'sum\((\w+)\{namespace="models",pod=~"(.*)"\}\)', trigger["metadata"]["query"]
    )
    assert query and f"\n{query[1]} " in told
    name = kinds["Deployment"]["metadata"]["name"]
    assert re.fullmatch(query[2], f"{name}-5d8f7c-x2x4z"), "Prometheus' patterns are anchored"
    assert kinds["ConfigMap"]["data"]["ENGINEHOUSE_METRIC_NAMES"] == "vllm"
    theirs = {new: old for old, new in NAMES["vllm"].items()}
    for name in PICKER.split():
        assert f"\nenginehouse_{theirs[name]} " in told


def test_the_folder_is_written_again_and_a_strangers_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, output = paper_engine(tmp_path / "e"), tmp_path / "k8s"
    deploy(engine, output)
    deploy(engine, output, "--keda", "http://p:9090")
    assert not (output / "autoscaler.yaml").exists(), "of the first time"
    (output / "patch.yaml").write_text("mine")
    assert main(["deploy", "kubernetes", str(engine), "-o", str(output)]) == 2
    assert "holds patch.yaml, which this does not write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "words", "message"),
    [
        ({"tp": 8, "pp": 2}, ["--nodes", "3"], "cannot be laid on 3 nodes"),
        ({"tp": 4, "pp": 3}, [], "12 ranks .* cannot be laid on 2 nodes"),
        ({"backend": "cpu"}, ["--nodes", "2"], "runs on the CPU backend"),
        ({"backend": "tensorrt"}, [], "name an image that has it with --image"),
        (
            {"backend": "tensorrt", "tp": 9},
            ["--image", "a"],
            "9 ranks .* 2 nodes alike; .* 1, 3, 9",
        ),
        ({}, ["--tp-size", "2"], "was cut when it was built; leave --tp-size out"),
        ({}, ["--name", "Mine"], "--name Mine: wanted up to 40 small letters"),
        ({}, ["--keda", "prometheus"], "--keda prometheus: wanted the address of Prometheus"),
        ({}, ["--gateway", "Front"], "--gateway Front: wanted the name of a Gateway, in small"),
        ({}, ["--gateway", "a..b"], "--gateway a..b: wanted the name of a Gateway, in small"),
        ({}, ["--replicas", "3", "--max-replicas", "2"], "--max-replicas 2 is below --replicas 3"),
    ],
)
def test_what_a_cluster_would_not_run_is_refused(
    engine: dict[str, Any],
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = paper_engine(tmp_path / "e", **engine)
    assert main(["deploy", "kubernetes", str(path), "-o", str(tmp_path / "k8s"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "k8s").exists()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Qwen3_8B.fp8", "qwen3-8b-fp8"),
        ("8b", "engine-8b"),
        ("x" * 39 + "--y", "x" * 39),
        ("ä", "engine"),
    ],
)
def test_an_engines_name_becomes_a_label(name: str, label: str) -> None:
    assert label_of(name) == label


def test_the_base_is_a_folder_of_its_own() -> None:
    """`kubectl apply -k` takes it as it is, for an engine on one GPU."""
    base = ROOT / "server" / "deploy" / "base"
    kinds = {document["kind"] for document in render_folder(base)}
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "ConfigMap"} <= kinds
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in base.iterdir())
