"""The packages that run TensorRT plans: found by name, never imported before they are needed.

Knows no engine. `tensorrt_rtx` is TensorRT-RTX; `tensorrt`, the data-centre package, has the same
classes but for JIT, runtime caches and its own CUDA graphs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from enginehouse.runtime.errors import EngineError

RTX_SMS = (75, 80, 86, 89, 120, 121)  # TensorRT-RTX 1.7's targets


class Package(NamedTuple):
    """modules: the meta package's name, and what its bindings are called without it."""

    title: str
    modules: tuple[str, ...]
    install: str


PACKAGES = {
    "tensorrt_rtx": Package(
        "TensorRT-RTX",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "pip install 'enginehouse[tensorrt]'",
    ),
    "tensorrt": Package("TensorRT", ("tensorrt",), "pip install tensorrt"),
}


def find_package(name: str) -> ModuleType | None:
    """The module of a package of PACKAGES, None when it is not installed."""
    for module in PACKAGES[name].modules:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    return None


class Words:
    """A logger that keeps the errors TensorRT speaks of; its calls only say that they failed.

    noise: what is in messages that explain nothing; listen: is given every other message.
    """

    def __init__(
        self,
        trt: Any,
        noise: re.Pattern[str] | None = None,
        listen: Callable[[str], None] | None = None,
    ) -> None:
        said: list[str] = []
        self._said = said
        serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in serious and not (noise and noise.search(message)):
                    said.append(" ".join(message.split()))
                elif listen is not None:
                    listen(message)

        self.logger = Logger()

    def first(self) -> str:
        """The first error since the last that `refused` told, on one line."""
        return self._said[0] if self._said else "it gave no reason"

    def refused(self, what: str) -> EngineError:
        """TensorRT did not do `what`: the error, with its first words since the last one."""
        reason = self.first()
        self._said.clear()
        return EngineError(f"TensorRT {what}: {reason}")
