"""The OpenAPI 3.1 document, made of the models that validate, and one page that shows it.

Knows the names of the routes and their models; no Flask.
Source: OpenAPI Specification 3.1.1.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from enginehouse.server.api.batches import told as batches
from enginehouse.server.api.batches.body import BatchBody
from enginehouse.server.api.embeddings.body import EmbeddingsBody
from enginehouse.server.api.embeddings.told import EmbeddingList
from enginehouse.server.api.messages import told as messages
from enginehouse.server.api.messages.body import CountBody, MessagesBody
from enginehouse.server.api.responses import told as responses
from enginehouse.server.api.responses.body import ResponsesBody
from enginehouse.server.api.responses.conversations import (
    ConversationBody,
    ItemsBody,
    MetadataBody,
)
from enginehouse.server.wire import answers, bodies

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "a field is at fault, and `param` names it",
    401: "an API key is wanted",
    404: "there is no such path, model, or kept thing",
    405: "the path does not take this method",
    408: "the body did not arrive",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the queue is full, or the key's minute; Retry-After says when to come again",
    500: "the server failed",
    503: "the engine is not there; Retry-After says when to come again",
}
_GET_ERRORS = (401, 404, 405, 500, 503)


class Operation(NamedTuple):
    method: str
    path: str
    summary: str
    bodies: tuple[type[BaseModel], ...]
    answer: type[BaseModel] | None
    chunk: type[BaseModel] | None = None
    example: dict[str, Any] | None = None
    error: type[BaseModel] = answers.Error
    errors: tuple[int, ...] = ()  # beside those of all that have no body
    form: dict[str, Any] | None = None  # the schema of a body of multipart/form-data


UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
}
_HELLO = {"role": "user", "content": "What is the capital of France?"}
_MODEL = {"model": "SmolLM2-135M-Instruct"}


def _of_batches() -> list[Operation]:
    file, batch, bad = "/v1/files/{file_id}", "/v1/batches/{batch_id}", (400,)
    one = batches.FileObject
    upload = (400, 408, 413, 415)
    return [
        Operation("post", "/v1/files", "Upload a file", (), one, errors=upload, form=UPLOAD),
        Operation("get", "/v1/files", "All files", (), batches.FileList, errors=bad),
        Operation("get", file, "A file", (), one),
        Operation("delete", file, "Delete a file", (), batches.DeletedFile),
        Operation("get", f"{file}/content", "Its bytes", (), None),
        Operation("post", "/v1/batches", "Answer a file", (BatchBody,), batches.BatchObject),
        Operation("get", "/v1/batches", "All batches", (), batches.BatchList, errors=bad),
        Operation("get", batch, "A batch", (), batches.BatchObject),
        Operation("post", f"{batch}/cancel", "End a batch", (), batches.BatchObject),
    ]


def _of_responses() -> list[Operation]:
    one, kept = "/v1/responses/{response_id}", "/v1/conversations/{conversation_id}"
    items, item = f"{kept}/items", f"{kept}/items/{{item_id}}"
    hello = {**_MODEL, "input": "What is the capital of France?", "max_output_tokens": 100}
    event, bad = responses.ResponseEvent, (400,)
    new, more, labels = ConversationBody, ItemsBody, MetadataBody
    made, listed, gone = responses.Conversation, responses.ItemList, responses.Deleted
    told = responses.ResponseObject
    return [
        Operation("post", "/v1/responses", "Answer", (ResponsesBody,), told, event, hello),
        Operation("get", one, "A kept response", (), told, errors=bad),
        Operation("delete", one, "Forget a response", (), gone),
        Operation("get", f"{one}/input_items", "Its input", (), listed, errors=bad),
        Operation("post", f"{one}/cancel", "End it in the background", (), told, errors=bad),
        Operation("post", "/v1/conversations", "Keep a conversation", (new,), made),
        Operation("get", kept, "A kept conversation", (), made),
        Operation("post", kept, "Label a conversation", (labels,), made),
        Operation("delete", kept, "Forget a conversation", (), gone),
        Operation("get", items, "Its items", (), listed, errors=bad),
        Operation("post", items, "Add items", (more,), listed),
        Operation("get", item, "One item", (), responses.ResponseItem),
        Operation("delete", item, "Forget an item", (), made),
    ]


OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation",
        (bodies.ChatBody,),
        answers.ChatCompletion,
        answers.ChatChunk,
        {**_MODEL, "messages": [_HELLO], "temperature": 0, "max_tokens": 100},
    ),
    Operation(
        "post",
        "/v1/openai/chat/completions",
        "The same, under another name",
        (bodies.ChatBody,),
        answers.ChatCompletion,
        answers.ChatChunk,
        {**_MODEL, "messages": [_HELLO], "temperature": 0, "max_tokens": 100},
    ),
    Operation(
        "post",
        "/v1/completions",
        "Continue texts",
        (bodies.CompletionBody,),
        answers.TextCompletion,
        answers.TextChunk,
        {**_MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8},
    ),
    Operation(
        "post",
        "/v1/embeddings",
        "Vectors of texts",
        (EmbeddingsBody,),
        EmbeddingList,
        example={**_MODEL, "input": ["What is the capital of France?", "Paris"]},
    ),
    *_of_responses(),
    *_of_batches(),
    Operation(
        "post",
        "/v1/messages",
        "Answer a conversation, as Anthropic has it",
        (MessagesBody,),
        messages.AnthropicMessage,
        messages.AnthropicEvent,
        {**_MODEL, "messages": [_HELLO], "max_tokens": 100},
        messages.AnthropicError,
    ),
    Operation(
        "post",
        "/v1/messages/count_tokens",
        "Tokens of a conversation",
        (CountBody,),
        messages.TokenCount,
        example={**_MODEL, "messages": [_HELLO]},
        error=messages.AnthropicError,
    ),
    Operation("get", "/v1/models", "The model that is served", (), answers.ModelList),
    Operation("get", "/v1/models/{id}", "One model", (), answers.ModelCard),
    Operation(
        "post",
        "/tokenize",
        "Tokens of a text or a conversation",
        (bodies.TokenizeBody, bodies.TokenizeChatBody),
        answers.Tokens,
        example={"prompt": "What is the capital of France?"},
    ),
    Operation(
        "post", "/detokenize", "Text of tokens", (bodies.DetokenizeBody,), answers.PromptText
    ),
    Operation(
        "post",
        "/apply-template",
        "A conversation as the model reads it",
        (bodies.TemplateBody,),
        answers.PromptText,
        example={"messages": [_HELLO]},
    ),
    Operation("get", "/tokenizer_info", "What the tokenizer is", (), answers.TokenizerInfo),
    Operation("get", "/version", "The server's version", (), answers.Version),
    Operation("get", "/health", "Whether it takes requests", (), answers.HealthStatus),
    Operation("get", "/health/ready", "The same", (), answers.HealthStatus),
    Operation("get", "/health/live", "Whether it runs", (), answers.HealthStatus),
    Operation(
        "get",
        "/v1/engine/events",
        "The engine as it runs, as server-sent events",
        (),
        None,
        answers.EngineLook,
        errors=(429,),
    ),
    Operation("get", "/metrics", "Prometheus text", (), None),
)


@cache
def document(version: str) -> dict[str, Any]:
    """The whole document, as plain JSON values; made once, and not to be changed."""
    used = {
        model
        for operation in OPERATIONS
        for model in (*operation.bodies, operation.answer, operation.chunk, operation.error)
        if model is not None
    }
    ordered = sorted(used, key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "validation") for model in ordered], ref_template=_REF
    )
    for schema in definitions["$defs"].values():
        _drop_containers(schema)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "enginehouse",
            "version": version,
            "description": "OpenAI-compatible completions. null means that a field is absent.",
        },
        "servers": [{"url": "/", "description": "this server"}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _drop_containers(schema: dict[str, Any]) -> None:
    """A list or an object that is absent is empty in here. That is no default which a client may
    send where it must not be empty, and generators of clients take none.
    """
    for field in schema.get("properties", {}).values():
        if isinstance(field.get("default"), (list, dict)):
            del field["default"]


def _operation(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if operation.answer is not None:
        content = {"application/json": {"schema": _ref(operation.answer)}}
    if operation.chunk is not None:
        chunk = {
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [_ref(operation.chunk), _ref(operation.error)]},
        }
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, chunk]}
        content["text/event-stream"] = {
            "schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}
        }
    statuses: Iterable[int] = _ERRORS if operation.bodies else (*_GET_ERRORS, *operation.errors)
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": content}}
    for status in sorted(statuses):
        error = {"application/json": {"schema": _ref(operation.error)}}
        responses[str(status)] = {"description": _ERRORS[status], "content": error}
    made: dict[str, Any] = {
        "operationId": operation_id(operation),
        "summary": operation.summary,
        "responses": responses,
    }
    if operation.bodies:
        refs = [_ref(model) for model in operation.bodies]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        example = operation.example
        content = {"schema": schema, **({"example": example} if example else {})}
        made["requestBody"] = {"required": True, "content": {"application/json": content}}
    if operation.form is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": operation.form}},
        }
    if names := re.findall(r"{(\w+)}", operation.path):
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    return made


def operation_id(operation: Operation) -> str:
    """`post_v1_chat_completions`: the name that generated clients give it."""
    words = re.findall(r"[a-z0-9]+", operation.path)
    return "_".join([operation.method, *words])


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
code { background: #8882; padding: 0 .2em } h2 { margin-top: 2em }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #8884; padding: .3em .6em; text-align: left; vertical-align: top }
:root { color-scheme: light dark }
"""


