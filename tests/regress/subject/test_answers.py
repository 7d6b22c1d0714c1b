"""Answers of other shapes than expected: what can be read is, and the rest is one sentence."""

from __future__ import annotations

from typing import Any, cast

import pytest

from enginehouse.regress.subject.answers import answer_prompt
from enginehouse.regress.subject.api import TOKENIZE, Api
from enginehouse.regress.subject.scores import score_text
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import ServerRefused


class Said:
    """An Api that answers as it is told; with logprobs, when it has any."""

    def __init__(self, body: Any, takes_logprobs: bool = True) -> None:
        self.body, self.takes_logprobs, self.asked = body, takes_logprobs, list[dict[str, Any]]()

    def ask(self, path: str, **fields: Any) -> Any:
        if path == TOKENIZE:
            return {"tokens": [1, 2]}
        self.asked.append(fields)
        if "logprobs" in fields and not self.takes_logprobs:
            raise ServerRefused(400, b'{"error": {"message": "at most 5 logprobs"}}')
        return self.body


def api(said: Said) -> Api:
    return cast(Api, said)


def test_a_server_without_logprobs_answers_all_the_same() -> None:
    said = Said({"choices": [{"text": "b", "finish_reason": "stop"}]}, takes_logprobs=False)
    found = answer_prompt(api(said), "p", prompt="a", max_tokens=4)
    assert (found.text, found.tokens, found.prompt_ids) == ("b", [], [1, 2])
    assert ["logprobs" in fields for fields in said.asked] == [True, False]


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no"}},
        {"choices": []},
        {"choices": [{"index": 0}]},
        {"choices": [{"text": "b", "finish_reason": "stop", "logprobs": {"tokens": ["b"]}}]},
    ],
)
def test_no_answer_is_one_sentence(body: Any) -> None:
    with pytest.raises(EnginehouseError, match="of no shape known here"):
        answer_prompt(api(Said(body)), "p", prompt="a", max_tokens=4)


def test_a_token_without_a_number_is_left_out() -> None:
    content = [
        {"token": "a", "logprob": None, "top_logprobs": []},
        {"token": "b", "logprob": -0.5, "top_logprobs": None},
    ]
    choice = {
        "message": {"content": "ab"},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }
    found = answer_prompt(api(Said({"choices": [choice]})), "p", messages=[{}], max_tokens=4)
    assert (found.text, found.tokens, found.logprobs) == ("ab", ["b"], [-0.5])


@pytest.mark.parametrize(
    "told",
    [
        [None, {"9": {"logprob": -1.0}}],  # not the prompt's own token
        [None, {"2": {"logprob": None}}],
        [None, {"2": {}}],
        [None],
    ],
)
def test_scores_of_another_shape_are_one_sentence(told: Any) -> None:
    body = {"choices": [{"prompt_logprobs": told}]}
    with pytest.raises(EnginehouseError, match="prompt_logprobs of t"):
        score_text(api(Said(body)), "t", "prose", [1, 2])
    assert score_text(api(Said({"choices": [{}]})), "t", "prose", [1, 2]) is None
