"""Our metrics under the names that dashboards and gateways of other servers scrape.

They are told beside ours, with the same values; a server of ours replaces one of theirs without a
new dashboard. What another server measures and this one does not has no name here.
Sources: vLLM, vllm/v1/metrics/loggers.py; TensorRT-LLM 1.2, tensorrt_llm/metrics/; Gateway API
Inference Extension, its model server protocol (queue depth, KV cache use).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# Ours, without `enginehouse_` -> theirs.
_VLLM = {
    "num_requests_running": "vllm:num_requests_running",
    "num_requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions",
    "cached_prompt_tokens": "vllm:prefix_cache_hits",
    "prompt_tokens": "vllm:prompt_tokens",
    "generation_tokens": "vllm:generation_tokens",
    "request_success": "vllm:request_success",
    "time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "spec_decode_num_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}
_TRTLLM = {
    "kv_cache_usage_ratio": "trtllm_kv_cache_utilization",
    "request_success": "trtllm_request_success",
    "time_to_first_token_seconds": "trtllm_time_to_first_token_seconds",
    "time_per_output_token_seconds": "trtllm_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "trtllm_e2e_request_latency_seconds",
    "request_queue_time_seconds": "trtllm_request_queue_time_seconds",
}
NAMES = {"vllm": _VLLM, "trtllm": _TRTLLM}
_LABELS = {"finish_reason": "finished_reason"}  # as both call it
_OURS = "enginehouse_"


class OtherNames(Collector):
    """collect: our own, at the moment of a scrape. whose: of NAMES. model: the label model_name."""

    def __init__(self, collect: Callable[[], Iterable[Metric]], whose: str, model: str) -> None:
        self._collect = collect
        self._names = NAMES[whose]
        self._model = model

    def collect(self) -> Iterator[Metric]:
        for metric in self._collect():
            theirs = self._names.get(metric.name.removeprefix(_OURS))
            if theirs is None:
                continue
            named = Metric(theirs, metric.documentation, metric.type)
            for sample in metric.samples:
                ending = sample.name.removeprefix(metric.name)
                labels = {_LABELS.get(key, key): value for key, value in sample.labels.items()}
                labels["model_name"] = self._model
                named.add_sample(theirs + ending, labels, sample.value, sample.timestamp)
            yield named


def with_other_names(
    registries: Iterable[CollectorRegistry], whose: tuple[str, ...], model: str
) -> Iterator[CollectorRegistry]:
    """Each registry, and after it what of it others call otherwise."""
    for registry in registries:
        yield registry
        for each in whose:
            more = CollectorRegistry()
            more.register(OtherNames(registry.collect, each, model))
            yield more
