"""Clients that generators make of the document are whole, and they talk to the server."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from flask import Flask

from doubles.scripted_client import ScriptedClient
from enginehouse.server import openapi
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import data_of
from makers.text_engine import engine_info
from makers.token_outputs import STOP, bytes_ids, scored

CONFIG = "post_hooks: []\n"  # else it wants ruff to be on PATH, only to make the files pretty
MODELS = ("--output-model-type", "pydantic_v2.BaseModel", "--target-python-version", "3.10")
# Without the third, a default that is an enum's is text, at which pydantic warns.
MODELS += ("--disable-warnings", "--use-annotated", "--set-default-enum-member")
TEXT = "hello 🙂 dog"
IDS = [72, 13]
HELLO = {"role": "user", "content": TEXT}

# Operation, the model of its body, what such a body must hold, the model of its answer.
ASKED: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "post_v1_chat_completions",
        "ChatBody",
        {"model": "tiny/chat", "messages": [HELLO]},
        "ChatCompletion",
    ),
    (
        "post_v1_openai_chat_completions",
        "ChatBody",
        {"model": "tiny/chat", "messages": [HELLO]},
        "ChatCompletion",
    ),
    (
        "post_v1_completions",
        "CompletionBody",
        {"model": "tiny/chat", "prompt": TEXT},
        "TextCompletion",
    ),
    (
        "post_v1_embeddings",
        "EmbeddingsBody",
        {"model": "tiny/chat", "input": TEXT},
        "EmbeddingList",
    ),
    ("post_v1_responses", "ResponsesBody", {"model": "tiny/chat", "input": TEXT}, "ResponseObject"),
    ("post_v1_conversations", "ConversationBody", {"metadata": {"a": "b"}}, "Conversation"),
    (
        "post_v1_messages",
        "MessagesBody",
        {"model": "tiny/chat", "max_tokens": 9, "messages": [HELLO]},
        "AnthropicMessage",
    ),
    (
        "post_v1_messages_count_tokens",
        "CountBody",
        {"model": "tiny/chat", "messages": [HELLO]},
        "TokenCount",
    ),
    ("post_tokenize", "TokenizeBody", {"prompt": TEXT}, "Tokens"),
    ("post_tokenize", "TokenizeChatBody", {"messages": [HELLO]}, "Tokens"),
    ("post_detokenize", "DetokenizeBody", {"tokens": IDS}, "PromptText"),
    ("post_apply_template", "TemplateBody", {"messages": [HELLO]}, "PromptText"),
]
READ: list[tuple[str, tuple[str, ...], str | None]] = [
    ("get_v1_models", (), "ModelList"),
    ("get_v1_models_id", ("tiny/chat",), "ModelCard"),
    ("get_v1_files", (), "FileList"),
    ("get_v1_batches", (), "BatchList"),
    ("get_tokenizer_info", (), "TokenizerInfo"),
    ("get_version", (), "Version"),
    ("get_health", (), "HealthStatus"),
    ("get_health_ready", (), "HealthStatus"),
    ("get_health_live", (), "HealthStatus"),
    ("get_metrics", (), None),
    ("get_v1_engine_events", (), None),
]
# What is asked of a kept thing by its ids, and its body where it has one.
KEPT: list[tuple[str, tuple[str, ...], tuple[str, dict[str, Any]] | None]] = [
    ("get_v1_responses_response_id", ("r",), None),
    ("delete_v1_responses_response_id", ("r",), None),
    ("get_v1_responses_response_id_input_items", ("r",), None),
    ("post_v1_responses_response_id_cancel", ("r",), None),
    ("get_v1_conversations_conversation_id", ("c",), None),
    ("post_v1_conversations_conversation_id", ("c",), ("MetadataBody", {"metadata": {"a": "b"}})),
    ("delete_v1_conversations_conversation_id", ("c",), None),
    ("get_v1_conversations_conversation_id_items", ("c",), None),
    (
        "post_v1_conversations_conversation_id_items",
        ("c",),
        ("ItemsBody", {"items": [{"type": "message", **HELLO}]}),
    ),
    ("get_v1_conversations_conversation_id_items_item_id", ("c", "i"), None),
    ("delete_v1_conversations_conversation_id_items_item_id", ("c", "i"), None),
    ("get_v1_files_file_id", ("f",), None),
    ("delete_v1_files_file_id", ("f",), None),
    ("get_v1_files_file_id_content", ("f",), None),
    ("get_v1_batches_batch_id", ("b",), None),
    ("post_v1_batches_batch_id_cancel", ("b",), None),
    (
        "post_v1_batches",
        (),
        ("BatchBody", {"input_file_id": "f", "endpoint": "/v1/completions"}),
    ),
]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with the package `made_client` and the module `made_models`.

    Both generators run at once, as programs, and skip nothing with a warning.
    """
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(openapi.document("0.1.0")))
    (folder / "config.yaml").write_text(CONFIG)
    client = ["openapi_python_client", "generate", "--path", "openapi.json", "--meta", "none"]
    client += ["--output-path", "made_client", "--config", "config.yaml", "--fail-on-warning"]
    models = ["datamodel_code_generator", "--input", "openapi.json", "--input-file-type", "openapi"]
    models += ["--output", "made_models.py", *MODELS]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in (client, models)
    ]
    for program in running:
        said, _ = program.communicate(timeout=120)
        assert program.returncode == 0 and "arning" not in said, said
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def client(generated: Path) -> ModuleType:
    importlib.import_module("made_client.models")
    return importlib.import_module("made_client")


