"""One worker's state, and the way every endpoint takes: body, checks, answer.

Knows Flask's request and response; not how a prompt is made or what an endpoint's fields mean.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import gevent
from flask import Response, g, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import RequestEntityTooLarge

from enginehouse.runtime.errors import HostUnavailable, RequestError
from enginehouse.runtime.request import EngineInfo
from enginehouse.server.answer.completion import (
    ClientGone,
    Completion,
    EngineClient,
    Generation,
    Prices,
)
from enginehouse.server.http import sse
from enginehouse.server.http.metrics import Metrics
from enginehouse.server.observe.lanes import Lanes
from enginehouse.server.observe.reasons import cancel_reason, phase_of
from enginehouse.server.observe.timing import server_timing
from enginehouse.server.observe.tracing import TRACE, open_tracing
from enginehouse.server.prompt.chat import Chat, call_beside_the_loop
from enginehouse.server.settings import ServerSettings
from enginehouse.server.tools.unenforced import Unenforced
from enginehouse.server.wire.error_body import make_error
from enginehouse.server.wire.responses import (
    MODEL,
    TOKENS,
    error_response,
    json_response,
    log_fields,
)

LOG = logging.getLogger("enginehouse.server")

_CLIENT_CLOSED_REQUEST = 499  # nginx's status, for logs and metrics, and who ended its side alone
_MAX_NAMES, _MAX_NAME, _MAX_PATH = 16, 64, 256  # in a header, and characters of each
# A larger body is parsed beside the event loop, and so is one that may hold a schema: a few
# characters of a pattern can take seconds. Fields' names may be spelt by escapes.
_MAX_INLINE_BYTES = 2 * 1024
_SCHEMAS = re.compile(rb"response_format|structured_outputs|guided_|regex|ebnf|tool|\\u00")

T = TypeVar("T")


class Service:
    """What the routes of one worker share."""

    def __init__(self, settings: ServerSettings, client: EngineClient, chat: Chat) -> None:
        self.settings = settings
        self.client = client
        self.chat = chat
        self.draining = False
        self.lanes = Lanes()
        self.tracing = open_tracing(settings.otlp_endpoint)
        self.metrics = Metrics(
            client, settings.metric_names, settings.model_name, settings.started_s
        )
        self.prices = Prices(settings.price_input, settings.price_output)

    def read(self, parse: Callable[[bytes], T]) -> T:
        """The request's body, parsed; 415, 413, 408 or 400 when it cannot be."""
        if request.mimetype != "application/json":
            raise RequestError(
                f'Content-Type: found "{request.mimetype}"; wanted "application/json"',
                code="unsupported_media_type",
                status=415,
            )
        encoding = request.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise RequestError(
                f'Content-Encoding: found "{encoding[:60]}"; wanted the body as it is',
                code="unsupported_media_type",
                status=415,
            )
        body = _read_body(self.settings.max_body_bytes, self.settings.body_timeout_s)
        g.is_light = len(body) <= _MAX_INLINE_BYTES and not _SCHEMAS.search(body)
        return self.beside(lambda: parse(body))

    def beside(self, work: Callable[[], T]) -> T:
        """What the request's body, which has been read, says may take long: beside the loop."""
        return work() if g.is_light else call_beside_the_loop(work)

    def answer(
        self,
        completion: Completion,
        generation: Generation | None,
        stream: bool,
        unenforced: tuple[Unenforced, ...] = (),
    ) -> Response:
        """Run the completion to its end, or to its first output and then as a stream.

        unenforced: the schemas that its answers are held against then.
        """
        completion.on_gap = self.metrics.observe_gap
        self.lanes.begin(completion, generation, g.request_id)
        watch = sse.DisconnectWatch(request.environ.get("gunicorn.socket"), generation)
        try:
            if stream:
                return self._stream(completion, generation, watch, unenforced)
            with watch:
                for _ in completion.run(generation):
                    pass
        except BaseException as error:
            watch.stop()
            self.count(completion, generation, request.environ)
            if not isinstance(error, ClientGone):
                raise
            LOG.info("request %s: the client has gone", g.request_id)
            gone = "the connection was closed on your side before there was an answer"
            return error_response(
                make_error(_CLIENT_CLOSED_REQUEST, gone, code="client_closed_request")
            )
        self.count(completion, generation, request.environ)
        self._judge(completion, unenforced, g.request_id)
        response = sse.told(completion, lambda: json_response(completion.whole()))
        response.headers["Server-Timing"] = server_timing(completion)
        return response

    def count(
        self, completion: Completion, generation: Generation | None, environ: dict[str, Any]
    ) -> None:
        """In the metrics, and for whoever logs the request. To be called while what ends it is on
        its way.
        """
        self.metrics.count_completion(completion)
        self.lanes.end(completion)
        if not completion.finished and completion.unfinished_reason == "cancelled":
            reason = cancel_reason(sys.exc_info()[1])
            self.metrics.count_cancelled(reason, phase_of(completion, generation))
        if TRACE in environ:
            environ[TRACE].answered(completion, generation)
        environ[TOKENS] = (completion.num_prompt_tokens, completion.num_completion_tokens)

    def _judge(
        self, completion: Completion, unenforced: tuple[Unenforced, ...], request_id: str
    ) -> None:
        """Hold what ended by itself against the schemas of which not all was enforced."""
        for choice in completion.choices:
            if not unenforced or choice.finish_reason not in ("stop", "tool_calls"):
                continue
            calls: list[tuple[str | None, str]] = [(c.name, c.arguments) for c in choice.calls]
            for function, text in calls or [(None, choice.text)]:
                for each in unenforced:
                    if each.function == function:
                        verdict = call_beside_the_loop(partial(each.verdict, text))
                        self._tell_verdict(verdict, each, request_id)

    def _tell_verdict(self, verdict: str, of: Unenforced, request_id: str) -> None:
        self.metrics.count_verdict(verdict)
        level = logging.INFO if verdict == "valid" else logging.WARNING
        paths = ", ".join(of.paths)[:500]
        words = "request %s: not enforced: %s; the answer is %s"
        LOG.log(level, words, request_id, paths, verdict, extra={"request_id": request_id})

    def _stream(
        self,
        completion: Completion,
        generation: Generation | None,
        watch: sse.DisconnectWatch,
        unenforced: tuple[Unenforced, ...],
    ) -> Response:
        request_id, environ = g.request_id, request.environ
        stream = sse.Stream(completion, generation, self.settings.keepalive_s)

        def close() -> None:
            watch.stop()
            if stream.close():
                fields = log_fields(environ)
                LOG.info("request %s: the stream ended early", request_id, extra=fields)
            self.count(completion, generation, environ)
            if stream.failure is not None:
                status, body, _ = stream.failure
                self.metrics.count_error(status, body["error"]["code"])
            self._judge(completion, unenforced, request_id)

        response = Response(sse.events(stream, request_id), headers=sse.HEADERS)
        if timing := server_timing(completion):
            response.headers["Server-Timing"] = timing
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
        request.environ[MODEL] = name

    def check_ready(self) -> None:
        """HostUnavailable while its engine is not there, or another one."""
        if not self.client.ready:
            raise HostUnavailable("it is starting or restarting")
        self.check_engine()

    def check_moving(self) -> None:
        """HostUnavailable while this worker drains, or work waits and the host does nothing:
        balancers go elsewhere. What comes all the same, before nobody listens, is served.
        """
        if self.draining:
            raise HostUnavailable("this worker is draining")
        if self.client.stands_still:
            raise HostUnavailable("it has done nothing for 20 s while requests wait")

    def check_engine(self) -> None:
        """The host must run the engine whose tokenizer this worker loaded.

        An engine that was rebuilt in its place is another one: this worker ends, and gunicorn
        forks one that reads it anew.
        """
        wanted, info = self.settings.engine_digest, self.info
        if info is not None and wanted is not None and info.digest != wanted:
            LOG.error("the engine was replaced by %s; this worker starts anew", info.digest)
            os.kill(os.getpid(), signal.SIGTERM)
            raise HostUnavailable("the engine was replaced; the worker is starting anew")

    def model_card(self) -> dict[str, Any]:
        info = self.info
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": info.created if info else 0,
            "owned_by": "enginehouse",
            "root": self.settings.model_name,
            "parent": None,
            "permission": [],
            "max_model_len": info.max_seq_len if info else None,
            "quantization": info.quantization if info else None,
        }

    @property
    def info(self) -> EngineInfo | None:
        """None while the engine was never ready."""
        try:
            return self.client.info
        except HostUnavailable:
            return None

    @property
    def max_messages(self) -> int | None:
        """The context's length, as every message takes a token at least; None as long as no engine
        was ready.
        """
        info = self.info
        return info.max_seq_len if info else None

    def _names(self) -> set[str]:
        info = self.info
        names = {self.settings.model_name, self.settings.engine_dir.name}
        return names | {info.name, info.model} if info else names


