"""Environment -> ServerSettings, read once when a worker starts.

This file does not know HTTP, and of the engine directory only what its manifest says of the model.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.request import PoolingKind
from enginehouse.server.api_keys import ApiKey, read_keys
from enginehouse.server.formats.choose import TOOL_FORMATS
from enginehouse.server.replicas.prefix_router import ROUTERS
from enginehouse.server.text.reasoning import REASONING_FORMATS

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_OWN_PORT = re.compile(r"(?<=^http)(://.*):80$|(?<=^https)(://.*):443$")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a worker must know before its first request.

    price_input, price_output: dollars per million tokens, exact.
    keepalive_s: a silent stream sends an SSE comment this often.
    send_timeout_s: whose client takes nothing for so long is cut.
    counts_path: a file that the server's workers share; None: each counts by itself.
    responses_path: another one, of what the Responses API keeps, so many bytes for so long.
    files_dir: of uploaded files and batches, each of max_file_bytes, all of max_files_bytes.
    open_pages: what is told without a key.
    api_keys: none: every request is taken. cors_origins: whose web pages may read answers; ("*",):
    every page.
    tool_format, reasoning_format: how the model writes calls and reasoning; auto: as its chat
    template shows. pooling: of embeddings, where a request names none. metric_names: of other
    servers, told beside ours. log_prompts: whether the log has the text of prompts. page: whether
    browsers get the web page. otlp_endpoint: of the collector that traces are sent to.
    started_s: Unix time; None: now.
    """

    engine_dir: Path
    host_address: str
    model_name: str
    engine_digest: str | None = None  # the engine whose tokenizer is loaded; None: not checked
    price_input: Decimal = Decimal("0.35")
    price_output: Decimal = Decimal("0.40")
    max_body_bytes: int = 16 * 1024 * 1024
    keepalive_s: float = 15.0
    body_timeout_s: float = 60.0
    send_timeout_s: float = 60.0
    counts_path: Path | None = None
    responses_path: Path | None = None
    responses_max_bytes: int = 256 * 1024 * 1024
    responses_ttl_s: float = 30 * 24 * 3600.0
    files_dir: Path | None = None
    max_file_bytes: int = 512 * 1024 * 1024
    max_files_bytes: int = 4 * 1024 * 1024 * 1024
    api_keys: tuple[ApiKey, ...] = ()
    open_pages: tuple[str, ...] = ("metrics", "docs")
    cors_origins: tuple[str, ...] = ()
    tool_format: str = "auto"
    reasoning_format: str = "auto"
    pooling: str = "last"
    metric_names: tuple[str, ...] = ()
    log_prompts: bool = False
    page: bool = True
    otlp_endpoint: str | None = None
    started_s: float | None = None
    host_key_path: Path | None = None
    is_open: bool = False
    replicas_path: Path | None = None
    routing: str = "prefix"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> ServerSettings:
        """Read ENGINEHOUSE_*; EnginehouseError names the variable that is missing or wrong."""
        engine_dir = Path(_required(env, "ENGINEHOUSE_ENGINE", "an engine directory"))
        model = read_model(engine_dir)
        given: dict[str, Any] = {**model.prices, **model.formats}
        # a variable that is absent or empty leaves the engine's value, or the field's default
        for variable, (field, parse) in _OPTIONAL.items():
            if text := env.get(variable, "").strip():
                given[field] = parse(variable, text)
        return cls(
            engine_dir=engine_dir,
            host_address=_host_address(env),
            model_name=env.get("ENGINEHOUSE_MODEL_NAME", "").strip() or model.name,
            engine_digest=model.digest,
            api_keys=read_keys(env),
            counts_path=shared_file(env, "counts.sqlite"),
            responses_path=_responses_path(env),
            files_dir=_files_dir(env),
            started_s=_started_s(env),
            host_key_path=_path(env, "ENGINEHOUSE_HOST_KEY_FILE"),
            is_open=env.get("ENGINEHOUSE_OPEN_HOST") == "1",
            replicas_path=_path(env, "ENGINEHOUSE_REPLICAS_FILE"),
            **given,
        )


def shared_file(env: Mapping[str, str], name: str) -> Path | None:
    """In the folder that gunicorn's master gives its server, where there is one."""
    folder = env.get("ENGINEHOUSE_RUN_DIR", "")
    return Path(folder) / name if folder else None


