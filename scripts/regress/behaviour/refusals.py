"""Cases: what is not to be granted is refused: its status, one form, the field at fault."""

from __future__ import annotations

from typing import Any

from enginehouse.regress.behaviour.asker import QUESTION, Asker, messages, want, want_equal
from enginehouse.regress.subject.api import CHAT, COMPLETIONS, MODELS, Reply

_BIG = 10**9
# Field, values outside of its range, what else the request needs.
_BOUNDS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("temperature", [-0.1, 2.1], {}),
    ("top_p", [0, 1.1], {}),
    ("min_p", [-0.1, 1.1], {}),
    ("top_k", [-2, 1000], {}),
    ("max_tokens", [-1, 1_000_001], {}),
    ("min_tokens", [-1], {}),
    ("n", [0, 5], {}),
    ("best_of", [0, 21], {}),
    ("presence_penalty", [-2.1, 2.1], {}),
    ("frequency_penalty", [-2.1, 2.1], {}),
    ("repetition_penalty", [0, 5.1], {}),
    ("prompt_logprobs", [-1, 21], {}),
    ("seed", [-1], {}),
    ("priority", [2**31], {}),
    ("stop", ["", ["a"] * 17], {}),
    ("structured_outputs", [{}, {"choice": []}], {}),
]
_CHAT_BOUNDS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("max_completion_tokens", [-1, 1_000_001], {"max_tokens": None}),
    ("top_logprobs", [-1, 21], {"logprobs": True}),
    ("messages", [[], "hello"], {}),
]
_TEXT_BOUNDS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("logprobs", [-1, 21], {}),
    ("prompt", [[], ""], {}),
]
# The param of each refusal, and the fields that contradict each other.
_CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("max_completion_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
    ("best_of", {"n": 3, "best_of": 2}),
    ("guided_regex", {"guided_json": {"type": "object"}, "guided_regex": "a"}),
    ("ignore_eos", {"guided_regex": "a", "ignore_eos": True}),
    ("tool_choice", {"tool_choice": "required"}),
    ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
    ("add_generation_prompt", {"continue_final_message": True, "add_generation_prompt": True}),
]
# What other servers know and we refuse by name.
_UNSUPPORTED: list[tuple[str, dict[str, Any]]] = [
    ("bad_words", {"bad_words": ["a"]}),
    ("use_beam_search", {"use_beam_search": True}),
    ("chat_template", {"chat_template": "a"}),
    ("functions", {"functions": [{"name": "f"}]}),
]


def bounds(asker: Asker) -> None:
    """Every field that has a range, on both of its sides."""
    for path, table in ((CHAT, _BOUNDS + _CHAT_BOUNDS), (COMPLETIONS, _BOUNDS + _TEXT_BOUNDS)):
        for name, values, needed in table:
            for value in values:
                _check(asker, path, name, {**needed, name: value})
    _check(asker, CHAT, "logit_bias", {"logit_bias": {"1": 101}})
    _check(asker, CHAT, "logit_bias", {"logit_bias": {str(_BIG - 1): 1}})
    _check(asker, CHAT, "stop_token_ids", {"stop_token_ids": [_BIG]})
    _check(asker, CHAT, "temperature", {"temperature": "0.7"})


def contradictions(asker: Asker) -> None:
    """Fields that cannot both be honoured, and fields of other servers."""
    for param, fields in [*_CONTRADICTIONS, *_UNSUPPORTED]:
        _check(asker, CHAT, param, fields)


def errors(asker: Asker) -> None:
    """One form for all: 400, 404, 405, 415."""
    body = b'{"model": "a", "messages": [], '
    sent: list[tuple[str, Reply, int]] = [
        ("an unknown model", asker.api.reply(CHAT, messages=messages("a"), model="nobodys"), 404),
        ("an unknown path", asker.api.send("POST", f"{CHAT}/nobodys", b"{}"), 404),
        ("an unknown model's page", asker.api.send("GET", f"{MODELS}/nobodys"), 404),
        ("GET where POST is wanted", asker.api.send("GET", CHAT), 405),
        ("JSON that breaks off", asker.api.send("POST", CHAT, body), 400),
        ("a list for a body", asker.api.send("POST", CHAT, b"[]"), 400),
        ("a key twice", asker.api.send("POST", CHAT, b'{"model": "a", "model": "b"}'), 400),
        ("no Content-Type", asker.api.send("POST", CHAT), 415),
        ("no messages", asker.api.reply(CHAT), 400),
    ]
    for what, reply, status in sent:
        want_equal(reply.status, status, f"status for {what}")
        error = reply.body["error"]
        found = {key: type(error[key]).__name__ for key in ("message", "type")}
        want_equal(found, {"message": "str", "type": "str"}, f"the error for {what}")
        want({"param", "code"} <= error.keys(), f"the error for {what} has no param and code")
    want_equal(sent[-1][1].body["error"]["param"], "messages", "param where messages are missing")
    want("allow" in sent[3][1].headers, "the refusal of a method names none; wanted Allow")


def _check(asker: Asker, path: str, param: str, fields: dict[str, Any]) -> None:
    asked: dict[str, Any] = (
        {"messages": messages(QUESTION)} if path == CHAT else {"prompt": QUESTION}
    )
    if "continue_final_message" in fields:
        asked["messages"] = [*messages(QUESTION), {"role": "assistant", "content": "A"}]
    error = asker.refusal(path, **{**asked, **fields})
    named = str(error["param"])
    want(named.split(".")[0].split("[")[0] == param, f"{fields}: param is {named}; wanted {param}")


CASES = {"bounds": bounds, "contradictions": contradictions, "errors": errors}
