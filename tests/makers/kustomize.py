"""As much of kustomize as our folders use: resources, namespace, a ConfigMap and who names it.

Written from kustomize's own documentation, so that a reference it would not follow stays visible.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
# Of the kinds that kustomize knows by itself: where they name a ConfigMap (its defaults, nameref).
_KNOWN = {"Deployment": ["spec/template/spec/containers/envFrom/configMapRef/name"]}
_FIELDS = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "configurations"}


def render_folder(folder: Path) -> list[Document]:
    """The documents that `kubectl apply -k folder` would send."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization) <= _FIELDS, "this renderer does not know the others"
    documents = [yaml.safe_load((folder / name).read_text()) for name in kustomization["resources"]]
    paths = {kind: list(known) for kind, known in _KNOWN.items()}
    for name in kustomization.get("configurations", ()):
        for reference in yaml.safe_load((folder / name).read_text())["nameReference"]:
            assert reference["kind"] == "ConfigMap"
            for field in reference["fieldSpecs"]:
                paths.setdefault(field["kind"], []).append(field["path"])
    for generated in kustomization.get("configMapGenerator", ()):
        data = dict(literal.split("=", 1) for literal in generated["literals"])
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]
        renamed = f"{generated['name']}-{digest}"
        for document in documents:
            for path in paths.get(document["kind"], ()):
                _rename(document, path.split("/"), generated["name"], renamed)
        config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": renamed}}
        documents.append({**config, "data": data})
    if "namespace" in kustomization:
        for document in documents:
            document["metadata"]["namespace"] = kustomization["namespace"]
    return documents


def _rename(node: Any, path: list[str], old: str, new: str) -> None:
    """Lists on the way are gone through, as kustomize does."""
    if isinstance(node, list):
        for each in node:
            _rename(each, path, old, new)
    elif isinstance(node, dict) and path[0] in node:
        if len(path) > 1:
            _rename(node[path[0]], path[1:], old, new)
        elif node[path[0]] == old:
            node[path[0]] = new
