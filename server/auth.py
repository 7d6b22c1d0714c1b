"""API keys, when the settings name any: `Authorization: Bearer KEY`.

Source: RFC 9110, section 11 (the scheme's name is case-insensitive), and RFC 6750.
"""

from __future__ import annotations

import hashlib
import hmac

from enginehouse.runtime.errors import RequestError

_OPEN = ("/health", "/metrics")  # for probes and scrapers, which hold no key


class KeyRing:
    """Compares digests, so that neither a key's length nor its beginning shows in the time."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, path: str, authorization: str) -> None:
        """RequestError with status 401 when keys are set and none of them was given."""
        if not self._digests or path.startswith(_OPEN):
            return
        scheme, _, key = authorization.strip().partition(" ")
        given = _digest(key.strip())
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            found = "an unknown key" if authorization else "none"
            raise RequestError(
                f"the API key: found {found}; wanted the header Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
