"""A request as spans, as a collector gets them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gevent
import pytest
from flask import Flask

from doubles.otlp_collector import Collector, attributes, collecting
from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.request import FinishReason, TokenOutput
from enginehouse.server import settings as settings_module
from enginehouse.server.app import close_tracing, create_app
from enginehouse.server.observe.otel import traces_url
from enginehouse.server.observe.tracing import Part, parts_of
from enginehouse.server.settings import ServerSettings
from makers.api_client import HELLO, PATHS, ask
from makers.completions import completion
from makers.token_outputs import tokens

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
Sent = Callable[[Flask], list[Any]]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture
def traced(settings: ServerSettings, engine: ScriptedClient, collector: Collector) -> Flask:
    return create_app(replace(settings, otlp_endpoint=collector.url), engine)


def spans_of(app: Flask, collector: Collector) -> dict[str, Any]:
    """All that were sent, by name."""
    close_tracing(app)
    return {span.name: span for span in collector.spans}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_tree_of_spans_within_the_client_s_trace(
    traced: Flask, engine: ScriptedClient, collector: Collector, stream: bool
) -> None:
    engine.script = [
        (0, TokenOutput(1, [5], queued_s=0.0)),
        (0, TokenOutput(1, [6], FinishReason.LENGTH)),
    ]
    with traced.test_client().post(
        f"{PATHS[0]}?x=1",
        json={**HELLO, "stream": stream, "temperature": 0.5, "max_tokens": 7},
        headers={"traceparent": TRACEPARENT},
    ) as answer:
        assert answer.data
    spans = spans_of(traced, collector)
    http, chat = spans[f"POST {PATHS[0]}"], spans["chat tiny/chat"]
    assert list(spans) == ["queue", "prefill", "decode", chat.name, http.name]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    parents = {name: span.parent_span_id.hex() for name, span in spans.items()}
    inside = dict.fromkeys(("queue", "prefill", "decode"), chat.span_id.hex())
    assert parents == {http.name: PARENT_ID, chat.name: http.span_id.hex(), **inside}
    assert attributes(http) == {
        "http.request.method": "POST",
        "url.path": PATHS[0],
        "http.route": PATHS[0],
        "http.response.status_code": 200,
    }
    told = attributes(chat)
    assert told.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert told.pop("gen_ai.response.time_to_first_chunk") > 0
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "enginehouse",
        "gen_ai.request.model": "tiny/chat",
        "gen_ai.response.model": "tiny/chat",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": len(engine.submitted[0][0]),
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
    }
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    assert http.start_time_unix_nano <= chat.start_time_unix_nano <= queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano == chat.end_time_unix_nano <= http.end_time_unix_nano
    assert set(collector.paths) == {"/v1/traces"}
    assert collector.resources[0]["service.name"] == "enginehouse"


def test_refusals_and_failures_have_their_status_and_no_text_of_a_request(
    traced: Flask, engine: ScriptedClient, collector: Collector
) -> None:
    http = traced.test_client()
    http.get("/health/live").close()
    http.get("/metrics").close()
    ask(http, temperature=9).close()
    engine.script = [ZeroDivisionError("a secret")]
    ask(http, messages=[{"role": "user", "content": "a secret"}]).close()
    http.get("/v1/secret").close()
    close_tracing(traced)
    told = [(span.name, span.status.code, attributes(span)) for span in collector.spans]
    posts = [each for each in told if each[0] == f"POST {PATHS[0]}"]
    assert [(code, each["http.response.status_code"]) for _, code, each in posts] == [
        (0, 400),
        (2, 500),
    ]
    assert posts[1][2]["error.type"] == "500"
    [(_, code, failed)] = [each for each in told if each[0] == "chat tiny/chat"]
    assert (code, failed["error.type"]) == (2, "error")
    assert "GET" in {name for name, _, _ in told}, "no route: its name is the method alone"
    shown = repr([s for s in collector.spans if attributes(s).get("url.path") != "/v1/secret"])
    assert "secret" not in shown and "health" not in shown and "metrics" not in shown


def test_what_a_shutdown_ends_is_sent_too(
    traced: Flask, engine: ScriptedClient, collector: Collector
) -> None:
    engine.script = tokens("a")
    asking = gevent.spawn(ask, traced.test_client())
    with gevent.Timeout(60):
        while not engine.generations:
            gevent.idle()
    asking.kill()
    spans = spans_of(traced, collector)
    assert attributes(spans["POST"])["error.type"] == "shutdown"
    assert attributes(spans["chat tiny/chat"])["error.type"] == "cancelled"


def test_a_traceparent_that_is_none_begins_a_trace_and_one_not_sampled_sends_nothing(
    traced: Flask, collector: Collector
) -> None:
    for parent in ("nonsense", f"00-{TRACE_ID}-{PARENT_ID}-00"):
        traced.test_client().get("/v1/models", headers={"traceparent": parent}).close()
    spans = spans_of(traced, collector)
    assert list(spans) == ["GET /v1/models"]
    assert re.fullmatch("[0-9a-f]{32}", spans["GET /v1/models"].trace_id.hex())
    assert spans["GET /v1/models"].trace_id.hex() != TRACE_ID


def test_an_answer_s_parts_are_what_is_known_of_it() -> None:
    answer = completion()
    assert list(parts_of(answer, None, 9.0)) == []
    answer.submitted_s = 1.0
    assert list(parts_of(answer, None, 9.0)) == [Part("queue", 1, 9)]
    answer.first_token_s = 4.0
    first = Part("queue and prefill", 1, 4)
    assert list(parts_of(answer, None, 9.0)) == [first, Part("decode", 4, 9)]
    answer.queued_s, answer.finished_s = 2.0, 6.0
    parts = [Part("queue", 1, 3), Part("prefill", 3, 4), Part("decode", 4, 6)]
    assert list(parts_of(answer, None, 9.0)) == parts


@pytest.mark.parametrize(
    "text", ["localhost:4318", "ftp://a", "http://", "http://a:99999", "http://a?b", "http://a#b"]
)
def test_an_endpoint_that_is_none_is_refused(settings: ServerSettings, text: str) -> None:
    with pytest.raises(EnginehouseError, match="ENGINEHOUSE_OTLP_ENDPOINT=.*; wanted a collector"):
        from_environment(settings, text)


def test_an_endpoint_is_a_collector_s_or_its_path(settings: ServerSettings) -> None:
    for text in ("http://a:4318", "https://[::1]/x/", "http://a/v1/traces"):
        assert from_environment(settings, text).otlp_endpoint == text
    assert traces_url("http://a:4318") == traces_url("http://a:4318/") == "http://a:4318/v1/traces"
    assert traces_url("http://a/x/v1/traces") == "http://a/x/v1/traces"


def test_without_the_extra_a_sentence_says_what_to_install(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(EnginehouseError, match=r"install enginehouse\[otel\], or leave"):
        from_environment(settings, "http://a")


def from_environment(settings: ServerSettings, endpoint: str) -> ServerSettings:
    return ServerSettings.from_environment(
        {
            "ENGINEHOUSE_ENGINE": str(settings.engine_dir),
            "ENGINEHOUSE_HOST_ADDRESS": "ipc:///tmp/x",
            "ENGINEHOUSE_OTLP_ENDPOINT": endpoint,
        }
    )


def test_nothing_of_it_is_imported_where_no_endpoint_is_set(settings: ServerSettings) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from enginehouse.server.app import create_app\n"
        "from enginehouse.server.settings import ServerSettings\n"
        "settings = ServerSettings(Path(sys.argv[1]), 'ipc://x', 'm')\n"
        "create_app(settings, object())\n"
        "print(*(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    command = [sys.executable, "-c", code, settings.engine_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
