"""Environment -> the keys that open the API: their names, digests and limits. No key is kept.

    ENGINEHOUSE_API_KEYS        between commas
    ENGINEHOUSE_API_KEYS_FILE   a file with one on each line; what follows a # is not read

One is `[NAME] KEY [rpm=60] [tpm=100000] [concurrent=4]`, its KEY as it is sent or `sha256:` and the
hexadecimal digest of that. Knows no request.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from enginehouse.runtime.errors import EnginehouseError

_LIMIT = re.compile(r"(rpm|tpm|concurrent)=([1-9][0-9]{0,11})")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class KeyLimits(NamedTuple):
    """None: as many as there are. rpm, tpm: requests, and tokens of prompts and answers, a minute.
    concurrent: requests at once.
    """

    rpm: int | None = None
    tpm: int | None = None
    concurrent: int | None = None


class ApiKey(NamedTuple):
    """name: for logs; of a key without one, the beginning of its digest, which is SHA-256's."""

    name: str
    digest: bytes
    limits: KeyLimits = KeyLimits()


def make_key(text: str, limits: KeyLimits = KeyLimits()) -> ApiKey:  # noqa: B008
    """Of one key as it is sent."""
    return _key_of(None, digest_of(text), limits)


def digest_of(key: str, encoding: str = "utf-8") -> bytes:
    return hashlib.sha256(key.encode(encoding, errors="replace")).digest()


def read_keys(env: Mapping[str, str]) -> tuple[ApiKey, ...]:
    """Raises EnginehouseError, which names the variable and shows no key."""
    limits = KeyLimits(
        *(_limit(env, f"ENGINEHOUSE_KEY_{name.upper()}") for name in KeyLimits._fields)
    )
    listed = [
        ("ENGINEHOUSE_API_KEYS", text) for text in env.get("ENGINEHOUSE_API_KEYS", "").split(",")
    ]
    if name := env.get("ENGINEHOUSE_API_KEYS_FILE", "").strip():
        listed += _lines(name)
    return tuple(_parse(where, text, limits) for where, text in listed if text.strip())


def _lines(name: str) -> list[tuple[str, str]]:
    try:
        text = Path(name).read_text(encoding="utf-8-sig")  # some editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise EnginehouseError(
            f"ENGINEHOUSE_API_KEYS_FILE={name!r} cannot be read ({error}); wanted a text file "
            "with a key on each line"
        ) from None
    lines = [re.split(r"(?:^|\s)#", line)[0].strip() for line in text.splitlines()]
    if not any(lines):
        raise EnginehouseError(
            f"ENGINEHOUSE_API_KEYS_FILE={name!r} holds no key; wanted one on each line"
        )
    return [(f"{name}, line {number}", line) for number, line in enumerate(lines, 1)]


def _parse(where: str, text: str, limits: KeyLimits) -> ApiKey:
    words, given = [], {}
    for word in text.split():
        limit = _LIMIT.fullmatch(word)
        if limit is None:
            words.append(word)
        else:
            given[limit[1]] = int(limit[2])
    *names, key = words or [""]
    if not key or len(names) > 1 or not all(map(_NAME.fullmatch, names)):
        raise EnginehouseError(
            f"{where}: found {len(words)} words beside limits; wanted a key, or a name of letters, "
            "digits and ._@- before it, then rpm=, tpm= or concurrent= and a number"
        )
    hashed = _HASHED.fullmatch(key)
    digest = bytes.fromhex(hashed[1]) if hashed else digest_of(key)
    return _key_of(names[0] if names else None, digest, limits._replace(**given))


def _key_of(name: str | None, digest: bytes, limits: KeyLimits) -> ApiKey:
    return ApiKey(name or f"key-{digest.hex()[:8]}", digest, limits)


def _limit(env: Mapping[str, str], variable: str) -> int | None:
    text = env.get(variable, "").strip()
    if text and not re.fullmatch("[1-9][0-9]{0,11}", text):
        raise EnginehouseError(f"{variable}={text!r}; wanted a number from 1")
    return int(text) if text else None
