"""The whole conversation with a server: every case once, then a few answers for their shape.

Most cases are asked some at a time; all are told in their own order. Whatever a server answers is a
result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from enginehouse.regress.behaviour import (
    endings,
    grammars,
    prompts,
    refusals,
    sampling,
    scores,
    service,
    streams,
    tools,
)
from enginehouse.regress.behaviour.asker import QUESTION, Asker, Known, NotAsked, messages
from enginehouse.regress.behaviour.judging import TEMPLATE as PROMPTS
from enginehouse.regress.behaviour.judging import CaseResult, Conversation, Exchange
from enginehouse.regress.behaviour.shapes import shape_of
from enginehouse.regress.behaviour.tools import TOOLS
from enginehouse.regress.subject.api import CHAT, COMPLETIONS, MODELS, TEMPLATE, TOKENIZE, Api
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import ServerRefused, ServerUnreachable

Case = Callable[[Asker], None]
_AT_ONCE = 8
_FILES = (streams, endings, sampling, scores, grammars, tools, prompts, refusals, service)
CASES: dict[str, Case] = {name: case for file in _FILES for name, case in file.CASES.items()}
# Where answers must be equal, or what runs is counted: among others the engine rounds otherwise.
_EXACT = (streams, endings, sampling, prompts, service)
ALONE: dict[str, Case] = {name: case for file in _EXACT for name, case in file.ALONE.items()}

_SCORED = {"logprobs": True, "top_logprobs": 2}
_CALLED = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
_CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": messages(QUESTION),
    "system": [{"role": "system", "content": "Be brief."}, *messages(QUESTION)],
    "turns": [
        *messages(QUESTION),
        {"role": "assistant", "content": "The Severn."},
        *messages("And a bridge?"),
    ],
}


def converse(
    api: Api, known: Known, advance: Callable[[str], None] = lambda case: None
) -> Conversation:
    """Ask everything once; `advance` is called with each case's name as it ends, by any thread.

    Raises ServerUnreachable, and nothing for what a server answers.
    """
    asker = Asker(api, known)

    def ask(item: tuple[str, Case]) -> CaseResult:
        result = _result(*item, asker)
        advance(item[0])
        return result

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        results = list(pool.map(ask, CASES.items()))
    results += map(ask, ALONE.items())
    return Conversation(results, _exchanges(asker))


def _result(name: str, case: Case, asker: Asker) -> CaseResult:
    try:
        case(asker)
    except ServerUnreachable:
        raise
    except NotAsked as error:
        return CaseResult(name, True, f"not asked: {error}")
    except EnginehouseError as error:
        return CaseResult(name, False, str(error))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        said = f"an answer is not of the API's form: {type(error).__name__} {error}"
        return CaseResult(name, False, said[:300])
    return CaseResult(name, True, "")


def _exchanges(asker: Asker) -> list[Exchange]:
    """Fixed requests: all that decides an answer's shape is in them. Of one that is refused, the
    shape is its error's.
    """
    chat = {"messages": messages(QUESTION), "temperature": 0, "max_tokens": 4, **asker.at_least(4)}
    text = {"prompt": QUESTION, "temperature": 0, "max_tokens": 4, **asker.at_least(4)}
    called = {
        "messages": messages(QUESTION),
        "temperature": 0,
        "max_tokens": 200,
        **_CALLED,
        **asker.unthinking(),
    }
    usage = {"stream_options": {"include_usage": True}}
    asked: dict[str, Callable[[], list[Any]]] = {
        "chat": lambda: [asker.api.reply(CHAT, **chat).body],
        "chat_logprobs": lambda: [asker.api.reply(CHAT, **chat, **_SCORED).body],
        "chat_tools": lambda: [asker.api.reply(CHAT, **called).body],
        "chat_stream": lambda: _events(asker, CHAT, {**chat, **usage}),
        "chat_tools_stream": lambda: _events(asker, CHAT, {**called, **usage}),
        "completion": lambda: [asker.api.reply(COMPLETIONS, **text).body],
        "completion_logprobs": lambda: [asker.api.reply(COMPLETIONS, **text, logprobs=2).body],
        "completion_stream": lambda: _events(asker, COMPLETIONS, {**text, **usage}),
        "prompt_logprobs": lambda: [asker.api.reply(CHAT, **chat, prompt_logprobs=2).body],
        "tokenize": lambda: [asker.api.reply(TOKENIZE, prompt=QUESTION).body],
        "models": lambda: [asker.api.send("GET", MODELS).body],
        "error": lambda: [asker.api.reply(CHAT, **{**chat, "temperature": 3}).body],
    }
    found = [Exchange(name, shape_of(ask())) for name, ask in asked.items()]
    prompts = _prompts(asker)
    return [*found, Exchange(PROMPTS, prompts)] if prompts else found


def _events(asker: Asker, path: str, fields: dict[str, Any]) -> list[Any]:
    """What a stream's events say; of one that is refused, the refusal."""
    try:
        return [json.loads(line) for line in asker.api.lines(path, **fields) if line != "[DONE]"]
    except ServerUnreachable:
        raise
    except ServerRefused:
        return [asker.api.reply(path, **fields, stream=True).body]
    except (EnginehouseError, ValueError):
        return [None]  # no stream, or no JSON in it


def _prompts(asker: Asker) -> list[str]:
    """What the chat template makes of conversations, line by line; [] where it is not told."""
    lines = []
    for name, conversation in _CONVERSATIONS.items():
        body = asker.api.reply(TEMPLATE, messages=conversation).body
        prompt = body.get("prompt") if isinstance(body, dict) else None
        for number, line in enumerate(str(prompt or "").splitlines(keepends=True)):
            lines.append(f"{name} {number}: {json.dumps(line, ensure_ascii=False)}")
    return lines
