from __future__ import annotations

from typing import Any

import gevent
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from doubles.scripted_client import ScriptedClient, ScriptedGeneration
from enginehouse.runtime.errors import HostUnavailable
from enginehouse.runtime.request import TokenOutput
from enginehouse.server.api.texts.batch import Batch
from makers.api_client import data_of, error_of
from makers.token_outputs import LENGTH, STOP, TOKENIZER, bytes_ids, scored, tokens

HELLO_IDS = TOKENIZER.encode("hello").ids
DOG_IDS = TOKENIZER.encode("dog").ids


def ask(http: FlaskClient, **fields: Any) -> TestResponse:
    return http.post("/v1/completions", json={"model": "tiny/chat", "prompt": "hello", **fields})


def choices_of(http: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    response = ask(http, **fields)
    assert response.status_code == 200, response.json
    assert response.json["object"] == "text_completion"
    choices: list[dict[str, Any]] = response.json["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return choices


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("hello", [HELLO_IDS]),
        (HELLO_IDS, [HELLO_IDS]),
        (["hello", "dog"], [HELLO_IDS, DOG_IDS]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_every_form_of_prompt_reaches_the_engine(
    http: FlaskClient, engine: ScriptedClient, prompt: Any, wanted: list[list[int]]
) -> None:
    engine.script = [*tokens(" a", STOP, 0), *tokens(" b", STOP, 1)]
    choices = choices_of(http, prompt=prompt, n=2, priority=-3, seed=1)
    assert [choice["text"] for choice in choices] == [" a", " b"] * len(wanted)
    assert [prompt_ids for prompt_ids, _ in engine.submitted] == wanted
    assert engine.priorities == [-3] * len(wanted)
    for _, samplings in engine.submitted:
        assert [(s.seed, s.max_tokens) for s in samplings] == [(1, 16), (2, 16)]


def test_usage_counts_all_prompts_and_all_answers(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    usage = ask(http, prompt=["hello", "dog"]).json["usage"]
    num_tokens = len(TOKENIZER.encode("the lazy dog").ids)
    assert usage["prompt_tokens"] == len(HELLO_IDS) + len(DOG_IDS)
    assert usage["completion_tokens"] == 2 * num_tokens


def test_echo_begins_with_the_prompt_and_max_tokens_zero_is_the_prompt_alone(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    [choice] = choices_of(http, echo=True)
    assert choice["text"] == "hellothe lazy dog"
    choices = choices_of(http, echo=True, max_tokens=0, prompt=[HELLO_IDS, DOG_IDS])
    assert [(c["text"], c["finish_reason"]) for c in choices] == [
        ("hello", "length"),
        ("dog", "length"),
    ]
    assert len(engine.submitted) == 1


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_of_several_prompts_says_what_the_whole_answer_says(
    http: FlaskClient, engine: ScriptedClient, echo: bool
) -> None:
    fields: dict[str, Any] = {"prompt": ["hello", "dog"], "echo": echo, "stop": "zy"}
    whole = choices_of(http, **fields)
    options = {"include_usage": True}
    with ask(http, **fields, stream=True, stream_options=options) as response:
        *chunks, usage, done = data_of([response.data])
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] > 0
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(item["text"] for item in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        assert mine[-1]["stop_reason"] == choice["stop_reason"] == "zy"


def test_logprobs_have_the_older_shape_with_offsets_into_the_text(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [scored(bytes_ids("aéb"), LENGTH)]
    [choice] = choices_of(http, logprobs=2)
    [(_, [sampling])] = engine.submitted
    assert sampling.num_logprobs == 2
    names = ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    values = [-i / 100 for i in bytes_ids("aéb")]
    assert choice["logprobs"] == {
        "tokens": names,
        "token_logprobs": values,
        "top_logprobs": [
            {name: value, "<|im_end|>": -9999.0} for name, value in zip(names, values, strict=True)
        ],
        "text_offset": [0, 1, 1, 2],
    }


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["hello", ""]}, "prompt[1]"),
    ({"prompt": ["hello", 5]}, "prompt[1]"),
    ({"prompt": [5, "hello"]}, "prompt[0]"),
    ({"prompt": [[5], [True]]}, "prompt[1][0]"),
    ({"prompt": [5, 304]}, "prompt[1]"),
    ({"prompt": [[5], [-1]]}, "prompt[1][0]"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": "x " * 300}, "prompt"),
    ({"prompt": [5] * 256}, "prompt"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"prompt": [[5], [5] * 257]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": []}, "messages"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"logit_bias": {"304": 1}}, "logit_bias.304"),
    ({"stop_token_ids": [3, 304]}, "stop_token_ids[1]"),
    ({"min_tokens": 300, "max_tokens": 300}, "min_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_refusal_names_the_field(http: FlaskClient, fields: dict[str, Any], param: str) -> None:
    response = ask(http, **fields)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_a_batch_hands_over_what_its_generations_say_and_numbers_it_through() -> None:
    parts = [
        ScriptedGeneration([*tokens("ab", None, 1), (0, TokenOutput(1, [], STOP))], 2),
        ScriptedGeneration([(0, TokenOutput(1, [7], LENGTH))], 2),
    ]
    batch = Batch(list(parts), 2)
    first = [batch.get(5) for _ in range(4)]
    assert sorted(item[0] for item in first if item) == [0, 1, 1, 2]
    assert batch.get(0.01) is None and not batch.finished
    batch.cancel(3)
    assert parts[1].cancels == [1]
    batch.cancel()
    assert [part.finished for part in parts] == [True, True]
    assert batch.get(5) is None


def test_a_batch_fails_when_one_of_it_does() -> None:
    parts = [ScriptedGeneration([HostUnavailable("gone")]), ScriptedGeneration([])]
    with gevent.Timeout(5), pytest.raises(HostUnavailable):
        Batch(list(parts), 1).get()


def test_prompts_already_started_are_cancelled_when_a_later_one_cannot_be(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    submit = engine.submit

    def once(*args: Any) -> ScriptedGeneration:
        if engine.generations:
            raise HostUnavailable("gone")
        return submit(*args)

    engine.submit = once  # type: ignore[method-assign]
    assert ask(http, prompt=["hello", "dog"]).status_code == 503
    assert engine.generations[0].finished
