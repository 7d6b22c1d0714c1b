"""Which web pages may ask: CORS, when the settings name any origin.

A browser lets a page of another origin read an answer that names the page's origin, errors and
streams too, and asks before (a preflight) whether it may send a key and JSON.
Source: WHATWG Fetch, section 3.3, "CORS protocol"; W3C, "Resource Timing", section 4.5.
"""

from __future__ import annotations

import re

from flask import Response
from werkzeug.datastructures import Headers

from enginehouse.server.http.rate_limits import HEADERS

_METHODS = "GET, HEAD, POST, OPTIONS"
_SHOWN = (
    "X-Request-Id, X-Ignored-Fields, X-Unenforced-Schema, X-Repaired-Messages, "
    f"{', '.join(HEADERS)}, Server-Timing, openai-processing-ms, "
    "Retry-After, WWW-Authenticate, Allow"
)
_MAX_AGE_S = 7200  # the most that Chromium keeps a preflight's answer
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+( *, *[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


class Cors:
    """origins: ("*",) for every page, which then sends no cookies; empty: no page."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origins)
        self._any = "*" in origins

    def preflight(self, method: str, headers: Headers) -> Response | None:
        """The answer to a browser that asks before it sends; None when this is something else."""
        asks = method == "OPTIONS" and "Access-Control-Request-Method" in headers
        if not asks or not self._allows(headers.get("Origin")):
            return None
        response = Response(status=204)
        del response.headers["Content-Type"]
        response.headers["Access-Control-Allow-Methods"] = _METHODS
        wanted = headers.get("Access-Control-Request-Headers", "").strip()
        if _HEADER_NAMES.fullmatch(wanted):
            response.headers["Access-Control-Allow-Headers"] = wanted
        response.headers["Access-Control-Max-Age"] = str(_MAX_AGE_S)
        return response

    def tell(self, response: Response, origin: str | None) -> None:
        """Let the page of that origin read the answer, if it may."""
        if self._origins and not self._any:
            response.vary.add("Origin")
        if not self._allows(origin):
            return
        response.headers["Access-Control-Allow-Origin"] = "*" if self._any else origin
        response.headers["Access-Control-Expose-Headers"] = _SHOWN
        response.headers["Timing-Allow-Origin"] = "*" if self._any else origin
        if not self._any:
            response.headers["Access-Control-Allow-Credentials"] = "true"

    def _allows(self, origin: str | None) -> bool:
        return self._any or origin in self._origins
