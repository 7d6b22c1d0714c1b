"""What every check asks with: one model of one server, by JSON. Knows no field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import Connection, ServerRefused

CHAT, COMPLETIONS, TOKENIZE = "/chat/completions", "/completions", "/tokenize"


class Reply(NamedTuple):
    """Of any status. body: what the JSON says; None where it is none."""

    status: int
    body: Any


class Api:
    """Paths are those below /v1, such as CHAT; `model` is added to every body."""

    def __init__(self, connection: Connection, model: str | None = None) -> None:
        self.connection = connection
        self.model = model or connection.first_model()

    def reply(self, path: str, **fields: Any) -> Reply:
        """Ask, whatever the status. Raises ServerUnreachable."""
        try:
            content, status = self.connection.fetch("POST", path, self._body(fields)).content, 200
        except ServerRefused as error:
            content, status = error.content, error.status
        try:
            return Reply(status, json.loads(content))
        except ValueError:
            return Reply(status, None)

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """Ask for what is to be granted. Raises ServerRefused, and EnginehouseError for no JSON."""
        content = self.connection.fetch("POST", path, self._body(fields)).content
        try:
            answer = json.loads(content)
        except ValueError:
            raise EnginehouseError(f"{path} answers what is no JSON: {content[:80]!r}") from None
        if not isinstance(answer, dict):
            raise EnginehouseError(f"{path} answers {type(answer).__name__}; wanted an object")
        return answer

    def lines(self, path: str, **fields: Any) -> Iterator[str]:
        """The data of a stream's events, `[DONE]` included, as they come. Closing the iterator
        closes the connection. Raises ServerRefused and ServerUnreachable.
        """
        with self.connection.stream(path, self._body({**fields, "stream": True})) as lines:
            for line in lines:
                if line.startswith("data: "):
                    yield line.removeprefix("data: ")

    def _body(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, **fields}