def _path(env: Mapping[str, str], variable: str) -> Path | None:
    text = env.get(variable, "").strip()
    return Path(text) if text else None


def _files_dir(env: Mapping[str, str]) -> Path | None:
    return _path(env, "ENGINEHOUSE_FILES_DIR") or shared_file(env, "files")


def _responses_path(env: Mapping[str, str]) -> Path | None:
    """What it holds outlives the server where the operator names the file."""
    if text := env.get("ENGINEHOUSE_RESPONSES_FILE", "").strip():
        path = Path(text)
        if not path.parent.is_dir():
            raise EnginehouseError(
                f"ENGINEHOUSE_RESPONSES_FILE={text!r}: {path.parent} is no folder; make it, or "
                "name a file in one that is there"
            )
        return path
    return shared_file(env, "responses.sqlite")


def _started_s(env: Mapping[str, str]) -> float | None:
    """As gunicorn's master tells its workers."""
    text = env.get("ENGINEHOUSE_STARTED_S", "")
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None


class ModelFacts(NamedTuple):
    """What the engine's manifest says of its model; prices and formats hold those it names."""

    name: str
    prices: dict[str, Decimal]
    digest: str | None
    formats: dict[str, str]


def read_model(engine_dir: Path) -> ModelFacts:
    """The manifest's `model`, and of its `choices` those that are the server's."""
    path = engine_dir / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        model, digest = manifest["model"], manifest.get("digest")
        name = model["name"]
        prices = {
            key: _price(f"{path}: {key}", str(model[key]))
            for key in ("price_input", "price_output")
            if model.get(key) is not None
        }
        choices = manifest.get("choices") or {}
        formats = {
            key: parse(f"{path}: {key}", choices[key])
            for key, parse in (("tool_format", _tool_format), ("reasoning_format", _reasoning))
            if choices.get(key) is not None
        }
    except OSError as error:
        raise EnginehouseError(
            f"{path} cannot be read ({error.strerror}); wanted an engine directory, "
            "as enginehouse-build makes it"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        name = None
    if not isinstance(name, str) or not name:
        raise EnginehouseError(
            f"{path} names no model; build the engine again or set ENGINEHOUSE_MODEL_NAME"
        )
    return ModelFacts(name, prices, digest, formats)


def _required(env: Mapping[str, str], variable: str, wanted: str) -> str:
    text = env.get(variable, "").strip()
    if not text:
        raise EnginehouseError(f"{variable} is not set; wanted {wanted}")
    return text


def _price(variable: str, text: str) -> Decimal:
    try:
        price = Decimal(text)
    except InvalidOperation:
        price = Decimal(-1)
    if not price.is_finite() or not 0 <= price <= 1_000_000:
        raise EnginehouseError(
            f"{variable}={text!r} is not a price; wanted dollars per million tokens, like 0.35"
        )
    return price


def _num_bytes(variable: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:19]) <= 2**40:
        raise EnginehouseError(
            f"{variable}={text!r} is not a size; wanted a positive number of bytes, like 16777216"
        )
    return int(text)


