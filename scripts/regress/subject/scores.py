"""A text -> the log probabilities of its tokens: teacher forcing over HTTP, by vLLM's
`prompt_logprobs`. Judges nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec

from enginehouse.regress.subject.api import COMPLETIONS, TOKENIZE, Api
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import ServerUnreachable

NUM_TOP = 8
_DIGITS = 6  # of a log probability: a baseline is kept in git


class Score(msgspec.Struct, frozen=True):
    """A text's log probabilities, nats. chosen: of each token but the first, given those before it.
    top: of the likeliest, by id, at the same positions.
    """

    name: str
    kind: str
    ids: list[int]
    chosen: list[float]
    top: list[dict[int, float]]


def tokenize(api: Api, **what: Any) -> list[int] | None:
    """Ids of a prompt or of messages; None where the server has no /tokenize that tells them."""
    try:
        tokens = api.ask(TOKENIZE, **what).get("tokens")
    except ServerUnreachable:
        raise
    except EnginehouseError:  # refused, or no JSON
        return None
    told = isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)
    return tokens if tokens and told else None  # llama.cpp tells none of a prompt by this name


def score_text(api: Api, name: str, kind: str, ids: list[int]) -> Score | None:
    """None where the server does not tell a prompt's log probabilities. Raises ServerRefused when
    the prompt is too long for it.
    """
    answer = api.ask(COMPLETIONS, prompt=ids, max_tokens=1, temperature=0, prompt_logprobs=NUM_TOP)
    try:
        return _score(answer, name, kind, ids)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise EnginehouseError(
            f"prompt_logprobs of {name} are of no shape known here ({reason})"
        ) from None


def _score(answer: dict[str, Any], name: str, kind: str, ids: list[int]) -> Score | None:
    told = answer["choices"][0].get("prompt_logprobs") or answer.get("prompt_logprobs")
    if not told:
        return None
    if len(told) != len(ids):
        raise EnginehouseError(
            f"prompt_logprobs of {name} has {len(told)} entries for {len(ids)} tokens"
        )
    chosen, top = [], []
    for token, entry in zip(ids[1:], told[1:], strict=True):
        by_id = {int(key): round(float(value["logprob"]), _DIGITS) for key, value in entry.items()}
        chosen.append(by_id[token])
        likeliest = sorted(by_id, key=lambda key: (-by_id[key], key))[:NUM_TOP]
        top.append({key: by_id[key] for key in likeliest})
    return Score(name, kind, ids, chosen, top)
