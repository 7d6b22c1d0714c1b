"""What the Responses API keeps: conversations that go on, lists, owners, background, the store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gevent
import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.api.responses.store import Store
from enginehouse.server.api_keys import read_keys
from enginehouse.server.app import create_app
from enginehouse.server.http.processes import own_mark
from enginehouse.server.settings import ServerSettings
from makers.api_client import error_of
from makers.text_engine import engine_info
from makers.token_outputs import STOP, TOKENIZER, tokens

PATH = "/v1/responses"
CONTEXT = 1000
CALL = '{"name": "f", "arguments": {"a": "b"}}'
TOOLS = [{"type": "function", "name": "f"}]


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient(engine_info(max_seq_len=CONTEXT), tokens("the lazy dog", STOP))


def ask(http: FlaskClient, given: Any, **fields: Any) -> Any:
    response = http.post(PATH, json={"model": "tiny/chat", "input": given, **fields})
    assert response.status_code == 200, response.json
    return response.json


def prompt_of(engine: ScriptedClient) -> str:
    text: str = TOKENIZER.decode(engine.submitted[-1][0], skip_special_tokens=False)
    return text


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def test_a_response_goes_on_with_all_that_came_before(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    first = ask(http, "one", instructions="said once")
    second = ask(http, "two", previous_response_id=first["id"])
    ask(http, "three", previous_response_id=second["id"])
    chained = prompt_of(engine)
    dog = message("assistant", "the lazy dog")
    ask(http, [message("user", "one"), dog, message("user", "two"), dog, message("user", "three")])
    assert prompt_of(engine) == chained and "said once" not in chained


def test_a_call_and_its_result_go_on_too(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.script = tokens(CALL, STOP)
    first = ask(http, "one", tools=TOOLS)
    [call] = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
    ask(http, [result], previous_response_id=first["id"], tools=TOOLS)
    chained = prompt_of(engine)
    assert "42" in chained
    ask(http, [message("user", "one"), call, result], tools=TOOLS)
    assert prompt_of(engine) == chained


def test_an_item_is_found_by_its_id(http: FlaskClient, engine: ScriptedClient) -> None:
    first = ask(http, "one")
    [said] = first["output"]
    ask(http, [message("user", "one"), {"id": said["id"]}, message("user", "two")])
    by_reference = prompt_of(engine)
    ask(http, "two", previous_response_id=first["id"])
    assert prompt_of(engine) == by_reference
    body = {"model": "tiny/chat", "input": [{"type": "item_reference", "id": "msg_none"}]}
    response = http.post(PATH, json=body)
    assert (response.status_code, error_of(response)["param"]) == (404, "input[0].id")


def test_a_kept_response_is_read_listed_and_deleted(http: FlaskClient) -> None:
    given = [message("system", "be kind"), message("user", "one"), message("user", "two")]
    made = ask(http, given)
    assert http.get(f"{PATH}/{made['id']}").json == made
    listed = http.get(f"{PATH}/{made['id']}/input_items?limit=2").json
    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert (texts, listed["has_more"]) == (["two", "one"], True)
    rest = http.get(f"{PATH}/{made['id']}/input_items?after={listed['last_id']}").json
    assert [item["role"] for item in rest["data"]] == ["system"] and not rest["has_more"]
    assert rest["data"][0]["content"][0]["type"] == "input_text"
    for limit in ("0", "101", "00010000", "x"):
        refused = http.get(f"{PATH}/{made['id']}/input_items?limit={limit}")
        assert error_of(refused)["param"] == "limit"
    assert http.delete(f"{PATH}/{made['id']}").json["deleted"] is True
    for method, path in (("get", ""), ("delete", ""), ("get", "/input_items"), ("post", "/cancel")):
        response = getattr(http, method)(f"{PATH}/{made['id']}{path}")
        assert (response.status_code, error_of(response)["code"]) == (404, "response_not_found")


def test_nothing_is_kept_that_is_not_to_be(http: FlaskClient) -> None:
    made = ask(http, "one", store=False)
    assert made["store"] is False
    assert http.get(f"{PATH}/{made['id']}").status_code == 404
    body = {"model": "tiny/chat", "input": "two", "previous_response_id": made["id"]}
    assert error_of(http.post(PATH, json=body))["code"] == "previous_response_not_found"


def test_what_one_key_keeps_no_other_finds(
    settings: ServerSettings, engine: ScriptedClient
) -> None:
    keys = read_keys({"ENGINEHOUSE_API_KEYS": "ann key-of-ann,bob key-of-bob"})
    http = create_app(dataclasses.replace(settings, api_keys=keys), engine).test_client()
    ann, bob = ({"Authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))
    made = http.post(PATH, json={"model": "tiny/chat", "input": "one"}, headers=ann).json
    [said] = made["output"]
    assert http.get(f"{PATH}/{made['id']}", headers=ann).status_code == 200
    assert http.get(f"{PATH}/{made['id']}", headers=bob).status_code == 404
    assert http.delete(f"{PATH}/{made['id']}", headers=bob).status_code == 404
    body = {"model": "tiny/chat", "input": [{"id": said["id"]}]}
    assert http.post(PATH, json=body, headers=bob).status_code == 404
    assert http.post(PATH, json=body, headers=ann).status_code == 200


def test_a_conversation_grows_by_its_responses(http: FlaskClient, engine: ScriptedClient) -> None:
    made = http.post("/v1/conversations", json={"items": [message("user", "one")]}).json
    path = f"/v1/conversations/{made['id']}"
    assert (made["object"], http.get(path).json) == ("conversation", made)
    told = ask(http, "two", conversation=made["id"])
    assert told["conversation"] == {"id": made["id"]}
    ask(http, "three", conversation={"id": made["id"]})
    dog = message("assistant", "the lazy dog")
    by_conversation = prompt_of(engine)
    turns = [message("user", "one"), message("user", "two"), dog, message("user", "three")]
    ask(http, turns)
    assert prompt_of(engine) == by_conversation
    items = http.get(f"{path}/items?order=asc").json["data"]
    assert [item["role"] for item in items] == ["user", "user", "assistant", "user", "assistant"]
    assert http.delete(f"{path}/items/{items[0]['id']}").status_code == 200
    assert http.get(f"{path}/items/{items[0]['id']}").status_code == 404
    assert http.get(f"{path}/items/{items[1]['id']}").json == items[1]
    added = http.post(f"{path}/items", json={"items": [message("user", "more")]}).json
    assert http.get(f"{path}/items?limit=1").json["data"] == added["data"]
    assert http.post(path, json={"metadata": {"a": "b"}}).json["metadata"] == {"a": "b"}
    mistaken = {"model": "tiny/chat", "input": "x", "previous_response_id": made["id"]}
    assert error_of(http.post(PATH, json=mistaken))["code"] == "previous_response_not_found"
    mistaken = {"model": "tiny/chat", "input": "x", "conversation": told["id"]}
    assert error_of(http.post(PATH, json=mistaken))["param"] == "conversation"
    assert http.delete(path).json["deleted"] is True
    assert http.get(path).status_code == 404
    body = {"model": "tiny/chat", "input": "x", "conversation": made["id"]}
    assert http.post(PATH, json=body).status_code == 404


def test_what_nobody_knows_of_a_conversation_is_named(http: FlaskClient) -> None:
    made = http.post("/v1/conversations", json={"metadata": {"a": "b"}, "colour": "red"})
    path = f"/v1/conversations/{made.json['id']}"
    labelled = http.post(path, json={"metadata": {}, "items": []})
    items = [{**message("user", "one"), "colour": "red"}]
    added = http.post(f"{path}/items", json={"items": items})
    named = [response.headers["X-Ignored-Fields"] for response in (made, labelled, added)]
    assert named == ["colour", "items", "items[].colour"]


def ended(http: FlaskClient, response_id: str) -> Any:
    with gevent.Timeout(10):
        while (told := http.get(f"{PATH}/{response_id}").json)["status"] == "in_progress":
            gevent.sleep(0.01)
    return told


def test_a_response_of_the_background_is_asked_for_later(http: FlaskClient) -> None:
    made = ask(http, "one", background=True)
    assert (made["status"], made["output"]) == ("queued", [])
    told = ended(http, made["id"])
    assert told["status"] == "completed"
    assert told["output"][0]["content"][0]["text"] == "the lazy dog"
    assert http.post(f"{PATH}/{made['id']}/cancel").json == told


def test_a_response_of_the_background_is_cancelled(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = tokens("the lazy")  # and then silence
    made = ask(http, "one", background=True)
    body = {"model": "tiny/chat", "input": "two", "previous_response_id": made["id"]}
    assert "still" in error_of(http.post(PATH, json=body))["message"]
    told = http.post(f"{PATH}/{made['id']}/cancel").json
    assert told["status"] == "cancelled" and told["usage"]["output_tokens"] > 0
    assert told["output"][0]["status"] == "incomplete"
    assert engine.generations[-1].cancels == [None]


def test_what_is_deleted_while_it_runs_ends_and_is_not_kept_again(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = tokens("the lazy")  # and then silence
    made = ask(http, "one", background=True)
    assert http.delete(f"{PATH}/{made['id']}").status_code == 200
    with gevent.Timeout(10):
        while not engine.generations[-1].cancels:
            gevent.sleep(0.01)
    gevent.sleep(0)
    assert http.get(f"{PATH}/{made['id']}").status_code == 404


def test_a_response_of_the_background_counts_for_its_key(
    settings: ServerSettings, engine: ScriptedClient
) -> None:
    keys = read_keys({"ENGINEHOUSE_API_KEYS": "ann key-of-ann concurrent=1 tpm=1"})
    http = create_app(dataclasses.replace(settings, api_keys=keys), engine).test_client()
    http.environ_base["HTTP_AUTHORIZATION"] = "Bearer key-of-ann"
    engine.script = [None, *tokens("the", STOP)]
    made = ask(http, "one", background=True)
    body = {"model": "tiny/chat", "input": "two"}
    assert "run already" in error_of(http.post(PATH, json=body))["message"]
    assert ended(http, made["id"])["status"] == "completed"
    gevent.sleep(0)
    assert "tokens a minute" in error_of(http.post(PATH, json=body))["message"]


def test_a_response_of_the_background_fails_in_words(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [*tokens("the"), ZeroDivisionError("secret")]
    told = ended(http, ask(http, "one", background=True)["id"])
    assert told["status"] == "failed" and "secret" not in str(told)


def test_a_response_whose_worker_has_ended_has_failed(
    settings: ServerSettings, engine: ScriptedClient, tmp_path: Path
) -> None:
    path = tmp_path / "kept.sqlite"
    http = create_app(dataclasses.replace(settings, responses_path=path), engine).test_client()
    made = ask(http, "one")
    boot = own_mark().split()[-1]
    gone = f"{2**22 + 1} 1 {boot}"  # more than Linux gives a process
    running = {**made, "status": "in_progress", "background": True}
    Store(path, 10**6, 1e9).put("", running, [], made["created_at"], gone)
    told = http.get(f"{PATH}/{made['id']}").json
    assert told["status"] == "failed" and "worker" in told["error"]["message"]


def test_the_oldest_go_first_and_each_after_its_time(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept.sqlite", max_bytes=1000, ttl_s=60)
    for number in range(5):
        store.put("", {"id": f"r{number}", "text": "x" * 300}, [{"id": f"i{number}"}], number)
    found = [store.get("", f"r{number}", now=5) is not None for number in range(5)]
    assert found == [False, False, False, True, True] or found == [False, False, True, True, True]
    assert store.find_item("", "i0", now=5) is None
    assert store.find_item("", "i4", now=5) == {"id": "i4"}
    assert store.get("", "r4", now=63) is not None and store.get("", "r4", now=64.5) is None
    store.put("", {"id": "new"}, [], now=1000)
    assert store.get("", "r4", now=4) is None


def test_an_id_that_two_have_is_each_ones_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept.sqlite", max_bytes=10**6, ttl_s=1e9)
    for owner, text in (("ann", "a"), ("bob", "b")):
        store.put(owner, {"id": f"of-{owner}"}, [{"id": "msg_1", "text": text}], now=1)
    assert store.find_item("bob", "msg_1", now=2) == {"id": "msg_1", "text": "b"}
    store.put("ann", {"id": "later"}, [{"id": "msg_1", "text": "c"}], now=3)
    assert store.find_item("ann", "msg_1", now=4) == {"id": "msg_1", "text": "c"}
    assert store.find_item("eve", "msg_1", now=4) is None


def test_two_workers_share_what_is_kept(
    settings: ServerSettings, engine: ScriptedClient, tmp_path: Path
) -> None:
    given = dataclasses.replace(settings, responses_path=tmp_path / "kept.sqlite")
    one, other = (create_app(given, engine).test_client() for _ in range(2))
    made = ask(one, "one")
    assert other.get(f"{PATH}/{made['id']}").json == made


REFUSALS: dict[str, tuple[dict[str, Any], str | None]] = {
    "no input": ({"input": None}, "input"),
    "an empty list": ({"input": []}, "input"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
    ),
    "a hosted item": ({"input": [{"type": "web_search_call", "id": "w"}]}, "input[0].type"),
    "a role": ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
    "no content": ({"input": [{"role": "user"}]}, "input[0].content"),
    "no call": (
        {"input": [{"type": "function_call_output", "output": "x"}]},
        "input[0].call_id",
    ),
    "a hosted tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "a hosted tool in a group": (
        {"tools": [{"type": "namespace", "name": "g", "tools": [{"type": "custom"}]}]},
        "tools[0].tools[0].type",
    ),
    "two tools of a name": ({"tools": TOOLS * 2}, "tools[1].name"),
    "an unknown tool": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice.name",
    ),
    "an unknown allowed tool": (
        {
            "tools": TOOLS,
            "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "g"}]},
        },
        "tool_choice.tools[0].name",
    ),
    "tool_choice": ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice"),
    "a tool_choice of odd parts": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": "f"}},
        "tool_choice",
    ),
    "allowed tools that are no list": (
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": 5}},
        "tool_choice",
    ),
    "a schema without a name": (
        {"text": {"format": {"type": "json_schema", "schema": {}}}},
        "text.format.name",
    ),
    "a schema that is none": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}},
        "text.format.schema",
    ),
    "max_tokens": ({"max_tokens": 5}, "max_tokens"),
    "max_output_tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "n": ({"n": 2}, "n"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a prompt": ({"prompt": {"id": "x"}}, "prompt"),
    "messages": ({"messages": [message("user", "x")]}, "messages"),
    "background": ({"background": True, "store": False}, "background"),
    "background in a stream": ({"background": True, "stream": True}, "background"),
    "two pasts": ({"conversation": "c", "previous_response_id": "r"}, "conversation"),
    "a conversation, and nothing kept": ({"conversation": "c", "store": False}, "conversation"),
    "a text without its text": (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0].text",
    ),
    "a reference to nothing": ({"input": [{"type": "item_reference"}]}, "input[0].id"),
    "an item of no kind": ({"input": [{"content": "x"}]}, "input[0].type"),
    "a format of no kind": ({"text": {"format": {}}}, "text.format.type"),
    "metadata": ({"metadata": {"a": 5}}, "metadata.a"),
    "too long": ({"input": "word " * 5000}, "input"),
    "too long even so": (
        {"input": "word " * 900, "truncation": "auto", "max_output_tokens": 400},
        "input",
    ),
    "too many": ({"input": [message("user", "x")] * (CONTEXT + 1)}, "input"),
}


@pytest.mark.parametrize(("fields", "param"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_names_the_field_as_this_endpoint_has_it(
    http: FlaskClient, fields: dict[str, Any], param: str | None
) -> None:
    response = http.post(PATH, json={"model": "tiny/chat", "input": "hello", **fields})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: ")


def test_what_is_missing_is_told_as_this_endpoint_wants_it(http: FlaskClient) -> None:
    wanted = {
        PATH: "input: missing; wanted a string or a list of items",
        "/v1/conversations/c": "metadata: missing; wanted an object",
        "/v1/conversations/c/items": "items: missing; wanted a list of items",
    }
    for path, words in wanted.items():
        assert error_of(http.post(path, json={"model": "tiny/chat"}))["message"] == words


def test_a_chain_that_has_lost_a_link_names_both_ends_of_it(http: FlaskClient) -> None:
    first = ask(http, "one")
    second = ask(http, "two", previous_response_id=first["id"])
    http.delete(f"{PATH}/{first['id']}")
    body = {"model": "tiny/chat", "input": "three", "previous_response_id": second["id"]}
    message = error_of(http.post(PATH, json=body))["message"]
    assert first["id"] in message and second["id"] in message


def test_what_is_gone_on_with_is_not_old(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept.sqlite", max_bytes=10**6, ttl_s=60)
    for name in ("used", "unused"):
        store.put("", {"id": name}, [], now=0)
    store.renew("", ["used"], now=50)
    assert store.get("", "used", now=100) is not None and store.get("", "unused", now=100) is None
    store.append("", "used", [{"id": "i"}], now=105)
    assert store.get("", "used", now=150) is not None


def test_what_is_used_is_renewed(http: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed: list[str] = []
    monkeypatch.setattr(Store, "renew", lambda self, owner, ids, now: renewed.extend(ids))
    first = ask(http, "one")
    second = ask(http, "two", previous_response_id=first["id"])
    ask(http, "three", previous_response_id=second["id"])
    assert renewed == [first["id"], second["id"], first["id"]]
    made = http.post("/v1/conversations", json={}).json
    ask(http, "four", conversation=made["id"])
    assert renewed[-1] == made["id"]


def test_what_has_no_effect_is_named(http: FlaskClient) -> None:
    fields = {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}
    body = {"model": "tiny/chat", "input": "one", "text": {"verbosity": "low"}, "whim": 1}
    response = http.post(PATH, json={**body, **fields, "metadata": {"a": "b"}})
    named = response.headers["X-Ignored-Fields"].split(", ")
    assert named == ["whim", "text.verbosity", "include", "reasoning.summary"]


def test_of_allowed_tools_alone_the_model_is_told(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    tools = [{"type": "function", "name": name} for name in ("first_one", "second_one")]
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [tools[1]]}
    told = ask(http, "hello", tools=tools, tool_choice=allowed)
    assert (told["tool_choice"], len(told["tools"])) == (allowed, 2)
    assert "second_one" in prompt_of(engine) and "first_one" not in prompt_of(engine)


def test_functions_of_a_group_are_called_by_both_names(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = tokens('{"name": "team.ask", "arguments": {}}', STOP)
    group = {"type": "namespace", "name": "team", "tools": [{"type": "function", "name": "ask"}]}
    told = ask(http, "hello", tools=[group, {"type": "function", "name": "ask"}])
    [call] = told["output"]
    assert (call["namespace"], call["name"]) == ("team", "ask")
    assert [tool.get("namespace") for tool in told["tools"]] == ["team", None]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
    ask(http, [message("user", "hello"), call, result], tools=[group])
    assert '"team.ask"' in prompt_of(engine).partition("hello")[2]


def test_what_does_not_fit_is_left_out_from_the_oldest_on(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    turns = [message("user", f"turn {number} " + "word " * 40) for number in range(30)]
    given = [message("system", "stay kind"), *turns]
    ask(http, given, truncation="auto", max_output_tokens=16)
    prompt, [sampling] = engine.submitted[-1]
    assert sampling.max_tokens == 16 and len(prompt) + 16 <= CONTEXT
    text = prompt_of(engine)
    assert "stay kind" in text and "turn 29 " in text and "turn 0 " not in text
    # One turn more would not have fitted.
    first = next(number for number in range(30) if f"turn {number} " in text)
    ask(http, [given[0], *turns[first:]])
    assert engine.submitted[-1][0] == prompt
    longer = [given[0], *turns[first - 1 :]]
    body = {"model": "tiny/chat", "input": longer, "max_output_tokens": 16}
    response = http.post(PATH, json=body)
    if response.status_code == 200:
        assert len(engine.submitted[-1][0]) + 16 > CONTEXT
