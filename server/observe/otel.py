"""Spans to a collector, by OpenTelemetry's SDK and OTLP over HTTP.

A greenlet of the SDK's sends them in batches; what waits is bounded, and beyond that lost and told
in the log. The SDK's own variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_...) hold. Wants the extra `otel`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import gevent
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from enginehouse.runtime.request import SamplingParams
from enginehouse.server.answer.completion import Completion, Generation
from enginehouse.server.observe.tracing import attributes_of, parts_of, sampling_attributes

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE")
_BATCH = 64  # spans; to encode one takes the event loop for a few tens of microseconds
_CLOSE_S = 2.0
_MOST = 200  # characters of what a client may choose


class OtelTracing:
    """One worker's."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: a collector's, such as http://localhost:4318."""
        name = os.environ.get("OTEL_SERVICE_NAME") or "enginehouse"
        about = {"service.name": name, "service.version": version("enginehouse")}
        # shutdown_on_exit would wait for a collector that hangs
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        given = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE" in os.environ
        batches = BatchSpanProcessor(
            OTLPSpanExporter(traces_url(endpoint)), max_export_batch_size=None if given else _BATCH
        )
        self._provider.add_span_processor(batches)
        self._tracer = self._provider.get_tracer("enginehouse", version("enginehouse"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, path: str, carried: Mapping[str, str]) -> OtelTrace:
        method = method if method in _METHODS else "_OTHER"
        span = self._tracer.start_span(
            method if method != "_OTHER" else "HTTP",
            context=self._propagator.extract(carried),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path[:_MOST]},
        )
        return OtelTrace(self._tracer, span, method)

    def close(self) -> None:
        with suppress(gevent.Timeout), gevent.Timeout(_CLOSE_S):
            self._provider.shutdown()


class OtelTrace:
    """Of one request. An answer's times are monotonic; those of spans count from 1970."""

    def __init__(self, tracer: Tracer, span: Span, method: str) -> None:
        self._tracer = tracer
        self._span = span
        self._method = method
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._ended = False
        self._asked: dict[str, Any] = {}
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def asked(self, sampling: SamplingParams) -> None:
        self._asked = self._asked or sampling_attributes(sampling)

    def answered(self, completion: Completion, generation: Generation | None) -> None:
        now_s = time.monotonic()
        attributes = {**attributes_of(completion), **self._asked}
        answer = self._tracer.start_span(
            f"{attributes['gen_ai.operation.name']} {completion.terms.model}",
            context=set_span_in_context(self._span),
            attributes=attributes,
            start_time=self._ns(completion.started_s),
        )
        within = set_span_in_context(answer)
        for name, start_s, end_s in parts_of(completion, generation, now_s):
            part = self._tracer.start_span(name, context=within, start_time=self._ns(start_s))
            part.end(self._ns(end_s))
        if not completion.finished and completion.unfinished_reason == "error":
            answer.set_status(Status(StatusCode.ERROR))
        answer.end(self._ns(completion.finished_s or now_s))

    def end(self, status: int | None, route: str | None) -> None:
        if self._ended:
            return
        self._ended = True
        if route is not None:
            self._span.update_name(f"{self._method} {route}")
            self._span.set_attribute("http.route", route)
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if status is None or status >= 500:
            self._span.set_attribute("error.type", "shutdown" if status is None else str(status))
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _ns(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * 1e9)


def traces_url(endpoint: str) -> str:
    """Where spans are posted to; an endpoint that says so itself is taken as it is."""
    return endpoint if endpoint.endswith("/v1/traces") else endpoint.rstrip("/") + "/v1/traces"