@cache
def page(version: str) -> str:
    """The document as one page of HTML that loads nothing."""
    made = document(version)
    operations, schemas = [], []
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            answer = operation["responses"]["200"]["content"].get("application/json", {})
            operations.append(
                f"<tr><td><code>{method.upper()} {html.escape(path)}</code></td>"
                f"<td>{html.escape(operation['summary'])}</td>"
                f"<td>{_type_of(body.get('schema', {}))}{_example(body)}</td>"
                f"<td>{_type_of(answer.get('schema', {}))}</td></tr>"
            )
    for name, schema in made["components"]["schemas"].items():
        rows = "".join(
            f"<tr><td><code>{html.escape(field)}</code></td><td>{_type_of(form)}</td>"
            f"<td>{'required' if field in schema.get('required', ()) else _default(form)}</td>"
            f"<td>{html.escape(form.get('description', ''))}</td></tr>"
            for field, form in schema.get("properties", {}).items()
        )
        text = html.escape(schema.get("description", ""))
        schemas.append(
            f'<h2 id="{name}">{name}</h2><p>{text}</p><table>'
            f"<tr><th>field<th>type<th>default<th></tr>{rows}</table>"
        )
    title = f"{made['info']['title']} {made['info']['version']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(made['info']['description'])} "
        'The same as data: <a href="openapi.json">openapi.json</a>.</p>'
        "<table><tr><th>request<th><th>body<th>answer</tr>"
        f"{''.join(operations)}</table>{''.join(schemas)}</html>"
    )


def _example(body: dict[str, Any]) -> str:
    """What a request may send, as it is sent."""
    if "example" not in body:
        return ""
    return f"<br>for example <code>{html.escape(json.dumps(body['example']))}</code>"


def _default(form: dict[str, Any]) -> str:
    value = form.get("default")
    return "" if value is None else f"<code>{html.escape(str(value))}</code>"


def _type_of(form: dict[str, Any]) -> str:
    """A schema in a few words, with its bounds."""
    if "$ref" in form:
        name = form["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in form:
        return " or ".join(_type_of(one) for one in form["anyOf"] if one != {"type": "null"})
    if "enum" in form or "const" in form:
        values = form.get("enum", [form.get("const")])
        return " ".join(f"<code>{html.escape(repr(value))}</code>" for value in values)
    if form.get("type") == "array":
        return f"list of {_type_of(form.get('items', {}))}"
    bounds = [
        f"{sign} {form[name]}"
        for name, sign in (
            ("minimum", "&ge;"),
            ("exclusiveMinimum", "&gt;"),
            ("maximum", "&le;"),
            ("exclusiveMaximum", "&lt;"),
        )
        if name in form
    ]
    return " ".join([str(form.get("type", "")), *bounds])