def fingerprint_of(info: EngineInfo) -> str:
    """OpenAI's system_fingerprint: which engine it was."""
    return "fp_" + info.digest.rpartition(":")[2][:12]


def tell(
    response: Response,
    ignored: Sequence[str],
    unenforced: Sequence[str] = (),
    repaired: Sequence[str] = (),
) -> Response:
    """Name, each in a header: the fields that had no effect, the paths of what of a schema is not
    enforced, and what of the conversation was not taken as it came.
    """
    for header, names, most in (
        ("X-Ignored-Fields", ignored, _MAX_NAME),
        ("X-Unenforced-Schema", unenforced, _MAX_PATH),
        ("X-Repaired-Messages", repaired, _MAX_PATH),
    ):
        if names:
            response.headers[header] = ", ".join(
                quote(name[:most], safe="[]$") for name in names[:_MAX_NAMES]
            )
    return response


def _read_body(max_bytes: int, timeout_s: float) -> bytes:
    """413 beyond the limit, 408 for one that does not end, 400 for one that cannot."""
    try:
        with gevent.Timeout(timeout_s):
            body = request.get_data(cache=False)
    except gevent.Timeout:
        _read_no_more()
        raise RequestError(
            f"the body did not arrive within {timeout_s:g} s; send the request again",
            code="request_timeout",
            status=408,
        ) from None
    except (OSError, ParseException) as error:
        raise RequestError(
            f"the body cannot be read: {error}; wanted Content-Length bytes or whole chunks",
            code="invalid_body",
        ) from None
    if len(body) > max_bytes:
        raise RequestEntityTooLarge
    return body


def _read_no_more() -> None:
    """The connection ends with this answer: what is left of the body is not waited for."""
    sock = request.environ.get("gunicorn.socket")
    try:
        if sock is not None:
            sock.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # the client has gone already
