"""A collector of OTLP over HTTP: keeps the spans it is sent, as their messages."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Collector:
    """paths: of what was posted. resources: the attributes of who sent spans."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.paths: list[str] = []
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []

    def take(self, path: str, body: bytes) -> None:
        self.paths.append(path)
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(attributes(sent.resource))
            self.spans += [span for scope in sent.scope_spans for span in scope.spans]


def attributes(holder: Any) -> dict[str, Any]:
    """Of a span or a resource: names and plain values."""
    return {each.key: _plain(each.value) for each in holder.attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(each) for each in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            zipped = self.headers.get("Content-Encoding") == "gzip"
            collector.take(self.path, gzip.decompress(body) if zipped else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield collector
    server.shutdown()
    thread.join()
    server.server_close()
