"""API keys, when the settings name any: `Authorization: Bearer KEY`, or `X-Api-Key: KEY`.

Source: RFC 9110, section 11 (the scheme's name is case-insensitive), and RFC 6750.
"""

from __future__ import annotations

import hashlib
import hmac

from enginehouse.runtime.errors import RequestError

# For probes and scrapers, which hold no key, and for who reads how to ask with one.
_OPEN = ("/health", "/metrics", "/docs", "/openapi.json")


class KeyRing:
    """Compares digests, so that neither a key's length nor its beginning shows in the time."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, path: str, authorization: str, x_api_key: str = "") -> None:
        """RequestError with status 401 when keys are set and none of them was given.

        x_api_key: Anthropic's header, read where there is no Authorization.
        """
        if not self._digests or _is_open(path):
            return
        authorization = authorization or (f"Bearer {x_api_key}" if x_api_key else "")
        scheme, _, key = authorization.strip().partition(" ")
        given = _digest(key.strip(), "latin-1")  # as WSGI hands bytes over
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            found = "an unknown key" if authorization else "none"
            raise RequestError(
                f"the API key: found {found}; wanted the header Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
            )


def _is_open(path: str) -> bool:
    return path == "/" or any(path == name or path.startswith(f"{name}/") for name in _OPEN)


def _digest(key: str, encoding: str = "utf-8") -> bytes:
    return hashlib.sha256(key.encode(encoding, errors="replace")).digest()
