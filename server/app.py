"""The Flask application: routes, request ids, and one shape for every error.

`create_app()` is what gunicorn calls in each worker. This file does not know how a prompt is
made, how tokens become text, or where the engine runs: it joins the files that do.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
import uuid
from typing import Any
from urllib.parse import quote

import msgspec
from flask import Flask, Response, g, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from enginehouse.runtime.errors import HostUnavailable, RequestError
from enginehouse.runtime.request import EngineInfo
from enginehouse.server import sse
from enginehouse.server.chat import Chat, call_beside_the_loop, load_chat
from enginehouse.server.completion import (
    ClientGone,
    Completion,
    EngineClient,
    Generation,
    Prices,
)
from enginehouse.server.error_body import RETRY_AFTER_S, ErrorAnswer, error_answer, make_error
from enginehouse.server.metrics import CONTENT_TYPE, Metrics
from enginehouse.server.schema import ChatRequest, parse_chat_request
from enginehouse.server.settings import ServerSettings

LOG = logging.getLogger("enginehouse.server")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_CLOSED_REQUEST = 499  # nginx's status: nobody reads it, but logs and metrics do
_MAX_IGNORED_FIELDS = 16
_MAX_INLINE_BYTES = 64 * 1024  # a larger body is parsed beside the event loop


def create_app(settings: ServerSettings | None = None, client: EngineClient | None = None) -> Flask:
    """The application, with its engine's tokenizer and template loaded once.

    settings None: from the environment. client None: a client of the host the settings name.
    Raises EnginehouseError when either cannot be used.
    """
    settings = ServerSettings.from_environment() if settings is None else settings
    client = _open_client(settings.host_address) if client is None else client
    service = ChatService(settings, client, load_chat(settings.engine_dir))
    app = Flask(__name__, static_folder=None)
    app.extensions["enginehouse"] = service
    # One byte more than is allowed: a body without a Content-Length is cut there, and seen.
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes + 1
    app.url_map.merge_slashes = False  # a redirect is no answer for an API client
    _add_routes(app, service)
    _add_error_handlers(app)
    _add_request_ids(app, service.metrics)
    return app


def start_draining(app: Flask) -> None:
    """From now on the worker is not ready and begins no completion; those that run go on."""
    app.extensions["enginehouse"].draining = True


def _open_client(address: str) -> EngineClient:
    from enginehouse.runtime.client import EngineClient as HostClient

    return HostClient(address)


class ChatService:
    """One worker's way from a request body to an answer."""

    def __init__(self, settings: ServerSettings, client: EngineClient, chat: Chat) -> None:
        self.settings = settings
        self.client = client
        self.chat = chat
        self.draining = False
        self.metrics = Metrics(client)
        self._prices = Prices(settings.price_input, settings.price_output)

    def chat_completions(self) -> Response:
        started_s = time.monotonic()
        if request.mimetype != "application/json":
            raise RequestError(
                f'Content-Type: found "{request.mimetype}"; wanted "application/json"',
                code="unsupported_media_type",
                status=415,
            )
        if self.draining:
            raise HostUnavailable("this worker is draining; send the request again")
        body = _read_body(self.settings.max_body_bytes)
        info = self._info()
        max_messages = info.max_seq_len if info else None
        if len(body) <= _MAX_INLINE_BYTES:
            asked = parse_chat_request(body, max_messages)
        else:
            asked = call_beside_the_loop(lambda: parse_chat_request(body, max_messages))
        self.check_model(asked.model, param="model")
        self.check_engine()
        max_seq_len = self.client.info.max_seq_len
        prompt = self.chat.prompt(asked.messages, max_seq_len)
        completion = Completion(
            model=self.settings.model_name,
            pieces=self.chat.pieces,
            num_choices=asked.n,
            stops=asked.stop,
            num_prompt_tokens=len(prompt.ids),
            prices=self._prices,
            include_usage=asked.include_usage,
            started_s=started_s,
        )
        generation = self._submit(asked, prompt.ids, max_seq_len)
        watch = sse.DisconnectWatch(request.environ.get("gunicorn.socket"), generation)
        answer = self._stream if asked.stream else self._plain
        response = answer(completion, generation, watch)
        if asked.ignored_fields:
            names = asked.ignored_fields[:_MAX_IGNORED_FIELDS]
            response.headers["X-Ignored-Fields"] = ", ".join(
                quote(name[:64], safe="[]") for name in names
            )
        return response

    def _submit(
        self, asked: ChatRequest, prompt_ids: list[int], max_seq_len: int
    ) -> Generation | None:
        """None when no token may be generated: the engine is not troubled with that."""
        room = max_seq_len - len(prompt_ids)
        max_tokens = room if asked.max_tokens is None else min(asked.max_tokens, room)
        if max_tokens == 0:
            return None
        return self.client.submit(prompt_ids, asked.samplings(max_tokens, self.chat.stop_token_ids))

    def _plain(
        self, completion: Completion, generation: Generation | None, watch: sse.DisconnectWatch
    ) -> Response:
        try:
            with watch:
                for _ in completion.run(generation):
                    pass
        except ClientGone:
            LOG.info("request %s: the client has gone", g.request_id)
            return Response(status=_CLIENT_CLOSED_REQUEST)
        finally:
            self.metrics.count_completion(completion)
        return _json(completion.whole())

    def _stream(
        self, completion: Completion, generation: Generation | None, watch: sse.DisconnectWatch
    ) -> Response:
        request_id = g.request_id
        chunks = sse.events(completion, generation, self.settings.keepalive_s, request_id)

        def close() -> None:
            watch.stop()
            # A stream that was never begun has no `finally` to cancel in.
            if generation is not None and not completion.finished:
                generation.cancel()
                LOG.info("request %s: the stream ended early", request_id)
            self.metrics.count_completion(completion)

        response = Response(chunks, headers=sse.HEADERS)
        response.call_on_close(close)
        return response

    def check_model(self, name: str, param: str | None = None) -> None:
        """The served name and the engine's own names are accepted."""
        if name not in self._names():
            raise RequestError(
                f'the model "{name[:200]}" does not exist here; '
                f'wanted "{self.settings.model_name}"',
                param=param,
                code="model_not_found",
                status=404,
            )

    def check_engine(self) -> None:
        """The host must run the engine whose tokenizer this worker loaded.

        An engine that was rebuilt in its place is another one: this worker ends, and gunicorn
        forks one that reads it anew.
        """
        wanted, info = self.settings.engine_digest, self._info()
        if info is not None and wanted is not None and info.digest != wanted:
            LOG.error("the engine was replaced by %s; this worker starts anew", info.digest)
            os.kill(os.getpid(), signal.SIGTERM)
            raise HostUnavailable("the engine was replaced; the worker is starting anew")

    def model_card(self) -> dict[str, Any]:
        info = self._info()
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": info.created if info else 0,
            "owned_by": "enginehouse",
            "max_model_len": info.max_seq_len if info else None,
            "quantization": info.quantization if info else None,
        }

    def _names(self) -> set[str]:
        info = self._info()
        names = {self.settings.model_name, self.settings.engine_dir.name}
        return names | {info.name, info.model} if info else names

    def _info(self) -> EngineInfo | None:
        try:
            return self.client.info
        except HostUnavailable:
            return None  # the engine was never ready yet


