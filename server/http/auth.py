"""API keys, when the settings name any: `Authorization: Bearer KEY`, or `X-Api-Key: KEY`.

Source: RFC 9110, section 11 (the scheme's name is case-insensitive), and RFC 6750.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from enginehouse.runtime.errors import RequestError
from enginehouse.server.api_keys import ApiKey, digest_of

_PROBES = ("/health",)  # whoever asks all day whether the server lives holds no key
_PAGES = {"metrics": ("/metrics",), "docs": ("/docs", "/openapi.json")}


class KeyRing:
    """Compares digests, so that neither a key's length nor its beginning shows in the time."""

    def __init__(self, keys: tuple[ApiKey, ...], open_pages: Iterable[str] = tuple(_PAGES)) -> None:
        """open_pages: of metrics and docs, what is open to who has no key."""
        self._keys = keys
        self._open = (*_PROBES, *(path for name in open_pages for path in _PAGES[name]))

    def check(self, path: str, authorization: str, x_api_key: str = "") -> ApiKey | None:
        """Whose request it is; None where no keys are set, and of what is open to all. RequestError
        with status 401 when keys are set and none of them was given.

        x_api_key: Anthropic's header, read where there is no Authorization.
        """
        if not self._keys or self._is_open(path):
            return None
        authorization = authorization or (f"Bearer {x_api_key}" if x_api_key else "")
        scheme, _, key = authorization.strip().partition(" ")
        given = digest_of(key.strip(), "latin-1")  # as WSGI hands bytes over
        known = [each for each in self._keys if hmac.compare_digest(given, each.digest)]
        if scheme.lower() != "bearer" or not known:
            found = "an unknown key" if authorization else "none"
            raise RequestError(
                f"the API key: found {found}; wanted the header Authorization: Bearer KEY, "
                "or X-Api-Key: KEY",
                code="invalid_api_key",
                status=401,
            )
        return known[0]

    def _is_open(self, path: str) -> bool:
        return (
            path == "/"
            or path.startswith("/page/")
            or any(path == each or path.startswith(f"{each}/") for each in self._open)
        )
