"""`GET /` for browsers, and the files that the page loads: all from here, and nothing inline.

Source: W3C, "Content Security Policy Level 3" and "Trusted Types"; RFC 9110, section 12.5.1.
"""

from __future__ import annotations

from typing import Any

import msgspec
from flask import Flask, Response, request
from werkzeug.exceptions import NotFound

from enginehouse.server.page.fields import form_fields
from enginehouse.server.page.files import INDEX, StaticFile, read_static, static_file
from enginehouse.server.wire.responses import json_response

PREFIX = "/page"
# Text of a model is no markup: a script that would write some is stopped by the browser too.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_WHERE = {
    "server": "enginehouse",
    "api": "/v1",
    "docs": "/docs",
    "openapi": "/openapi.json",
    "ready": "/health/ready",
}


def add_page(app: Flask, document: dict[str, Any], is_on: bool) -> None:
    """is_on false: `/` says where everything is, to browsers too, and there is nothing else."""
    files = read_static() if is_on else {}

    @app.get("/")
    def where() -> Response:
        if is_on and _wants_html():
            response = _answer(files[INDEX])
        else:
            response = json_response(_WHERE)
        response.vary.add("Accept")
        return response

    if not is_on:
        return
    fields = msgspec.json.encode(form_fields(document))
    served = {name: file for name, file in files.items() if name != INDEX}
    served["fields.json"] = static_file(fields, "application/json")

    @app.get(f"{PREFIX}/<name>")
    def page_file(name: str) -> Response:
        if name not in served:
            raise NotFound
        return _answer(served[name])


def _wants_html() -> bool:
    """A browser names HTML; what takes anything, as curl does, is told where everything is."""
    accepted = request.accept_mimetypes
    named = any(kind == "text/html" and quality > 0 for kind, quality in accepted)
    return named and accepted["text/html"] >= accepted["application/json"]


def _answer(file: StaticFile) -> Response:
    zips = request.accept_encodings["gzip"] > 0
    content = file.gzipped if zips else file.content
    response = Response(content, content_type=file.content_type, headers=_HEADERS)
    if zips:
        response.headers["Content-Encoding"] = "gzip"
    response.vary.add("Accept-Encoding")
    response.set_etag(f"{file.tag}-gzip" if zips else file.tag)
    response.make_conditional(request)
    return response
