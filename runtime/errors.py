"""Every error that a user, a file or a request can cause.

    EnginehouseError
    ├── PlanError            a build choice that cannot be carried out
    ├── CheckpointError      a source checkpoint that cannot be read
    ├── QuantizationError    a tensor that cannot be quantised as asked
    ├── EngineError          an engine directory that cannot be trusted or run
    ├── HostUnavailable      the engine host is starting, gone or draining
    └── RequestError         a request that is refused: param, code, status

A message names the thing, the value found, the value wanted, and what to do.
"""

from __future__ import annotations

import re
import tempfile
import traceback

# Line ends, what commands a terminal or turns a text's direction, half surrogates.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MOST_CHARS = 2000


def one_line(text: str, most: int = _MOST_CHARS) -> str:
    """A message as it may be shown, whatever of a file or a request it quotes: of a long one the
    beginning and the end, which says what to do.
    """
    text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[7 - most // 2 :]}"


class EnginehouseError(Exception):
    """The root: catching it catches everything this project raises on purpose."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class PlanError(EnginehouseError):
    """A build choice is illegal or contradicts another one."""


class CheckpointError(EnginehouseError):
    """A source checkpoint is missing, damaged, or of a kind that cannot be read."""


class QuantizationError(EnginehouseError):
    """A tensor's shape or values do not allow the quantisation that was asked for."""


class EngineError(EnginehouseError):
    """An engine directory is incomplete, damaged, or unfit for this machine."""


class HostUnavailable(EnginehouseError):
    """The engine host cannot take or finish requests right now."""


class RequestError(EnginehouseError):
    """A request is refused.

    param: the path of the field at fault (`messages[0].content`), None when it is no field.
    code: a short machine-readable word, as OpenAI's errors carry it.
    status: the HTTP status to answer with.
    retry_after_s: when it may be sent again, where that is known.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.retry_after_s = retry_after_s


def unexpected_fault(error: Exception, prog: str) -> str:
    """One sentence on an error that nobody thought of, and the place of its traceback. prog: the
    program's name, with which the file that holds it begins.
    """
    what = f"stopped by an unexpected {type(error).__name__}"
    what += f" ({' '.join(str(error).split())[:200]})" if str(error).strip() else ""
    try:
        descriptor, log = tempfile.mkstemp(prefix=f"{prog}-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            traceback.print_exception(error, file=file)
    except OSError as failure:
        return f"{what}, whose traceback could not be kept: {failure.strerror}"
    return f"{what}, which is a fault of enginehouse: report it with its traceback, {log}"