@pytest.fixture(scope="module")
def models(generated: Path) -> ModuleType:
    return importlib.import_module("made_models")


@pytest.fixture
def app(settings: ServerSettings, engine: ScriptedClient) -> Flask:
    return create_app(settings, engine)


def ask(client: ModuleType, app: Flask, operation: str, *path: str, **body: Any) -> Any:
    """What the generated function of an operation answers."""
    transport = httpx.WSGITransport(app=app.wsgi_app)
    connection = client.Client(base_url="http://server", httpx_args={"transport": transport})
    with connection as opened:
        module = importlib.import_module(f"made_client.api.default.{operation}")
        return module.sync_detailed(*path, client=opened, **body)


def test_every_operation_and_every_model_is_generated(
    client: ModuleType, models: ModuleType
) -> None:
    document = openapi.document("0.1.0")
    made = {
        item["operationId"] for methods in document["paths"].values() for item in methods.values()
    }
    assert made == {operation for operation, *_ in (*ASKED, *READ, *KEPT)} | {"post_v1_files"}
    for operation in made:
        module = importlib.import_module(f"made_client.api.default.{operation}")
        assert callable(module.sync_detailed) and callable(module.asyncio_detailed)
    for name in document["components"]["schemas"]:
        assert hasattr(client.models, name), name
        assert hasattr(models, name), name


@pytest.mark.parametrize(("operation", "body", "given", "answer"), ASKED)
def test_a_client_s_own_defaults_are_taken_and_what_it_reads_is_the_answer(
    client: ModuleType,
    models: ModuleType,
    app: Flask,
    operation: str,
    body: str,
    given: dict[str, Any],
    answer: str,
) -> None:
    sent = getattr(client.models, body).from_dict(given)
    response = ask(client, app, operation, body=sent)
    raw = json.loads(response.content)
    assert response.status_code == 200, raw
    assert type(response.parsed).__name__ == answer
    assert response.parsed.to_dict() == raw
    assert "X-Ignored-Fields" not in response.headers
    read = getattr(models, answer).model_validate(raw)
    assert read.model_dump(mode="json", exclude_unset=True, by_alias=True) == raw


@pytest.mark.parametrize(("operation", "path", "answer"), READ)
def test_what_has_no_body_is_read_by_both(
    client: ModuleType,
    models: ModuleType,
    app: Flask,
    operation: str,
    path: tuple[str, ...],
    answer: str | None,
) -> None:
    response = ask(client, app, operation, *path)
    assert response.status_code == 200
    if answer is None:
        assert response.parsed == response.content.decode()
        assert response.parsed.startswith(("# HELP ", "data: {"))
        return
    raw = json.loads(response.content)
    assert response.parsed.to_dict() == raw
    assert getattr(models, answer).model_validate(raw).model_dump(exclude_unset=True) == raw


