"""What stands around the pods: service, disruption budget, who scales them, their pool and route.

Scaled by the queue: a request that waits is what a further replica would take.
"""

from __future__ import annotations

import copy

from enginehouse.server.deploy.options import DeployOptions
from enginehouse.server.deploy.pods import Document, labels_of

_POOL_GROUP, _GATEWAY_GROUP = "inference.networking.k8s.io", "gateway.networking.k8s.io"
_PICKER_PORT = 9002  # of the endpoint picker, as the extension's charts install it


def service(base: Document, options: DeployOptions) -> Document:
    made = copy.deepcopy(base)
    made["metadata"] = {"name": options.name, "labels": labels_of(options, None)}
    made["spec"]["selector"] = labels_of(options)
    return made


def disruption_budget(base: Document, options: DeployOptions) -> Document:
    """Of all pods: whoever loses one of a group loses the group."""
    made = copy.deepcopy(base)
    made["metadata"] = {"name": options.name}
    made["spec"]["selector"]["matchLabels"] = labels_of(options, None)
    return made


def autoscaler(base: Document, workload: Document, options: DeployOptions) -> Document:
    """Kubernetes' own, which an adapter has to tell the metric."""
    made = copy.deepcopy(base)
    made["metadata"] = {"name": options.name}
    made["spec"] |= {
        "scaleTargetRef": _target(workload),
        "minReplicas": options.replicas,
        "maxReplicas": options.max_replicas,
    }
    return made


def scaled_object(base: Document, workload: Document, options: DeployOptions) -> Document:
    """KEDA's, with the metric, target and patience of the base's autoscaler."""
    [rule] = base["spec"]["metrics"]
    metric, target = rule["pods"]["metric"]["name"], rule["pods"]["target"]["averageValue"]
    pods = f'pod=~"{options.name}-.*"'
    of = f'namespace="{options.namespace}",{pods}' if options.namespace else pods
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": options.name},
        "spec": {
            "scaleTargetRef": _target(workload),
            "minReplicaCount": options.replicas,
            "maxReplicaCount": options.max_replicas,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": base["spec"]["behavior"]}},
            "triggers": [
                {
                    "type": "prometheus",
                    "metricType": "AverageValue",
                    "metadata": {
                        "serverAddress": str(options.keda),
                        "query": f"sum({metric}{{{of}}})",
                        "threshold": target,
                    },
                }
            ],
        },
    }


def inference_pool(port: int, options: DeployOptions) -> Document:
    """The pods that a Gateway's endpoint picker chooses among, by the gauges that they tell under
    the names it scrapes (ENGINEHOUSE_METRIC_NAMES).
    """
    return {
        "apiVersion": f"{_POOL_GROUP}/v1",
        "kind": "InferencePool",
        "metadata": {"name": options.name},
        "spec": {
            "selector": {"matchLabels": labels_of(options)},
            "targetPorts": [{"number": port}],
            "endpointPickerRef": {"name": f"{options.name}-epp", "port": {"number": _PICKER_PORT}},
        },
    }


def http_route(options: DeployOptions) -> Document:
    """From a Gateway to the pool, all paths. Time is not limited: answers are streams."""
    pool = {"group": _POOL_GROUP, "kind": "InferencePool", "name": options.name}
    return {
        "apiVersion": f"{_GATEWAY_GROUP}/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": options.name},
        "spec": {
            "parentRefs": [{"group": _GATEWAY_GROUP, "kind": "Gateway", "name": options.gateway}],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                    "backendRefs": [pool],
                    "timeouts": {"request": "0s"},
                }
            ],
        },
    }


def _target(workload: Document) -> Document:
    return {
        "apiVersion": workload["apiVersion"],
        "kind": workload["kind"],
        "name": workload["metadata"]["name"],
    }
