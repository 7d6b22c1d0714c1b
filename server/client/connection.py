"""One server, from outside: where it is, plain requests, and streams line by line.

Each request has a connection of its own: closing it is how a client says that it wants no more,
and the server cancels. This file does not know what a request asks or what a chunk holds.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from enginehouse.runtime.errors import EnginehouseError

CHAT = "/chat/completions"
MAX_BYTES = 1 << 20  # of a line, and of a plain answer


class ServerUnreachable(EnginehouseError):
    """No answer, or the connection ended within one."""


class ServerRefused(EnginehouseError):
    """The server answers, and will not do it. The message is the server's."""

    def __init__(self, status: int, content: bytes) -> None:
        super().__init__(f"HTTP {status}: {_error_message(content)}")
        self.status = status
        self.content = content


class Address(NamedTuple):
    """base: the path that every call of the API begins with, such as /v1."""

    secure: bool
    host: str
    port: int
    base: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine for certain: of a name, where it leads is not known."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class Answer(NamedTuple):
    """A plain request's answer; ignored_fields are those the server says it did not know."""

    content: bytes
    ignored_fields: str


class Told(NamedTuple):
    """An answer of any status. headers: by their names in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


def is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def parse_address(url: str) -> Address:
    """http://host:port, with or without the path of the API. Raises EnginehouseError for others."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not is_address(url) or not host:
        raise EnginehouseError(
            f"{url} is no address of a server; wanted one like http://127.0.0.1:8000"
        )
    secure = parts.scheme == "https"
    return Address(secure, host, port or (443 if secure else 80), parts.path.rstrip("/") or "/v1")


class Connection:
    """Requests to one server.

    timeout_s: asked before each wait, how long it may be; it may raise TimeoutError instead.
    max_bytes: of a line, and of a plain answer, that are read.
    """

    def __init__(
        self,
        address: Address,
        timeout_s: Callable[[], float],
        api_key: str | None = None,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._api_key = api_key
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def at(self, base: str) -> Connection:
        """The same server, where every path begins otherwise; "" is its root."""
        address = self.address._replace(base=base)
        return Connection(address, self._timeout_s, self._api_key, max_bytes=self._max_bytes)

    def fetch(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        """A plain request. Raises ServerRefused unless the status is 200."""
        with self._granted(method, path, body) as response:
            return Answer(self._read(response), response.getheader("X-Ignored-Fields", ""))

    def tell(self, method: str, path: str, content: bytes | None = None) -> Told:
        """What is answered to that content, said to be JSON, whatever the status."""
        with self._response(method, path, content) as response:
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Told(response.status, headers, self._read(response))

    def first_model(self) -> str:
        """The model the server names first."""
        try:
            return str(json.loads(self.fetch("GET", "/models").content)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise EnginehouseError(
                f"{self.address}{self.address.base}/models names no model; give --model"
            ) from None

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Generator[Iterator[str], None, None]:
        """The lines of an answer that is a stream, without comments and empty ones.

        Leaving the block closes the connection. Raises ServerRefused, and ServerUnreachable from
        the lines too.
        """
        with self._granted("POST", path, body) as response:
            kind = response.getheader("Content-Type", "")
            if not kind.startswith("text/event-stream"):
                raise EnginehouseError(f"Content-Type is {kind!r}; wanted text/event-stream")
            yield self._lines(response)

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[str]:
        while True:
            with self._loss_is_told():
                self._timeout_s()
                line = response.readline(self._max_bytes)
            if not line:
                return
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            if text and not text.startswith(":"):
                yield text

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        with self._loss_is_told():
            return response.read(self._max_bytes)

    @contextmanager
    def _granted(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> Generator[http.client.HTTPResponse, None, None]:
        content = json.dumps(body).encode() if body else None
        with self._response(method, path, content) as response:
            if response.status != 200:
                raise ServerRefused(response.status, self._read(response))
            yield response

    @contextmanager
    def _response(
        self, method: str, path: str, content: bytes | None
    ) -> Generator[http.client.HTTPResponse, None, None]:
        kind = {} if content is None else {"Content-Type": "application/json"}
        with closing(self._connect()) as connection:
            with self._loss_is_told():
                path = self.address.base + path
                connection.request(method, path, content, {**self._headers, **kind})
                response = connection.getresponse()
            with closing(response):
                yield response

    @contextmanager
    def _loss_is_told(self) -> Generator[None, None, None]:
        """Around what waits for the network, and nothing else: errors of others are theirs."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"{self.address} was lost: {_reason(error)}") from None

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        with self._loss_is_told():
            connection = kind(self.address.host, self.address.port, timeout=self._timeout_s())
        try:
            connection.connect()
        except OSError as error:
            raise ServerUnreachable(
                f"{self.address} does not answer ({_reason(error)}); is it running?"
            ) from None
        return connection


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _error_message(content: bytes) -> str:
    """What an error's body says, in OpenAI's shape or any other."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:300].decode("utf-8", errors="replace").strip() or "no reason is given"