@pytest.mark.parametrize(("operation", "body", "given", "answer"), ASKED)
def test_a_model_with_all_its_defaults_is_taken_as_a_body(
    models: ModuleType, app: Flask, operation: str, body: str, given: dict[str, Any], answer: str
) -> None:
    [path] = [item.path for item in openapi.OPERATIONS if openapi.operation_id(item) == operation]
    made = getattr(models, body).model_validate(given)
    for by_alias in (True, False):
        text = made.model_dump_json(by_alias=by_alias)
        response = app.test_client().post(path, data=text, content_type="application/json")
        assert response.status_code == 200, response.text
        assert "X-Ignored-Fields" not in response.headers
        getattr(models, answer).model_validate_json(response.data)


def test_a_file_is_uploaded(client: ModuleType, app: Flask) -> None:
    types = importlib.import_module("made_client.types")
    file = types.File(payload=io.BytesIO(b"x"), file_name="in.jsonl")
    purpose = client.models.PostV1FilesBodyPurpose("batch")
    body = client.models.PostV1FilesBody(file=file, purpose=purpose)
    response = ask(client, app, "post_v1_files", body=body)
    assert (response.status_code, response.parsed.bytes_) == (200, 1)


@pytest.mark.parametrize(("operation", "path", "body"), KEPT)
def test_what_is_not_kept_is_read_as_a_refusal(
    client: ModuleType,
    app: Flask,
    operation: str,
    path: tuple[str, ...],
    body: tuple[str, dict[str, Any]] | None,
) -> None:
    sent = {} if body is None else {"body": getattr(client.models, body[0]).from_dict(body[1])}
    response = ask(client, app, operation, *path, **sent)
    assert (response.status_code, type(response.parsed).__name__) == (404, "Error")


def test_a_refusal_is_read_by_both(client: ModuleType, models: ModuleType, app: Flask) -> None:
    body = client.models.ChatBody.from_dict({"model": "other", "messages": [HELLO]})
    response = ask(client, app, "post_v1_chat_completions", body=body)
    raw = json.loads(response.content)
    assert response.status_code == 404 and response.parsed.to_dict() == raw
    assert models.Error.model_validate(raw).model_dump() == raw


CALL = '{"name": "f", "arguments": {"a": "b"}}'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("path", "fields", "whole", "chunk"),
    [
        (
            "/v1/chat/completions",
            {"messages": [HELLO], "logprobs": True, "top_logprobs": 2, "tools": TOOLS, "n": 2},
            "ChatCompletion",
            "ChatChunk",
        ),
        ("/v1/completions", {"prompt": TEXT, "logprobs": 2}, "TextCompletion", "TextChunk"),
    ],
)
def test_calls_scores_and_every_chunk_are_read_by_both(
    client: ModuleType,
    models: ModuleType,
    app: Flask,
    engine: ScriptedClient,
    path: str,
    fields: dict[str, Any],
    whole: str,
    chunk: str,
) -> None:
    engine.info = engine_info(max_seq_len=4096)
    engine.script = [scored([i]) for i in bytes_ids(CALL)] + [scored([], STOP)]
    engine.script += [scored([i], index=1) for i in bytes_ids("a🙂")] + [scored([], STOP, 1)]
    body = {"model": "tiny/chat", **fields}
    http = app.test_client()
    found = [(whole, http.post(path, json=body).json)]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with http.post(path, json={**body, **options}) as response:
        *chunks, _ = data_of([response.data])
    found += [(chunk, each) for each in chunks]
    assert len(found) > 4
    for name, raw in found:
        assert getattr(client.models, name).from_dict(raw).to_dict() == raw
        read = getattr(models, name).model_validate(raw)
        assert read.model_dump(mode="json", exclude_unset=True) == raw
