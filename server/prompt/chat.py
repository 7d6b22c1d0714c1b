"""Messages -> prompt ids, by the engine directory's own chat template and tokenizer.

Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.
This file does not know HTTP, sampling or the engine host.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from gevent import get_hub, monkey
from tokenizers import Tokenizer

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.server.formats.choose import choose_format
from enginehouse.server.formats.llama import GenericJson
from enginehouse.server.prompt.options import PLAIN_PROMPT, PromptOptions
from enginehouse.server.prompt.template import ChatTemplate
from enginehouse.server.prompt.tool_messages import as_text, calls_as_text
from enginehouse.server.text.detokenizer import TokenPieces
from enginehouse.server.text.message import ChatMessage
from enginehouse.server.text.reasoning import Marks, marks_of
from enginehouse.server.tools.format import Format
from enginehouse.server.tools.tool_choice import ToolUse

MAX_INLINE_CHARS = 2_000  # longer prompts are rendered and tokenised beside the event loop
_CHARS_AROUND = 32  # what a template writes around each message, about

T = TypeVar("T")


class Prompt(NamedTuple):
    text: str
    ids: list[int]


class Chat:
    """The text side of an engine directory: template, tokenizer, token texts, stop tokens.

    tool_format: how the model writes calls; None: it is not to call tools. marks: of reasoning at
    the head of its answers; None: there is none. tokenizer_config: the file's, as it is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        stop_token_ids: tuple[int, ...] = (),
        *,
        tool_template: ChatTemplate | None = None,
        tool_format: str = "auto",
        reasoning_format: str = "auto",
        tokenizer_config: dict[str, Any] | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.tokenizer_config = tokenizer_config or {}
        self.template = template
        self._tool_template = tool_template  # for requests with tools, where it is another
        shown = tool_template or template
        source = None if shown is None else shown.source
        self.tool_format: Format | None = choose_format(source, tool_format)
        self.marks: Marks | None = marks_of(source, reasoning_format)
        self.stop_token_ids = stop_token_ids
        self.pieces = TokenPieces(tokenizer)
        self._longest_token = _longest_token(tokenizer)

    def prompt(
        self,
        messages: Sequence[ChatMessage],
        max_seq_len: int,
        options: PromptOptions = PLAIN_PROMPT,
    ) -> Prompt:
        """Render and tokenise; RequestError when the prompt leaves no room for an answer."""
        num_chars = sum(len(message.content) + _CHARS_AROUND for message in messages)
        num_chars += sum(len(str(call.arguments)) for item in messages for call in item.tool_calls)
        num_chars += sum(len(str(item.to_template())) for item in options.tools.shown)
        if num_chars <= MAX_INLINE_CHARS:
            return self._prompt(messages, max_seq_len, options)
        return call_beside_the_loop(lambda: self._prompt(messages, max_seq_len, options))

    def render(self, messages: Sequence[ChatMessage], options: PromptOptions = PLAIN_PROMPT) -> str:
        """The prompt's text.

        Tools and calls are the template's business where it knows them and writes them in the
        engine's tool format; else they are put into the messages as text.
        """
        if self.template is None:
            raise RequestError(
                "messages: this engine has no chat template; build it from a checkpoint that has "
                "one in tokenizer_config.json or chat_template.jinja",
                param="messages",
                code="no_chat_template",
            )
        tools = options.tools.shown
        template = self._template_of(options)
        if tools and self.tool_format is None:
            raise RequestError(
                "tools: this engine's tool_format is none, it calls no tools; leave tools out",
                param="tools",
                code="unsupported_parameter",
            )
        form = self.tool_format or GenericJson()
        if template.knows_tools and not template.keeps_calls and form.in_template:  # Granite's 3
            messages = calls_as_text(messages, form)
        if not self._takes(template, messages, bool(tools)):
            messages = as_text(messages, form, tools, template.keeps_system)
            options = replace(options, tools=ToolUse())
        return template.render(template.arrange(messages), options)

    def unread(self, options: PromptOptions) -> list[str]:
        """The fields of a request that the chat template makes nothing of."""
        return [] if self.template is None else self._template_of(options).unread(options)

    def _template_of(self, options: PromptOptions) -> ChatTemplate:
        """As transformers chooses: the one named tool_use where tools are shown and it is there."""
        assert self.template is not None
        return (self._tool_template if options.tools.shown else None) or self.template

    def _takes(
        self, template: ChatTemplate, messages: Sequence[ChatMessage], has_tools: bool
    ) -> bool:
        has_calls = any(message.tool_calls for message in messages)
        if self.tool_format is not None and not self.tool_format.in_template:
            return not has_tools and not has_calls
        has_results = any(message.role == "tool" for message in messages)
        return (
            (template.knows_tools or not has_tools)
            and (template.keeps_calls or not has_calls)
            and (template.keeps_tool or not has_results)
        )

    def _prompt(
        self, messages: Sequence[ChatMessage], max_seq_len: int, options: PromptOptions
    ) -> Prompt:
        text = self.render(messages, options)
        self.check_length(text, max_seq_len)
        # The batch call, unlike encode(), lets other threads run meanwhile.
        [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids = list(encoding.ids)
        if not ids:
            raise RequestError("messages: the prompt is empty", param="messages")
        if len(ids) >= max_seq_len:
            raise RequestError(
                f"messages: the prompt is too long: it has {len(ids)} tokens, and this model's "
                f"maximum context length is {max_seq_len} tokens, the answer included; shorten the "
                "conversation",
                param="messages",
                code="context_length_exceeded",
            )
        return Prompt(text, ids)

    def check_length(self, text: str, max_seq_len: int, param: str = "messages") -> None:
        """Refuse what cannot fit before a core spends seconds on counting its tokens."""
        if self._longest_token and len(text) > max_seq_len * self._longest_token:
            at_least = -(-len(text) // self._longest_token)
            raise RequestError(
                f"{param}: the prompt is too long: it has {len(text)} characters, which are more "
                f"than {at_least - 1} tokens, and this model's maximum context length is "
                f"{max_seq_len} tokens; shorten it",
                param=param,
                code="context_length_exceeded",
            )


@dataclass(frozen=True, slots=True)
class _TokenizerConfig:
    special_tokens: dict[str, str | list[str]]
    chat_template: str | None
    tool_template: str | None
    eos_token: str | None


def load_chat(engine_dir: Path, tool_format: str = "auto", reasoning_format: str = "auto") -> Chat:
    """Open the text side of an engine directory; EngineError when a file cannot be used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork, cores are the engine's
    path = engine_dir / "tokenizer.json"
    if not path.is_file():
        raise EngineError(f"{path} is missing; build the engine again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception, nothing narrower
        raise EngineError(f"{path} cannot be used: {error}") from None
    tokenizer_config = _read_json(engine_dir / "tokenizer_config.json")
    config = _read_tokenizer_config(tokenizer_config)
    template_path = engine_dir / "chat_template.jinja"
    source = config.chat_template
    if template_path.is_file():
        source = _read_text(template_path)
    template, for_tools = (
        None if text is None else ChatTemplate(text, config.special_tokens)
        for text in (source, config.tool_template)
    )
    return Chat(
        tokenizer,
        template,
        _stop_token_ids(engine_dir, tokenizer, config.eos_token),
        tool_template=for_tools,
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        tokenizer_config=tokenizer_config,
    )


def call_beside_the_loop(function: Callable[[], T]) -> T:
    """Run a slow function in a native thread where gevent rules, else right here."""
    if not monkey.is_module_patched("threading"):
        return function()

    # The pool prints the traceback of what a job raises: a refusal is no news, so it is carried.
    def attempt() -> tuple[T | None, RequestError | None]:
        try:
            return function(), None
        except RequestError as error:
            return None, error

    result, error = get_hub().threadpool.apply(attempt)
    if error is not None:
        raise error
    return cast(T, result)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = _read_text(path)
    try:
        data = json.loads(text)
        json.dumps(data, ensure_ascii=False).encode()  # half surrogates, which no prompt can hold
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not JSON: {error}; build the engine again") from None
    return data if isinstance(data, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} cannot be read: {error}; build the engine again") from None


def _read_tokenizer_config(data: dict[str, Any]) -> _TokenizerConfig:
    special: dict[str, str | list[str]] = {}
    for key, value in data.items():
        if key.endswith("_token") and (text := _token_text(value)) is not None:
            special[key] = text
    if isinstance(more := data.get("additional_special_tokens"), list):
        texts = [_token_text(value) for value in more]
        special["additional_special_tokens"] = [text for text in texts if text is not None]
    source, for_tools = data.get("chat_template"), None
    if isinstance(source, list):  # several named templates: the default one is for plain chat
        named = {item.get("name"): item.get("template") for item in source if type(item) is dict}
        for_tools = _text_or_none(named.get("tool_use"))
        source = named.get("default", for_tools)
    eos_token = _token_text(data.get("eos_token"))
    return _TokenizerConfig(special, _text_or_none(source), for_tools, eos_token)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _stop_token_ids(
    engine_dir: Path, tokenizer: Tokenizer, eos_token: str | None
) -> tuple[int, ...]:
    """Every token that ends a turn: generation_config.json often lists more than one."""
    listed = _read_json(engine_dir / "generation_config.json").get("eos_token_id")
    ids = {
        item
        for item in (listed if isinstance(listed, list) else [listed])
        if isinstance(item, int) and item >= 0
    }
    if eos_token is not None and (eos_id := tokenizer.token_to_id(eos_token)) is not None:
        ids.add(eos_id)
    return tuple(sorted(ids))


def _longest_token(tokenizer: Tokenizer) -> int | None:
    """No token stands for more characters than this; None where no such bound holds.

    A normalizer may shrink text, and an unknown-token may swallow any length of it.
    """
    spec = json.loads(tokenizer.to_str())
    if spec["normalizer"] is not None or "ByteLevel" not in json.dumps(spec["decoder"]):
        return None
    return max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=None)