def _read_body(max_bytes: int) -> bytes:
    """The request's body; 413 beyond the limit, 400 for one that cannot be read to its end."""
    try:
        body = request.get_data(cache=False)
    except (OSError, ParseException) as error:
        raise RequestError(
            f"the body cannot be read: {error}; wanted Content-Length bytes or whole chunks",
            code="invalid_body",
        ) from None
    if len(body) > max_bytes:
        raise RequestEntityTooLarge
    return body


def _add_routes(app: Flask, service: ChatService) -> None:
    for path in ("/v1/chat/completions", "/v1/openai/chat/completions"):
        app.add_url_rule(path, path, service.chat_completions, methods=["POST"])

    @app.get("/v1/models")
    def list_models() -> Response:
        return _json({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/<path:name>")
    def get_model(name: str) -> Response:
        service.check_model(name)
        return _json(service.model_card())

    @app.get("/health/live")
    def live() -> Response:
        return _json({"status": "live"})

    @app.get("/health")
    @app.get("/health/ready")
    def ready() -> Response:
        if service.draining:
            raise HostUnavailable("this worker is draining")
        if not service.client.ready:
            raise HostUnavailable("it is starting or restarting")
        service.check_engine()
        return _json({"status": "ready"})

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.render(), content_type=CONTENT_TYPE)


def _add_error_handlers(app: Flask) -> None:
    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        message = f"{request.method} {request.path[:200]}: {error.description or error.name}"
        if status == 413:
            allowed = (request.max_content_length or 1) - 1
            message = f"the body is too large; wanted at most {allowed} bytes"
        response = _error(make_error(status, message, code=_code_of(error)))
        for name, value in error.get_headers(request.environ):
            if name in ("Allow", "Retry-After"):
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def any_error(error: Exception) -> Response:
        if not isinstance(error, (RequestError, HostUnavailable)):
            LOG.exception("request %s failed", g.request_id)
        return _error(error_answer(error, g.request_id))


def _add_request_ids(app: Flask, metrics: Metrics) -> None:
    @app.before_request
    def take_request_id() -> None:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    @app.after_request
    def give_request_id(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        if request.path.startswith("/v1/"):
            metrics.count_answer(response.status_code)
        return response


def _code_of(error: HTTPException) -> str:
    return re.sub(r"[^a-z]+", "_", error.name.lower())


def _json(data: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status=status, content_type="application/json")


def _error(answer: ErrorAnswer) -> Response:
    response = _json(answer.body, answer.status)
    if answer.status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response
