"""An assistant's message that ends within a thought, gone on with by a template like Qwen3's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import ask, data_of
from makers.text_engine import write_text_engine
from makers.token_outputs import STOP, tokens

# What Qwen3's does with the last message: its thought is read out of the content where it is
# closed, else an empty one is written before the content.
QWEN3 = """
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content, thought = message.content, '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.last %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    write_text_engine(path, QWEN3)
    return path


@pytest.fixture
def qwen3(settings: ServerSettings, engine: ScriptedClient, engine_dir: Path) -> FlaskClient:
    engine.script = tokens(" so.\n</think>\n\nParis.", STOP)
    return create_app(dataclasses.replace(settings, engine_dir=engine_dir), engine).test_client()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("begun", "fields", "thought", "content"),
    [
        ("<think>\nOkay", {}, " so.", "Paris."),
        ("<think>", {}, "so.", "Paris."),
        ("<think>\nOkay", {"include_reasoning": False}, "", "Paris."),
        ("<think>\nOkay", {"separate_reasoning": False}, "", " so.\n</think>\n\nParis."),
    ],
    ids=str,
)
def test_a_begun_thought_goes_on_and_its_end_tag_is_no_content(
    qwen3: FlaskClient,
    engine: ScriptedClient,
    begun: str,
    fields: dict[str, bool],
    thought: str,
    content: str,
    stream: bool,
) -> None:
    messages = [USER, {"role": "assistant", "content": begun}]
    body = {"messages": messages, "continue_final_message": True, "stream": stream, **fields}
    with ask(qwen3, **body) as response:
        assert response.status_code == 200
        if stream:
            *chunks, _ = data_of([response.data])
            parts = [chunk["choices"][0]["delta"] for chunk in chunks]
        else:
            parts = [response.json["choices"][0]["message"]]
    assert "".join(part.get("reasoning_content", "") for part in parts) == thought
    assert "".join(part.get("content") or "" for part in parts) == content
    [(prompt_ids, _)] = engine.submitted
    assert qwen3.post("/detokenize", json={"tokens": prompt_ids}).json["prompt"].endswith(begun)