def _seconds(variable: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.01 <= seconds <= 86400:
        raise EnginehouseError(
            f"{variable}={text!r} is not a duration; wanted seconds from 0.01 to 86400"
        )
    return seconds


def _tool_format(variable: str, text: str) -> str:
    return _one_of(variable, text, TOOL_FORMATS)


def _reasoning(variable: str, text: str) -> str:
    return _one_of(variable, text, REASONING_FORMATS)


def _routing(variable: str, text: str) -> str:
    return _one_of(variable, text, tuple(ROUTERS))


def _pooling(variable: str, text: str) -> str:
    return _one_of(variable, text, tuple(kind.value for kind in PoolingKind))


def _origins(variable: str, text: str) -> tuple[str, ...]:
    """Between commas, in the form that browsers send: lower case, without a scheme's own port."""
    origins = [origin.strip().lower() for origin in text.split(",") if origin.strip()]
    for origin in origins if origins != ["*"] else ():
        if not _ORIGIN.fullmatch(origin):
            raise EnginehouseError(
                f"{variable}: {origin!r} is not an origin; wanted a scheme and a host without a "
                "path, like https://chat.example.com or http://localhost:3000, or * alone for all"
            )
    return tuple(_OWN_PORT.sub(r"\1\2", origin) for origin in origins)


def _open_pages(variable: str, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if names != ("none",) and not {*names} <= {"metrics", "docs"}:
        raise EnginehouseError(f"{variable}={text!r}; wanted metrics, docs, both, or none")
    return () if names == ("none",) else names


def _host_address(env: Mapping[str, str]) -> str:
    """Who reaches a host's socket runs what it likes on its engine: TCP has nobody to ask who."""
    address = _required(env, "ENGINEHOUSE_HOST_ADDRESS", "the engine host's ZeroMQ address")
    is_closed = bool(env.get("ENGINEHOUSE_HOST_KEY_FILE", "").strip())
    is_meant = env.get("ENGINEHOUSE_OPEN_HOST") == "1"
    if not (address.startswith("ipc://") or is_closed or is_meant):
        raise EnginehouseError(
            f"ENGINEHOUSE_HOST_ADDRESS={address!r} is open to whoever reaches it; wanted "
            "ipc://PATH in a private folder, ENGINEHOUSE_HOST_KEY_FILE, or ENGINEHOUSE_OPEN_HOST=1 "
            "where the network lets nobody in"
        )
    return address


def _metric_names(variable: str, text: str) -> tuple[str, ...]:
    names = (name.strip() for name in text.split(","))
    return tuple(_one_of(variable, name, ("vllm", "trtllm")) for name in names if name)


def _otlp_endpoint(variable: str, text: str) -> str:
    try:
        url = urlsplit(text)
        legal = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        legal = False
    if not legal or url.query or url.fragment:
        raise EnginehouseError(
            f"{variable}={text!r} is not an endpoint; wanted a collector's URL for OTLP over HTTP, "
            "like http://localhost:4318"
        )
    if any(find_spec(name) is None for name in ("opentelemetry", "opentelemetry.sdk")):
        raise EnginehouseError(
            f"{variable} is set and OpenTelemetry is not installed; install enginehouse[otel], or "
            "leave the variable out"
        )
    return text


def _switch(variable: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise EnginehouseError(f"{variable}={text!r}; wanted 0 or 1")
    return text == "1"


def _one_of(variable: str, text: str, known: tuple[str, ...]) -> str:
    if text not in known:
        raise EnginehouseError(
            f"{variable}={text!r} is not known; choose one of {', '.join(known)}"
        )
    return text


_OPTIONAL: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "ENGINEHOUSE_PRICE_INPUT": ("price_input", _price),
    "ENGINEHOUSE_PRICE_OUTPUT": ("price_output", _price),
    "ENGINEHOUSE_MAX_BODY_BYTES": ("max_body_bytes", _num_bytes),
    "ENGINEHOUSE_KEEPALIVE_S": ("keepalive_s", _seconds),
    "ENGINEHOUSE_BODY_TIMEOUT_S": ("body_timeout_s", _seconds),
    "ENGINEHOUSE_SEND_TIMEOUT_S": ("send_timeout_s", _seconds),
    "ENGINEHOUSE_RESPONSES_MAX_BYTES": ("responses_max_bytes", _num_bytes),
    "ENGINEHOUSE_RESPONSES_TTL_S": ("responses_ttl_s", _seconds),
    "ENGINEHOUSE_MAX_FILE_BYTES": ("max_file_bytes", _num_bytes),
    "ENGINEHOUSE_MAX_FILES_BYTES": ("max_files_bytes", _num_bytes),
    "ENGINEHOUSE_CORS_ORIGINS": ("cors_origins", _origins),
    "ENGINEHOUSE_OPEN_PAGES": ("open_pages", _open_pages),
    "ENGINEHOUSE_METRIC_NAMES": ("metric_names", _metric_names),
    "ENGINEHOUSE_OTLP_ENDPOINT": ("otlp_endpoint", _otlp_endpoint),
    "ENGINEHOUSE_LOG_PROMPTS": ("log_prompts", _switch),
    "ENGINEHOUSE_PAGE": ("page", _switch),
    "ENGINEHOUSE_TOOL_FORMAT": ("tool_format", _tool_format),
    "ENGINEHOUSE_REASONING_FORMAT": ("reasoning_format", _reasoning),
    "ENGINEHOUSE_POOLING": ("pooling", _pooling),
    "ENGINEHOUSE_ROUTING": ("routing", _routing),
}
