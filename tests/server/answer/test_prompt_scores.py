"""Log probabilities of prompts on the wire; the scripted engine's are -id / 100."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient
from tokenizers import processors

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.request import TokenLogprobs, TokenOutput
from enginehouse.server.answer.prompt_scores import PromptScores
from enginehouse.server.http import sse
from enginehouse.server.prompt.chat import Chat
from enginehouse.server.prompt.prompts import text_span, tokenize
from enginehouse.server.text.detokenizer import TokenPieces
from makers.api_client import HELLO, PATHS, data_of, error_of
from makers.text_engine import byte_level_tokenizer, sentencepiece_tokenizer
from makers.token_outputs import END_ID, LENGTH, PIECES, STOP, TOKENIZER, bytes_ids, output, scored

TEXT = "the lazy é<|im_end|>dog"
IDS = TOKENIZER.encode(TEXT).ids


def ask(http: FlaskClient, **fields: Any) -> Any:
    body = {"model": "tiny/chat", "prompt": TEXT, "echo": True, "logprobs": 1, **fields}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.json
    return response


def choices_of(http: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = ask(http, **fields).json["choices"]
    return choices


def test_an_echo_has_the_prompts_tokens_before_the_answers(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [scored(bytes_ids("aé"), LENGTH)]
    [choice] = choices_of(http)
    [(_, [sampling])] = engine.submitted
    assert (sampling.num_prompt_logprobs, sampling.num_logprobs) == (1, 1)
    assert choice["text"] == TEXT + "aé"
    told = choice["logprobs"]
    ids = [*IDS, *bytes_ids("aé")]
    assert told["token_logprobs"] == [None, *(-i / 100 for i in ids[1:])]
    assert told["top_logprobs"][0] is None
    for token_id, own, top in zip(IDS[1:], told["token_logprobs"][1:], told["top_logprobs"][1:]):  # noqa: B905  the answer's follow
        assert sorted(top.values()) == sorted({own, 0.0}), token_id
    assert {name: len(values) for name, values in told.items()} == dict.fromkeys(told, len(ids))
    starts = told["text_offset"]
    assert starts == sorted(starts) and starts[len(IDS)] == len(TEXT)
    for token, start in zip(told["tokens"], starts, strict=True):
        assert token.startswith("bytes:") or (TEXT + "aé").startswith(token, start), token
    assert "<|im_end|>" in told["tokens"], "a special token that is the prompt's text"


@pytest.mark.parametrize("stream", [False, True])
def test_scores_are_told_beside_the_event_loop(
    http: FlaskClient, engine: ScriptedClient, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    beside: list[Any] = []

    def call(work: Any) -> Any:
        beside.append(work())
        return beside[-1]

    monkeypatch.setattr(sse, "call_beside_the_loop", call)
    engine.script = [scored(bytes_ids("a"), LENGTH)]
    ask(http, stream=stream).get_data()
    assert beside
    beside.clear()
    engine.script = [(0, output(bytes_ids("a"), LENGTH))]
    ask(http, stream=stream, logprobs=None).get_data()
    assert not beside, "any other answer is short work"


def test_max_tokens_zero_tells_the_prompt_alone(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.script = [(0, output([], LENGTH))]
    [choice] = choices_of(http, max_tokens=0, prompt=IDS)
    assert [sampling.max_tokens for sampling in engine.submitted[0][1]] == [0]
    assert choice["text"] == TEXT.replace("<|im_end|>", ""), "as ids it came with no such text"
    assert len(choice["logprobs"]["tokens"]) == len(IDS)
    [_, choice] = choices_of(http, max_tokens=0, prompt=[[5], [7]])
    assert choice["logprobs"]["token_logprobs"] == [None]


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_stream_says_what_the_whole_answer_says(
    http: FlaskClient, engine: ScriptedClient, max_tokens: int
) -> None:
    """The second choice has begun before the prompt is scored; it waits."""
    begins = [scored(bytes_ids("ab"), index=1), scored(bytes_ids("cd"))] if max_tokens else []
    engine.script = [*begins, (1, output([], LENGTH)), (0, output([], STOP))]
    fields: dict[str, Any] = {"n": 2, "prompt": [TEXT, "dog"], "max_tokens": max_tokens}
    whole = choices_of(http, **fields)
    with ask(http, **fields, stream=True) as response:
        *chunks, done = data_of([response.data])
    assert done == "[DONE]"
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(item["text"] for item in mine) == choice["text"]
        told = [item["logprobs"] for item in mine]
        joined = {name: sum((each[name] for each in told), []) for name in told[0]}
        assert joined == choice["logprobs"]
    assert [s.num_prompt_logprobs for s in engine.submitted[0][1]] == [1, None], "scored once"


@pytest.mark.parametrize("own", [None, TokenLogprobs(-0.5, ((END_ID, -0.5),))])
def test_the_end_token_is_told_behind_an_echo(
    http: FlaskClient, engine: ScriptedClient, own: TokenLogprobs | None
) -> None:
    """Else who leaves out what was generated would leave out the prompt's last token."""
    ending = TokenOutput(1, [], STOP, stop_token_id=END_ID, stop_logprobs=own)
    engine.script = [(0, ending)]
    [choice] = choices_of(http, max_tokens=1)
    told = choice["logprobs"]
    assert (len(told["tokens"]), told["tokens"][-1]) == (len(IDS) + 1, "<|im_end|>")
    assert told["token_logprobs"][-1] == (own and own.logprob)
    assert told["top_logprobs"][-1] == (own and {"<|im_end|>": -0.5})
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "stop")
    engine.script = [(0, ending)]
    [choice] = choices_of(http, max_tokens=1, echo=False)
    assert choice["logprobs"]["tokens"] == []


