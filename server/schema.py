"""Body -> ChatRequest: what a well-formed request may ask for; a refusal names its `param`.

A field is honoured or refused, never dropped in silence: what this version cannot do is in the
tables below, and a field nobody knows is reported back by name. This file does not know Flask,
the model or its chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import SamplingParams
from enginehouse.server.message import ChatMessage
from enginehouse.server.shapes import WANTED_FIELD, Body, Message, Shape, found_text, parse_body


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that is legal in every field. max_tokens None: as many as the context holds."""

    model: str
    messages: tuple[ChatMessage, ...]
    stream: bool
    include_usage: bool
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    user: str | None
    ignored_fields: tuple[str, ...]

    def samplings(
        self, max_tokens: int, stop_token_ids: tuple[int, ...] = ()
    ) -> list[SamplingParams]:
        """One SamplingParams per choice.

        Choice i draws from seed + i, so that the choices of one seeded request differ. Seeds are
        folded into 63 bits: the page's limit lies 192 above 2**63, and those few seeds wrap.
        """
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                seed=None if self.seed is None else (self.seed + index) % 2**63,
                stop_token_ids=stop_token_ids,
            )
            for index in range(self.n)
        ]


# Known fields that would change the answer, or make a promise this server does not keep, with
# the values that ask for nothing: those pass, all others are refused.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (0,),
    "reasoning_effort": ("none",),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking": (),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
UNSUPPORTED_IN_MESSAGES: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": (),
    "refusal": ("",),
}
UNSUPPORTED_IN_STREAM_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "continuous_usage_stats": (False,),
}


def parse_chat_request(body: bytes, max_messages: int | None = None) -> ChatRequest:
    """Read one request body; RequestError names the first field at fault.

    max_messages: the context's length, as every message takes a token at least.
    """
    shape = parse_body(body, max_messages)
    ignored = _unknown_fields(shape, "", "", UNSUPPORTED)
    messages = []
    for index, message in enumerate(shape.messages):
        path = f"messages[{index}]"
        ignored += _unknown_fields(message, f"{path}.", "messages[].", UNSUPPORTED_IN_MESSAGES)
        for part in message.content:
            ignored += _unknown_fields(part, "", "messages[].content[].", {})
        messages.append(_message(message, path))
    include_usage = _include_usage(shape, ignored)
    _check_conversation(messages)
    _refuse_tools_and_formats(shape)
    return ChatRequest(
        model=shape.model,
        messages=tuple(messages),
        stream=shape.stream,
        include_usage=include_usage,
        max_tokens=_max_tokens(shape),
        n=shape.n,
        stop=tuple(shape.stop),
        temperature=shape.temperature,
        top_p=shape.top_p,
        top_k=shape.top_k,
        min_p=shape.min_p,
        presence_penalty=shape.presence_penalty,
        frequency_penalty=shape.frequency_penalty,
        repetition_penalty=shape.repetition_penalty,
        seed=shape.seed,
        user=shape.user,
        ignored_fields=tuple(dict.fromkeys(ignored)),
    )


def _unknown_fields(
    shape: Shape, path: str, report: str, unsupported: Mapping[str, tuple[object, ...]]
) -> list[str]:
    """The fields nobody knows; RequestError for a known one that asks for what we cannot do.

    path is the object's place for a refusal, report its place in the list of ignored fields,
    where all messages share one spelling: a long conversation must not flood it.
    """
    unknown = []
    for name, value in (shape.model_extra or {}).items():
        if name not in unsupported:
            unknown.append(report + name)
        elif not any(type(value) is type(idle) and value == idle for idle in unsupported[name]):
            param = path + name
            _refuse(param, f"{param} is not supported by this version; leave it out")
    return unknown


def _refuse(param: str, message: str) -> NoReturn:
    raise RequestError(message, param=param, code="unsupported_parameter")


def _message(message: Message, path: str) -> ChatMessage:
    if message.tool_calls:
        _refuse(
            f"{path}.tool_calls",
            f"{path}.tool_calls: tool calls are not supported by this version; leave them out",
        )
    if not message.content:
        raise RequestError(
            f"{path}.content: missing; wanted {WANTED_FIELD['content']}",
            param=f"{path}.content",
            code="missing_required_parameter",
        )
    if message.role == "tool" and not message.tool_call_id:
        raise RequestError(
            f"{path}.tool_call_id: missing; wanted the id of the tool call this message answers",
            param=f"{path}.tool_call_id",
            code="missing_required_parameter",
        )
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content="\n".join(part.text for part in message.content),
        name=message.name,
        tool_call_id=message.tool_call_id if message.role == "tool" else None,
    )


def _check_conversation(messages: list[ChatMessage]) -> None:
    """The page's grammar: (user,assistant,tool)*,user and system messages anywhere.

    A conversation may also end with a tool's answer, as it does whenever a tool was called.
    """
    if not any(message.role == "user" for message in messages):
        raise RequestError(
            "messages: found no user message; wanted at least one",
            param="messages",
            code="invalid_value",
        )
    turns = [(index, item.role) for index, item in enumerate(messages) if item.role != "system"]
    index, role = turns[-1]
    if role not in ("user", "tool"):
        raise RequestError(
            f"messages[{index}].role: the last message that is not a system message has role "
            f'"{role}"; wanted "user" or "tool"',
            param=f"messages[{index}].role",
            code="invalid_value",
        )


def _refuse_tools_and_formats(shape: Body) -> None:
    choice = shape.tool_choice
    if isinstance(choice, dict):
        named = choice.get("function")
        legal = choice.get("type") == "function" and isinstance(named, dict) and "name" in named
    else:
        legal = choice is None or choice in ("none", "auto", "required")
    if not legal:
        raise RequestError(
            f'tool_choice: found {found_text(choice)}; wanted "none", "auto", "required" or '
            "an object that names a function",
            param="tool_choice",
            code="invalid_value",
        )
    if shape.tools:
        _refuse(
            "tools", "tools: this version does not call tools yet; leave out tools and tool_choice"
        )
    if choice not in (None, "none", "auto"):
        _refuse(
            "tool_choice",
            'tool_choice: this version does not call tools yet; wanted "none" or "auto"',
        )
    wanted = shape.response_format
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise RequestError(
            f"response_format.json_schema: missing; wanted {WANTED_FIELD['json_schema']}",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    if wanted.type != "text":
        _refuse(
            "response_format",
            f'response_format: this version does not enforce "{wanted.type}" yet; '
            'wanted {"type": "text"}',
        )


def _include_usage(shape: Body, ignored: list[str]) -> bool:
    options = shape.stream_options
    if options is None:
        return False
    if not shape.stream:
        raise RequestError(
            "stream_options: found without stream; wanted stream true, or no stream_options",
            param="stream_options",
            code="invalid_value",
        )
    path = "stream_options."
    ignored += _unknown_fields(options, path, path, UNSUPPORTED_IN_STREAM_OPTIONS)
    return options.include_usage


def _max_tokens(shape: Body) -> int | None:
    """max_completion_tokens is OpenAI's newer name for the same limit."""
    old, new = shape.max_tokens, shape.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_completion_tokens: {new} contradicts max_tokens: {old}; wanted one of the two, "
            "or both equal",
            param="max_completion_tokens",
            code="invalid_value",
        )
    return old if new is None else new
