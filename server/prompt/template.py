"""One compiled chat template: what it does with messages, calls and tools, and how it renders them.

What a template does is found out by trying it, once, when the engine is opened. This file does not
know HTTP, tokenizers or how an answer is read.
Source: the rendering rules of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import jinja2

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.template import compile_template
from enginehouse.server.prompt.options import PLAIN_PROMPT, PromptOptions
from enginehouse.server.text.message import ChatMessage, ToolCall
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse

_PROBE = "enginehouseprobe"
_CUT = "enginehousecutshere "  # its space tells whether a template trims what it is given
_NUMBERED = "<|tool_call_argument_begin|>"  # Kimi K2's: before it stands a call's id
_CHANNELS = "<|channel|>"  # GPT-OSS's: beside a call it takes a thought or words, not both
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
# What a template can do wrong with the messages it is given; all else is a bug of ours.
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError),
)


class ChatTemplate:
    """What a template was seen to do, and its rendering.

    keeps_system, keeps_tool, keeps_calls: such a message, or the calls in one, reach the prompt.
    system_anywhere: a system message that is not the first is kept in its place.
    knows_tools: the functions of a request reach the prompt. takes_several_calls: in one message.
    variables: what it reads beside the messages, tools and special tokens it is given anyhow.
    """

    def __init__(self, source: str, special_tokens: dict[str, str | list[str]]) -> None:
        self.source = source
        try:
            self._template, read = compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise EngineError(f"the chat template does not compile: {error}") from None
        self._special_tokens = special_tokens
        self.variables = read - _OWN_VARIABLES - special_tokens.keys()
        self._arguments_as_text = self._short_ids = self._names_apart = False
        user, assistant = ChatMessage("user", "one"), ChatMessage("assistant", "two")
        system, tool = ChatMessage("system", _PROBE), ChatMessage("tool", _PROBE, None, "call0")
        self.keeps_system = self._keeps([system, user])
        self.system_anywhere = self._keeps([user, assistant, system, user])
        call = ToolCall("call0", "f", {"x": _PROBE})
        self.keeps_calls = self._settle_calls([user, *_called(call)])
        self.takes_several_calls = self._keeps([user, *_called(replace(call, arguments={}), call)])
        self.keeps_tool = self._keeps([user, assistant, tool]) or self._keeps(
            [user, _called(replace(call, arguments={}))[0], tool]
        )
        self._full_tools = False
        self.knows_tools = self._settle_tools(user)

    def render(self, messages: Sequence[ChatMessage], options: PromptOptions = PLAIN_PROMPT) -> str:
        """The prompt's text. RequestError when the template refuses the conversation."""
        ids = self._ids(messages)
        shown = [self._to_template(message, ids) for message in messages]
        if options.continue_final_message:
            shown[-1]["content"] += _CUT
        try:
            text = self._template.render(
                messages=shown,
                tools=[self._tool(tool) for tool in options.tools.shown] or None,
                documents=None,
                add_generation_prompt=options.add_generation_prompt,
                **self._special_tokens,
                **self.read_variables(options),
            )
        except _TEMPLATE_ERRORS as error:
            raise RequestError(
                f"messages: the model's chat template refuses this conversation: {error}",
                param="messages",
                code="invalid_value",
            ) from None
        return _cut(text, messages[-1].content) if options.continue_final_message else text

    def read_variables(self, options: PromptOptions) -> dict[str, Any]:
        """Of the request's variables those that this template reads, its effort among them."""
        effort = options.reasoning_effort
        asked: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if effort == "none":
            asked |= {"enable_thinking": False, "thinking": False}
        asked |= options.variables
        return {name: value for name, value in asked.items() if name in self.variables}

    def unread(self, options: PromptOptions) -> list[str]:
        """The fields of a request that this template makes nothing of."""
        read = self.read_variables(options)
        names = [f"chat_template_kwargs.{name}" for name in options.variables if name not in read]
        if options.reasoning_effort is not None and not read.keys() - options.variables.keys():
            names.append("reasoning_effort")
        return names

    def _to_template(self, message: ChatMessage, ids: Mapping[str, str]) -> dict[str, Any]:
        """The message as this template was found to take it. ids: of calls, as they are shown."""
        if self._names_apart:
            return _with_name_apart(message)
        fields = message.to_template()
        for call, made in zip(fields.get("tool_calls", ()), message.tool_calls, strict=False):
            if self._arguments_as_text:
                text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                call["function"]["arguments"] = text if made.unread is None else made.unread
            call["id"] = ids.get(call["id"], call["id"])
        if "tool_call_id" in fields:
            fields["tool_call_id"] = ids.get(fields["tool_call_id"], fields["tool_call_id"])
        if message.reasoning_content is not None and "message.thinking" in self.source:
            fields["thinking"] = message.reasoning_content  # GPT-OSS and LFM2 call it so
            if message.tool_calls and message.content and _CHANNELS in self.source:
                fields["thinking"] += f"\n\n{message.content}"
                fields["content"] = ""
        return fields

    def _ids(self, messages: Sequence[ChatMessage]) -> dict[str, str]:
        """The ids of calls as the template wants them, where it wants them otherwise."""
        calls = [call for message in messages for call in message.tool_calls]
        if _NUMBERED in self.source:  # the id is what the model calls a function by
            return {call.id: f"functions.{call.name}:{i}" for i, call in enumerate(calls)}
        if not self._short_ids:
            return {}
        results = [item.tool_call_id for item in messages if item.tool_call_id is not None]
        return {each: _short_id(each) for each in (*(call.id for call in calls), *results)}

    def _num_probes(
        self, messages: Sequence[ChatMessage], options: PromptOptions = PLAIN_PROMPT
    ) -> int:
        try:
            return self.render(messages, options).count(_PROBE)
        except RequestError:
            return 0

    def _keeps(self, messages: Sequence[ChatMessage]) -> bool:
        """The probe reaches the prompt; once, as else it would be a guess where it belongs."""
        return self._num_probes(messages) == 1

    def _settle_calls(self, messages: Sequence[ChatMessage]) -> bool:
        """Find the form of calls that it shows: arguments as an object or text, any id or short.

        GLM-4's has a function's name as `metadata`, its arguments as content, and results of
        the role `observation`.
        """
        for self._arguments_as_text, self._short_ids in product((False, True), repeat=2):
            if self._keeps(messages):
                return True
        self._arguments_as_text = self._short_ids = False
        self._names_apart = "metadata" in self.source
        return self._names_apart and self._keeps(messages)

    def _settle_tools(self, user: ChatMessage) -> bool:
        """Find whether it shows tools, and whether each must have a description and properties."""
        shown = PromptOptions(tools=ToolUse((ToolFunction(_PROBE),)))
        for self._full_tools in (False, True):
            if self._num_probes([user], shown) > 0:
                return True
        self._full_tools = False
        return False

    def _tool(self, tool: ToolFunction) -> dict[str, Any]:
        shown = tool.to_template()
        if self._full_tools:
            function = shown["function"]
            function.setdefault("description", "")
            function["parameters"] = {"type": "object", "properties": {}, **function["parameters"]}
        return shown

    def arrange(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """The messages in an order and form this template takes, or RequestError.

        Where the template knows a system message only at the front, one found later moves there;
        several would have to be merged, which is not what was asked, and are refused. Where it
        takes one call in a message, each call gets a message, with its result behind it.
        """
        if not self.takes_several_calls:
            messages = _one_call_each(messages)
        if self._names_apart:
            messages = [part for message in messages for part in _words_and_calls(message)]
        systems = [index for index, item in enumerate(messages) if item.role == "system"]
        tools = [index for index, item in enumerate(messages) if item.role == "tool"]
        if tools and not self.keeps_tool:
            raise _role_refused(tools[0], "this model's chat template has no tool messages")
        if systems and not self.keeps_system:
            raise _role_refused(systems[0], "this model's chat template has no system message")
        if systems in ([], [0]) or self.system_anywhere:
            return list(messages)
        if len(systems) > 1:
            raise _role_refused(
                systems[1], "this model's chat template takes one system message; found another"
            )
        rest = [item for item in messages if item.role != "system"]
        return [messages[systems[0]], *rest]


def _called(*calls: ToolCall) -> list[ChatMessage]:
    results = [ChatMessage("tool", "three", call.name, call.id) for call in calls]
    return [ChatMessage("assistant", "", tool_calls=calls), *results]


def _one_call_each(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    arranged: list[ChatMessage] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if len(message.tool_calls) < 2:
            arranged.append(message)
            continue
        results = []
        while rest and rest[0].role == "tool":
            results.append(rest.pop(0))
        said = message
        for call in message.tool_calls:
            arranged.append(replace(said, tool_calls=(call,)))
            arranged += [item for item in results if item.tool_call_id == call.id]
            said = replace(message, content="", reasoning_content=None)
        known = {call.id for call in message.tool_calls}
        arranged += [item for item in results if item.tool_call_id not in known]
    return arranged


def _words_and_calls(message: ChatMessage) -> list[ChatMessage]:
    """What is said beside a call as a message of its own."""
    if not message.tool_calls or not message.content:
        return [message]
    return [replace(message, tool_calls=()), replace(message, content="")]


def _with_name_apart(message: ChatMessage) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "observation", "content": message.content}
    if not message.tool_calls:
        return message.to_template()
    call = message.tool_calls[0]
    text = json.dumps(dict(call.arguments), ensure_ascii=False)
    content = text if call.unread is None else call.unread
    return {"role": message.role, "metadata": call.name, "content": content}


def _cut(text: str, content: str) -> str:
    """What stands before the mark; without white space at its end where the template trims."""
    before, found, after = text.rpartition(_CUT.strip())
    if not found or content.strip() not in text:
        raise RequestError(
            "continue_final_message: this model's chat template does not show the final message "
            "as it is; leave continue_final_message out",
            param="continue_final_message",
            code="unsupported_parameter",
        )
    return before if after.startswith(" ") else before.rstrip()


def _short_id(call_id: str) -> str:
    """Nine letters and digits, as Mistral's templates want them."""
    if len(call_id) == 9 and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _role_refused(index: int, why: str) -> RequestError:
    param = f"messages[{index}].role"
    return RequestError(f"{param}: {why}", param=param, code="unsupported_parameter")
