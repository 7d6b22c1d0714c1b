"""A refusal in an endpoint's own words: what chat calls a field, it may call otherwise.

What all endpoints share refuses by chat's names. Knows no endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from enginehouse.runtime.errors import RequestError

Names = Sequence[tuple[str, str]]  # a pattern of the path's beginning, and what stands for it


@contextmanager
def own_names(names: Names) -> Iterator[None]:
    """Raises what is raised within, with the field's path as the endpoint has it: as it came, where
    nobody knows it.
    """
    try:
        yield
    except RequestError as error:
        if error.param is None or error.code == "unknown_parameter":
            raise
        own = own_name(error.param, names)
        if own == error.param:
            raise
        words = error.message.removeprefix(error.param)
        message = own + words if len(words) < len(error.message) else error.message
        raise RequestError(
            message,
            param=own,
            code=error.code,
            status=error.status,
            retry_after_s=error.retry_after_s,
        ) from None


def own_name(path: str, names: Names) -> str:
    """By the first pattern that is there."""
    for pattern, own in names:
        named, count = re.subn(f"^{pattern}", own, path)
        if count:
            return named
    return path
