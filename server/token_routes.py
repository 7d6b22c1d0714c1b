"""/tokenize, /detokenize, /apply-template: what stands between a request and the engine.

Bodies and answers of the first two are vLLM's; the third takes vLLM's fields for a conversation
and answers {"prompt": TEXT}, as llama.cpp's server does.
"""

from __future__ import annotations

from typing import Any

from flask import Response

from enginehouse.server.asked import ignored_fields
from enginehouse.server.bodies import (
    DetokenizeBody,
    TemplateBody,
    TokenizeBody,
    TokenizeChatBody,
)
from enginehouse.server.json_body import decode_json
from enginehouse.server.prompts import check_token_ids, detokenize, tokenize
from enginehouse.server.refusal import parse_body, refuse, validate
from enginehouse.server.responses import json_response
from enginehouse.server.schema import check_num_messages, read_conversation
from enginehouse.server.service import Service, tell_ignored


def tokenize_route(service: Service) -> Response:
    shape = service.read(_parse_tokenize)
    ignored = ignored_fields(shape)
    _check_model(service, shape.model)
    text = shape.prompt if isinstance(shape, TokenizeBody) else _render(service, shape)
    ids = tokenize(service.chat, text, shape.add_special_tokens)
    info = service.info
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": info.max_seq_len if info else None,
        "tokens": ids,
        "token_strs": None,
    }
    if shape.return_token_strs:
        answer["token_strs"] = [service.chat.pieces.name(token_id) for token_id in ids]
    return tell_ignored(json_response(answer), ignored)


def detokenize_route(service: Service) -> Response:
    shape = service.read(lambda body: parse_body(DetokenizeBody, body, lambda data: None))
    ignored = ignored_fields(shape)
    _check_model(service, shape.model)
    vocab_size = service.chat.tokenizer.get_vocab_size(with_added_tokens=True)
    check_token_ids(shape.tokens, vocab_size, "tokens")
    return tell_ignored(json_response({"prompt": detokenize(service.chat, shape.tokens)}), ignored)


def apply_template_route(service: Service) -> Response:
    shape = service.read(lambda body: parse_body(TemplateBody, body, lambda data: None))
    ignored = ignored_fields(shape)
    _check_model(service, shape.model)
    return tell_ignored(json_response({"prompt": _render(service, shape)}), ignored)


def _parse_tokenize(body: bytes) -> TokenizeBody | TokenizeChatBody:
    data = decode_json(body)
    if data.get("messages") is None:
        return validate(TokenizeBody, data)
    if data.get("prompt") is not None:
        refuse("prompt", "contradicts messages; wanted one of the two")
    return validate(TokenizeChatBody, data)


def _render(service: Service, shape: TokenizeChatBody | TemplateBody) -> str:
    if shape.tools:
        refuse("tools", "this version does not render tools yet", "unsupported_parameter")
    info = service.info
    check_num_messages({"messages": shape.messages}, info.max_seq_len if info else None)
    messages, options = read_conversation(shape)
    return service.chat.render(messages, options)


def _check_model(service: Service, name: str | None) -> None:
    if name is not None:
        service.check_model(name, param="model")
