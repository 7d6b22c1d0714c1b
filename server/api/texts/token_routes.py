"""What stands between a request and the engine: /tokenize, /detokenize, /apply-template,
/tokenizer_info.

Bodies and answers are vLLM's, but that /apply-template takes vLLM's fields for a conversation
and answers {"prompt": TEXT}, as llama.cpp's server does. None of them asks the model: a token that
the tokenizer has and the model has not is told like any other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flask import Response

from enginehouse.server.api.chat.request import (
    check_num_messages,
    read_conversation,
    read_tools,
)
from enginehouse.server.http.service import Service, tell
from enginehouse.server.prompt.prompts import check_tokens, detokenize, tokenize
from enginehouse.server.prompt.tokenizer_info import tokenizer_info
from enginehouse.server.request.asked import ignored_fields
from enginehouse.server.tools.tool_choice import ToolUse
from enginehouse.server.wire.bodies import (
    DetokenizeBody,
    TemplateBody,
    TokenizeBody,
    TokenizeChatBody,
)
from enginehouse.server.wire.json_body import decode_json
from enginehouse.server.wire.refusal import parse_body, refuse, validate
from enginehouse.server.wire.responses import json_response


def tokenize_route(service: Service) -> Response:
    max_messages = service.max_messages
    shape = service.read(lambda body: _parse_tokenize(body, max_messages))
    ignored = ignored_fields(shape)
    _check_model(service, shape.model)
    if isinstance(shape, TokenizeBody):
        text, unread = shape.prompt, list[str]()
    else:
        text, unread = _render(service, shape)
    ids = tokenize(service.chat, text, shape.add_special_tokens)
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": max_messages,
        "tokens": ids,
        "token_strs": None,
    }
    if shape.return_token_strs:
        answer["token_strs"] = [service.chat.pieces.name(token_id) for token_id in ids]
    return tell(json_response(answer), [*ignored, *unread])


def detokenize_route(service: Service) -> Response:
    shape = service.read(lambda body: parse_body(DetokenizeBody, body, lambda data: None))
    ignored = ignored_fields(shape)
    _check_model(service, shape.model)
    vocab_size = service.chat.tokenizer.get_vocab_size(with_added_tokens=True)
    check_tokens(service.chat, shape.tokens, vocab_size, "tokens", are_ids=True)
    return tell(json_response({"prompt": detokenize(service.chat, shape.tokens)}), ignored)


def apply_template_route(service: Service) -> Response:
    max_messages = service.max_messages
    shape = service.read(
        lambda body: parse_body(
            TemplateBody, body, lambda data: check_num_messages(data, max_messages)
        )
    )
    ignored = ignored_fields(shape)
    _check_model(service, shape.model)
    text, unread = _render(service, shape)
    return tell(json_response({"prompt": text}), [*ignored, *unread])


def tokenizer_info_route(service: Service) -> Response:
    return json_response(tokenizer_info(service.chat, service.max_messages))


def _parse_tokenize(body: bytes, max_messages: int | None) -> TokenizeBody | TokenizeChatBody:
    data = decode_json(body)
    if data.get("messages") is None:
        return validate(TokenizeBody, data)
    if data.get("prompt") is not None:
        refuse("prompt", "contradicts messages; wanted one of the two")
    check_num_messages(data, max_messages)
    return validate(TokenizeChatBody, data)


def _render(service: Service, shape: TokenizeChatBody | TemplateBody) -> tuple[str, list[str]]:
    """The prompt, and the fields that the chat template makes nothing of."""
    conversation = read_conversation(shape)
    options = replace(conversation.options, tools=ToolUse(read_tools(shape.tools)))
    return service.chat.render(conversation.messages, options), service.chat.unread(options)


def _check_model(service: Service, name: str | None) -> None:
    if name is not None:
        service.check_model(name, param="model")
