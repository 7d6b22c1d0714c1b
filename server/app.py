"""The Flask application: routes, keys, request ids, and one shape for every error.

`create_app()` is what gunicorn calls in each worker. This file does not know how a prompt is
made, how tokens become text, or where the engine runs: it joins the files that do.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

import msgspec
from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from enginehouse.runtime.errors import HostUnavailable, RequestError
from enginehouse.server import openapi
from enginehouse.server.answer.completion import EngineClient
from enginehouse.server.api.batches.routes import add_batches
from enginehouse.server.api.chat.routes import chat_completions
from enginehouse.server.api.embeddings.routes import embeddings
from enginehouse.server.api.messages import routes as messages
from enginehouse.server.api.messages.errors import as_anthropics
from enginehouse.server.api.responses.routes import add_responses
from enginehouse.server.api.texts import token_routes
from enginehouse.server.api.texts.routes import text_completions
from enginehouse.server.http.auth import KeyRing
from enginehouse.server.http.cors import Cors
from enginehouse.server.http.metrics import CONTENT_TYPE, Metrics
from enginehouse.server.http.rate_limits import RateLimits
from enginehouse.server.http.service import Service
from enginehouse.server.http.shared_counts import SharedCounts
from enginehouse.server.http.slow_readers import SlowReaders
from enginehouse.server.observe.logged import RequestFields
from enginehouse.server.observe.reasons import NOT_HTTP
from enginehouse.server.observe.tracing import PROPAGATED, TRACE, Trace, Tracing
from enginehouse.server.page.engine_events import add_engine_events
from enginehouse.server.page.routes import add_page
from enginehouse.server.prompt.chat import Chat, load_chat
from enginehouse.server.settings import ServerSettings
from enginehouse.server.wire.error_body import ErrorAnswer, error_answer, make_error
from enginehouse.server.wire.responses import (
    KEY_NAME,
    OF_BATCH,
    REQUEST_ID,
    TOKENS,
    TRACE_ID,
    error_response,
    json_response,
)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment  # from 3.11 on

LOG = logging.getLogger("enginehouse.server")
LOG.addFilter(RequestFields())

# The product page's base URL: whatever answers under /v1 answers there.
_PAGE_BASE = "/v1/openai"
_ASKED = "enginehouse.path"  # of a request's environment: the path as the client has it
# What is asked of models that rank or classify, which this server has none of.
_OF_RANKERS = (
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/score",
    "/v1/score",
    "/classify",
    "/pooling",
)
_NO_RANKER = (
    "wanted a model that ranks or classifies, and this server's generates text; compare the "
    "vectors of POST /v1/embeddings"
)
# What stands between a text and the engine is vLLM's, outside /v1; clients look for it there too.
_OF_TEXTS = ("/tokenize", "/detokenize", "/apply-template", "/tokenizer_info")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_COUNTED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
)  # of what a key may ask in a minute
_POSTS = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": text_completions,
    "/v1/embeddings": embeddings,
    "/tokenize": token_routes.tokenize_route,
    "/detokenize": token_routes.detokenize_route,
    "/apply-template": token_routes.apply_template_route,
}


def create_app(settings: ServerSettings | None = None, client: EngineClient | None = None) -> Flask:
    """The application, with its engine's tokenizer and template loaded once.

    settings None: from the environment. client None: a client of the host the settings name.
    Raises EnginehouseError when either cannot be used.
    """
    settings = ServerSettings.from_environment() if settings is None else settings
    client = _open_client(settings) if client is None else client
    service = Service(settings, client, _open_chat(settings))
    app = Flask(__name__, static_folder=None)
    app.ensure_sync = lambda func: func  # type: ignore[method-assign]  # none here is a coroutine
    app.extensions["enginehouse"] = service
    # One byte more than is allowed: a body without a Content-Length is cut there, and seen.
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes + 1
    app.url_map.merge_slashes = False  # a redirect is no answer for an API client
    app.url_map.strict_slashes = False  # nor is a 404 for a slash at the end
    _add_routes(app, service)
    add_responses(app, service)
    messages.add_messages(app, service)
    add_batches(app, service)
    _add_documents(app)
    add_engine_events(app, service)
    add_page(app, openapi.document(version("enginehouse")), settings.page)
    _add_error_handlers(app, service.metrics)
    _add_request_ids(app, service.metrics)
    if service.tracing is not None:
        _add_traces(app, service.tracing)
    _add_cors(app, Cors(settings.cors_origins))
    _add_slow_readers(app, SlowReaders(settings.send_timeout_s, service.metrics.count_slow_reader))
    counts = SharedCounts(settings.counts_path or ":memory:", os.getpid())
    _add_keys(app, KeyRing(settings.api_keys, settings.open_pages), RateLimits(counts))
    app.wsgi_app = _one_path(app.wsgi_app)  # type: ignore[method-assign,assignment]
    return app


def _one_path(answer: WSGIApplication) -> WSGIApplication:
    """Every name of a path as one: the page's base URL is /v1, doubled slashes are one, and what is
    of texts is at the root.
    """

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ[_ASKED] = re.sub("/{2,}", "/", environ.get("PATH_INFO", ""))
        if path == _PAGE_BASE or path.startswith(f"{_PAGE_BASE}/"):
            path = "/v1" + path.removeprefix(_PAGE_BASE)
        if path.removeprefix("/v1").rstrip("/") in _OF_TEXTS:
            path = path.removeprefix("/v1")
        environ["PATH_INFO"] = path
        return answer(environ, start_response)

    return application


def _open_chat(settings: ServerSettings) -> Chat:
    return load_chat(settings.engine_dir, settings.tool_format, settings.reasoning_format)


def start_draining(app: Flask) -> None:
    """From now on the worker is not ready; what it is asked all the same is answered."""
    app.extensions["enginehouse"].draining = True


def count_not_http(app: Flask) -> None:
    """One more that was refused and that the application did not see."""
    service: Service = app.extensions["enginehouse"]
    service.metrics.count_refused(NOT_HTTP)


def close_tracing(app: Flask) -> None:
    """A worker ends."""
    service: Service = app.extensions["enginehouse"]
    if service.tracing is not None:
        service.tracing.close()


def engine_client(app: Flask) -> EngineClient:
    service: Service = app.extensions["enginehouse"]
    return service.client


def _open_client(settings: ServerSettings) -> EngineClient:
    from enginehouse.runtime.host.client import EngineClient as HostClient
    from enginehouse.runtime.host.keys import read_key
    from enginehouse.server.replicas.clients import ReplicaClients
    from enginehouse.server.replicas.prefix_router import ROUTERS

    key = None if settings.host_key_path is None else read_key(settings.host_key_path)
    if settings.replicas_path is None:
        return HostClient(settings.host_address, key)
    path, digest = settings.replicas_path, settings.engine_digest
    return ReplicaClients(path, digest, key, settings.is_open, ROUTERS[settings.routing]())


def _add_routes(app: Flask, service: Service) -> None:
    for path, answer in _POSTS.items():
        app.add_url_rule(path, path, partial(answer, service), methods=["POST"])

    @app.get("/v1/models")
    def list_models() -> Response:
        return json_response({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/<path:name>")
    def get_model(name: str) -> Response:
        service.check_model(name.rstrip("/"))
        return json_response(service.model_card())

    @app.get("/tokenizer_info")
    def get_tokenizer_info() -> Response:
        return token_routes.tokenizer_info_route(service)

    @app.get("/version")
    def get_version() -> Response:
        return json_response({"version": version("enginehouse")})

    @app.get("/health/live")
    def live() -> Response:
        return json_response({"status": "live"})

    @app.get("/health")
    @app.get("/health/ready")
    def ready() -> Response:
        service.check_ready()
        service.check_moving()
        return json_response({"status": "ready"})

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.render(), content_type=CONTENT_TYPE)


def _add_documents(app: Flask) -> None:
    document = openapi.document(version("enginehouse"))
    page = openapi.page(version("enginehouse"))

    @app.get("/openapi.json")
    def get_document() -> Response:
        return json_response(document)

    @app.get("/docs")
    def get_page() -> Response:
        return Response(page, content_type="text/html; charset=utf-8")


def _add_error_handlers(app: Flask, metrics: Metrics) -> None:
    rules = sorted({re.sub("<[^>]*>", "{id}", rule.rule) for rule in app.url_map.iter_rules()})
    served = f"this server answers: {', '.join(rules)}; under {_PAGE_BASE} what is under /v1"

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        message = f"{request.method} {request.path[:200]}: {error.description or error.name}"
        if status == 413:
            allowed = (request.max_content_length or 1) - 1
            message = f"the body is too large; wanted at most {allowed} bytes"
        if status == 404:
            path = request.environ[_ASKED]
            message = f"{request.method} {path[:200]} is not served; {served}"
            if path.rstrip("/") in _OF_RANKERS:
                message = f"{request.method} {path}: {_NO_RANKER}"
        response = error_response(_in_shape(make_error(status, message, code=_code_of(error))))
        metrics.count_error(status, _code_of(error), _is_probe())
        for name, value in error.get_headers(request.environ):
            if name in ("Allow", "Retry-After"):
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def any_error(error: Exception) -> Response:
        if not isinstance(error, (RequestError, HostUnavailable)):
            LOG.exception("request %s failed", g.request_id)
        answer = error_answer(error, g.request_id)
        metrics.count_error(answer.status, answer.body["error"]["code"], _is_probe())
        return error_response(_in_shape(answer))


def _in_shape(answer: ErrorAnswer) -> ErrorAnswer:
    """OpenAI's, or Anthropic's where that is asked for."""
    return as_anthropics(answer, g.request_id) if _is_anthropics() else answer


def _is_anthropics() -> bool:
    return f"{request.path}/".startswith(f"{messages.PREFIX}/")


def _add_request_ids(app: Flask, metrics: Metrics) -> None:
    @app.before_request
    def take_request_id() -> None:
        g.started_s = time.monotonic()
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request.environ[REQUEST_ID] = g.request_id

    @app.after_request
    def give_request_id(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        if _is_anthropics():
            response.headers["request-id"] = g.request_id
        if request.method == "OPTIONS" and response.status_code == 200:
            # Flask's own has no body and says that it is HTML.
            allowed = sorted(response.headers.get("Allow", "").split(", "))
            response.data = msgspec.json.encode({"allow": allowed})
            response.content_type = "application/json"
        if request.path.startswith("/v1/"):
            metrics.count_answer(response.status_code)
            seconds = time.monotonic() - g.started_s
            response.headers["openai-processing-ms"] = str(round(seconds * 1000))
        return response


def _add_traces(app: Flask, tracing: Tracing) -> None:
    """A trace of each request of the API, until all of its answer is sent."""

    @app.before_request
    def begin() -> None:
        if request.path.startswith("/v1/") or request.path in _OF_TEXTS:
            headers = request.headers
            carried = {name: headers[name] for name in PROPAGATED if name in headers}
            trace = tracing.begin(request.method, request.path, carried)
            request.environ.update({TRACE: trace, TRACE_ID: trace.trace_id})

    @app.after_request
    def end_when_sent(response: Response) -> Response:
        trace: Trace | None = request.environ.get(TRACE)
        if trace is not None:
            route = request.url_rule.rule if request.url_rule else None
            g.trace_ends = True
            response.call_on_close(lambda: trace.end(response.status_code, route))
        return response

    @app.teardown_request
    def end_without_an_answer(error: BaseException | None) -> None:
        if TRACE in request.environ and "trace_ends" not in g:
            request.environ[TRACE].end(None, None)


def _add_cors(app: Flask, cors: Cors) -> None:
    @app.before_request
    def answer_preflight() -> Response | None:
        return cors.preflight(request.method, request.headers)

    @app.after_request
    def tell_browser(response: Response) -> Response:
        cors.tell(response, request.headers.get("Origin"))
        return response


def _add_slow_readers(app: Flask, readers: SlowReaders) -> None:
    @app.after_request
    def watch(response: Response) -> Response:
        sock = request.environ.get("gunicorn.socket")
        if sock is not None:
            chunks = cast(Iterable[bytes], response.response)
            response.response = readers.watch(chunks, sock, g.request_id)
        return response


def _add_keys(app: Flask, keys: KeyRing, limits: RateLimits) -> None:
    @app.before_request
    def check_key() -> None:
        if request.method == "OPTIONS" or OF_BATCH in request.environ:
            return  # a browser asks the former before it sends a key
        headers = request.headers
        key = keys.check(
            request.path, headers.get("Authorization", ""), headers.get("X-Api-Key", "")
        )
        if key is not None:
            request.environ[KEY_NAME] = key.name
            if request.path.rstrip("/") in _COUNTED:
                g.ticket = limits.ticket(key)
                g.ticket.begin()

    @app.after_request
    def tell_limits(response: Response) -> Response:
        ticket, environ = g.get("ticket"), request.environ
        if ticket is not None:
            if TOKENS in environ:  # a whole answer; a stream's are known at its end
                ticket.end(sum(environ[TOKENS]))
            response.headers.extend(ticket.headers())
            response.call_on_close(lambda: ticket.end(sum(environ.get(TOKENS, ()))))
        return response


def _is_probe() -> bool:
    return request.path.startswith("/health")


def _code_of(error: HTTPException) -> str:
    return re.sub(r"[^a-z]+", "_", error.name.lower())
