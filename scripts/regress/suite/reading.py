"""A suite's file: `default.yaml` beside this one, or a user's own of the same keys, all optional:

    texts:    [{name, kind, text | ledger | repeat}]     scored token by token
    prompts:  [{name, prompt | messages, tools, max_tokens}]     answered at temperature 0
    tasks:    [{kind, ask: [[question, answer], ...]}]     solved or not

Knows no server.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from enginehouse.regress.suite.long_texts import ledger, repeated
from enginehouse.regress.suite.suite import MAX_TOKENS, Prompt, Suite, Task, Text
from enginehouse.runtime.errors import EnginehouseError

_MOST_CHARS = 16 << 20  # of a text
Times = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class _Text(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    kind: str = "text"
    text: str | None = None
    ledger: Times | None = None  # lines of a long text that is made here
    repeat: Times | None = None  # how often `text` stands one after the other


class _Prompt(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    ledger: Times | None = None  # lines of a long text before the prompt, or the last message
    max_tokens: int = MAX_TOKENS


class _Tasks(msgspec.Struct, forbid_unknown_fields=True):
    kind: str
    ask: list[tuple[str, str]]
    shown: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3  # questions with answers before each one


class _File(msgspec.Struct, forbid_unknown_fields=True):
    name: str = "own"
    texts: list[_Text] = []
    prompts: list[_Prompt] = []
    tasks: list[_Tasks] = []


def load_suite(path: Path | None = None) -> Suite:
    """A suite's file, or the default. Raises EnginehouseError, with the place that is wrong."""
    where = path or Path("default.yaml")
    try:
        if path is None:
            text = resources.files("enginehouse.regress.suite").joinpath("default.yaml").read_text()
        else:
            text = path.read_text(encoding="utf-8")
        file = msgspec.convert(yaml.safe_load(text) or {}, _File)
        suite = Suite(
            file.name,
            [_text(given) for given in file.texts],
            [_prompt(given) for given in file.prompts],
            [task for given in file.tasks for task in _tasks(given)],
        )
        for kind, names in (
            ("texts", suite.texts),
            ("prompts", suite.prompts),
            ("tasks", suite.tasks),
        ):
            twice = {item.name for item in names if [i.name for i in names].count(item.name) > 1}
            if twice:
                raise ValueError(f"{kind} have {min(twice)!r} twice; wanted a name for each")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise EnginehouseError(
            f"{where} is no suite: {reason}; docs/regress.md shows one"
        ) from None
    return suite


def _text(given: _Text) -> Text:
    if (given.text is None) == (given.ledger is None):
        raise ValueError(f"text {given.name!r} has to have either `text` or `ledger`")
    text = ledger(given.ledger) if given.ledger is not None else given.text or ""
    if not text.strip():
        raise ValueError(f"text {given.name!r} is empty")
    times = given.repeat or 1
    if len(text) * times > _MOST_CHARS:
        raise ValueError(f"text {given.name!r} has more than {_MOST_CHARS} characters")
    return Text(given.name, given.kind, repeated(text, times))


def _prompt(given: _Prompt) -> Prompt:
    if (given.prompt is None) == (given.messages is None):
        raise ValueError(f"prompt {given.name!r} has to have either `prompt` or `messages`")
    before = ledger(given.ledger) + "\n" if given.ledger is not None else ""
    prompt = None if given.prompt is None else before + given.prompt
    messages = given.messages
    if before and messages:
        messages = json.loads(json.dumps(messages))
        messages[-1]["content"] = before + str(messages[-1].get("content") or "")
    return Prompt(given.name, prompt, messages, given.tools, given.max_tokens)


def _tasks(given: _Tasks) -> list[Task]:
    """Each question after some others of its kind with their answers, its neighbours."""
    asked = given.ask
    tasks = []
    for index, (question, answer) in enumerate(asked):
        shown = [
            asked[(index + 1 + i) % len(asked)] for i in range(min(given.shown, len(asked) - 1))
        ]
        lines = [f"{q} {a}" for q, a in shown] + [question]
        tasks.append(Task(f"{given.kind}.{index}", given.kind, "\n".join(lines), answer))
    return tasks
