"""What every check asks with: one model of one server, by JSON. Knows no field."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import Connection

CHAT, COMPLETIONS, MODELS = "/chat/completions", "/completions", "/models"
TOKENIZE, DETOKENIZE, TEMPLATE = "/tokenize", "/detokenize", "/apply-template"
METRICS = "/metrics"
_BELOW_THE_API = (CHAT, COMPLETIONS, MODELS)  # vLLM has all others at its root, and so have we


class Reply(NamedTuple):
    """Of any status. body: what the JSON says; None where it is none. headers: in lower case."""

    status: int
    body: Any
    headers: Mapping[str, str] = {}


class Api:
    """Paths are those below /v1, such as CHAT, or at the server's root, such as TOKENIZE; `model`
    is added to every body that does not name one.
    """

    def __init__(self, connection: Connection, model: str | None = None) -> None:
        self.connection = connection
        self.root = connection.at(re.sub("/v1(/.*)?$", "", connection.address.base))
        self.model = model or connection.first_model()

    def reply(self, path: str, **fields: Any) -> Reply:
        """Ask, whatever the status. Raises ServerUnreachable."""
        return self.send("POST", path, json.dumps(self._body(fields)).encode())

    def send(self, method: str, path: str, content: bytes | None = None) -> Reply:
        """The same of any method, and of a body that may be no JSON at all."""
        told = self._at(path).tell(method, path, content)
        try:
            return Reply(told.status, json.loads(told.content), told.headers)
        except ValueError:
            return Reply(told.status, None, told.headers)

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """Ask for what is to be granted. Raises ServerRefused, and EnginehouseError for no JSON."""
        content = self._at(path).fetch("POST", path, self._body(fields)).content
        try:
            answer = json.loads(content)
        except ValueError:
            raise EnginehouseError(f"{path} answers what is no JSON: {content[:80]!r}") from None
        if not isinstance(answer, dict):
            raise EnginehouseError(f"{path} answers {type(answer).__name__}; wanted an object")
        return answer

    def lines(self, path: str, **fields: Any) -> Generator[str, None, None]:
        """The data of a stream's events, `[DONE]` included, as they come. Closing the iterator
        closes the connection. Raises ServerRefused and ServerUnreachable.
        """
        body = self._body({**fields, "stream": True})
        with self._at(path).stream(path, body) as lines:
            for line in lines:
                if line.startswith("data: "):
                    yield line.removeprefix("data: ")

    def text(self, path: str) -> str:
        """A page that is no JSON. Raises ServerRefused."""
        return self._at(path).fetch("GET", path).content.decode(errors="replace")

    def _at(self, path: str) -> Connection:
        return self.connection if path.startswith(_BELOW_THE_API) else self.root

    def _body(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, **fields}
