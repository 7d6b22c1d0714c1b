"""How much may differ: `limits.yaml`, and a user's own over it. Judges nothing."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import yaml

from enginehouse.runtime.errors import EnginehouseError


class Kl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nats a position."""

    mean: float
    largest: float


class Turns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """clients: the loads. tokens: of an answer. prompt_lines: of a prompt, 25 tokens each. least,
    most: pairs of turns at a load; to_differ: before so many none is better or worse. seconds: of a
    load. starts: of each server, timed.
    """

    clients: list[int]
    tokens: int
    prompt_lines: int
    least: int
    most: int
    to_differ: int
    seconds: float
    starts: int


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """limits.yaml, key by key."""

    kl: dict[str, Kl]
    noise_times: float
    greedy_tie: dict[str, float]
    reference_kl: dict[str, float]
    reference_kl_times: float
    perplexity: dict[str, float]
    self_kl: dict[str, float]
    task_p: float
    level: float
    speed: dict[str, float]
    recorded_same: float
    recorded_margin: float
    turns: Turns

    def __post_init__(self) -> None:
        """ValueError for what no judge could keep."""
        for name, value in (("level", self.level), ("task_p", self.task_p)):
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value}; wanted more than 0 and less than 1")
        for name, value in {**self.speed, "recorded_same": self.recorded_same}.items():
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value}; wanted a share between 0 and 1, such as 0.05")
        turns = self.turns
        counts = [*turns.clients, turns.tokens, turns.prompt_lines, turns.least, turns.starts + 1]
        if not turns.clients or min(counts) < 1 or turns.most < turns.least or turns.tokens < 2:
            raise ValueError(
                f"turns: {turns}; wanted counts from 1, tokens from 2, most from least"
            )


def load_limits(path: Path | None = None) -> Limits:
    """The defaults, with what a file says in their place. Raises EnginehouseError."""
    text = resources.files("enginehouse.regress").joinpath("limits.yaml").read_text("utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    try:
        if path is not None:
            own = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            _check_keys(own, values)
            values = _merged(values, own)
        return msgspec.convert(values, Limits)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise EnginehouseError(f"{path}: {reason}; docs/regress.md lists the limits") from None


def _check_keys(own: Any, known: dict[str, Any]) -> None:
    """A key that nothing reads would be a limit that nobody keeps."""
    if not isinstance(own, dict):
        raise TypeError(f"found {type(own).__name__}; wanted keys and values")
    for key, value in own.items():
        if key not in known:
            raise TypeError(f"{key} is no limit; known here are {', '.join(known)}")
        if isinstance(known[key], dict):
            _check_keys(value, known[key])


def _merged(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _merged(value, own.get(key, {})) if isinstance(value, dict) else own.get(key, value)
        for key, value in values.items()
    }