def test_prompt_logprobs_have_vllms_shape(http: FlaskClient, engine: ScriptedClient) -> None:
    chat = http.post(PATHS[0], json={**HELLO, "prompt_logprobs": 2, "n": 1}).json
    [(prompt, _)] = engine.submitted
    first, *rest = chat["prompt_logprobs"]
    assert first is None and len(rest) == len(prompt) - 1
    for token_id, told in zip(prompt[1:], rest, strict=True):
        likeliest = [(token_id + 1, -0.0, 1), (token_id + 2, -0.1, 2), (token_id, None, token_id)]
        assert list(told) == [str(i) for i, _, _ in likeliest]
        for other, value, rank in likeliest:
            item = told[str(other)]
            assert item["logprob"] == (-token_id / 100 if value is None else value)
            assert item["rank"] == rank
            text = PIECES.piece(other, False).decode(errors="replace") or PIECES.name(other)
            assert item["decoded_token"] == text
    choices = choices_of(
        http, prompt=["hello", "dog"], echo=False, logprobs=None, prompt_logprobs=0
    )
    told = [choice["prompt_logprobs"] for choice in choices]
    assert [len(each) for each in told] == [len(TOKENIZER.encode(t).ids) for t in ("hello", "dog")]
    assert all(len(entry) == 1 for each in told for entry in each[1:])
    assert all(choice["logprobs"] is None for choice in choices)


def test_each_field_is_told_as_many_as_it_asked_for(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [(0, output([], LENGTH))]
    [choice] = choices_of(http, max_tokens=0, prompt_logprobs=3)
    assert engine.submitted[0][1][0].num_prompt_logprobs == 3
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {2}
    assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {4}


def test_a_stream_takes_prompt_logprobs_of_0_as_vllm_does(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    fields = {"stream": True, "prompt_logprobs": 0}
    with ask(http, **fields, echo=False, logprobs=None) as response:
        assert b"prompt_logprobs" not in response.data
    assert engine.submitted[0][1][0].num_prompt_logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"echo": True, "logprobs": 0}, "logprobs"), ({"prompt_logprobs": 0}, "prompt_logprobs")],
)
def test_an_engine_that_cannot_is_named(
    http: FlaskClient, engine: ScriptedClient, fields: dict[str, Any], param: str
) -> None:
    engine.info = replace(engine.info, scores_prompts=False)
    response = http.post("/v1/completions", json={"model": "tiny/chat", "prompt": "a", **fields})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        param,
        "unsupported_parameter",
    )
    assert "gather_context_logits" in error["message"] and not engine.submitted


def test_scores_that_do_not_come_are_an_error_and_no_shorter_answer(
    http: FlaskClient, engine: ScriptedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doubles.scripted_client.prompt_scores", lambda *_: [])
    body = {"model": "tiny/chat", "prompt": TEXT, "echo": True, "logprobs": 1}
    assert http.post("/v1/completions", json=body).status_code == 500


def test_a_token_that_the_tokenizer_puts_before_a_text_is_no_part_of_it() -> None:
    tokenizer = byte_level_tokenizer()
    begin = ("<|im_start|>", 0)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[begin]
    )
    chat = Chat(tokenizer, None)
    text = "<|im_end|>dog"
    ids = tokenize(chat, text, add_special_tokens=True)
    assert text_span(chat, text, ids) == range(1, len(ids))
    assert text_span(chat, ids, ids) == range(0)
    scores = PromptScores(ids, chat.pieces, text_span(chat, text, ids))
    scores.push([TokenLogprobs(-1.0)] * (len(ids) - 1))
    starts = [entry.start for entry in scores.entries(0)]
    assert starts[:3] == [0, 0, len("<|im_end|>")]


def test_a_sentencepiece_prompt_is_counted_as_it_is_spelled() -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode("he ll").ids
    scores = PromptScores(ids, TokenPieces(tokenizer), range(len(ids)))
    scores.push([TokenLogprobs(-1.0)] * (len(ids) - 1))
    assert [entry.start for entry in scores.entries(0)] == [0, 2, 3]
