"""Messages -> prompt ids, by the engine directory's own chat template and tokenizer.

Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.
What a template does with a message is found out by trying it, once, when the engine is opened.
This file does not know HTTP, sampling or the engine host.
Source: the rendering rules of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jinja2
import jinja2.ext
import jinja2.meta
from gevent import get_hub, monkey
from jinja2 import nodes, parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.server.detokenizer import TokenPieces
from enginehouse.server.message import ChatMessage
from enginehouse.server.schema import PLAIN_PROMPT, PromptOptions

MAX_INLINE_CHARS = 2_000  # longer prompts are rendered and tokenised beside the event loop
_CHARS_AROUND = 32  # what a template writes around each message, about
_PROBE = "enginehouseprobe"
_CUT = "enginehousecutshere "  # its space tells whether a template trims what it is given
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
# What a template can do wrong with the messages it is given; all else is a bug of ours.
_TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError)

T = TypeVar("T")


class Prompt(NamedTuple):
    text: str
    ids: list[int]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it prints its body."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled chat template, and what it was seen to do with system and tool messages.

    system_anywhere: a system message that is not the first is kept in its place.
    keeps_system, keeps_tool: such a message reaches the prompt at all.
    variables: what it reads beside the messages, tools and special tokens it is given anyhow.
    """

    def __init__(self, source: str, special_tokens: dict[str, str | list[str]]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise EngineError(f"the chat template does not compile: {error}") from None
        self._special_tokens = special_tokens
        read = jinja2.meta.find_undeclared_variables(environment.parse(source))
        self.variables = read - _OWN_VARIABLES - special_tokens.keys() - environment.globals.keys()
        user, assistant = ChatMessage("user", "one"), ChatMessage("assistant", "two")
        system, tool = ChatMessage("system", _PROBE), ChatMessage("tool", _PROBE, None, "call0")
        self.keeps_system = self._keeps([system, user])
        self.keeps_tool = self._keeps([user, assistant, tool])
        self.system_anywhere = self._keeps([user, assistant, system, user])

    def render(self, messages: Sequence[ChatMessage], options: PromptOptions = PLAIN_PROMPT) -> str:
        """The prompt's text; as options say, with the opening of the assistant's turn, or cut off
        where the final message ends.
        """
        for name in options.variables:
            if name not in self.variables:
                raise _variable_refused(name, self.variables)
        shown = [message.to_template() for message in messages]
        if options.continue_final_message:
            shown[-1]["content"] += _CUT
        try:
            text = self._template.render(
                messages=shown,
                tools=None,
                documents=None,
                add_generation_prompt=options.add_generation_prompt,
                **self._special_tokens,
                **options.variables,
            )
        except _TEMPLATE_ERRORS as error:
            raise RequestError(
                f"messages: the model's chat template refuses this conversation: {error}",
                param="messages",
                code="invalid_value",
            ) from None
        return _cut(text) if options.continue_final_message else text

    def _keeps(self, messages: Sequence[ChatMessage]) -> bool:
        try:
            return self.render(messages).count(_PROBE) == 1
        except RequestError:
            return False

    def arrange(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """The messages in an order this template takes, or RequestError.

        Where the template knows a system message only at the front, one found later moves there;
        several would have to be merged, which is not what was asked, and are refused.
        """
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


class Chat:
    """The text side of an engine directory: template, tokenizer, token texts, stop tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.template = template
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
        if num_chars <= MAX_INLINE_CHARS:
            return self._prompt(messages, max_seq_len, options)
        return call_beside_the_loop(lambda: self._prompt(messages, max_seq_len, options))

    def render(self, messages: Sequence[ChatMessage], options: PromptOptions) -> str:
        """The prompt's text; RequestError when there is no template, or it refuses."""
        if self.template is None:
            raise RequestError(
                "messages: this engine has no chat template; build it from a checkpoint that has "
                "one in tokenizer_config.json or chat_template.jinja",
                param="messages",
                code="no_chat_template",
            )
        return self.template.render(self.template.arrange(messages), options)

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
                f"messages: the prompt has {len(ids)} tokens and this engine's context holds "
                f"{max_seq_len}, the answer included; shorten the conversation",
                param="messages",
                code="context_length_exceeded",
            )
        return Prompt(text, ids)

    def check_length(self, text: str, max_seq_len: int, param: str = "messages") -> None:
        """Refuse what cannot fit before a core spends seconds on counting its tokens."""
        if self._longest_token and len(text) > max_seq_len * self._longest_token:
            at_least = -(-len(text) // self._longest_token)
            raise RequestError(
                f"{param}: the prompt has {len(text)} characters, which are more than "
                f"{at_least - 1} tokens, and this engine's context holds {max_seq_len}; "
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )


@dataclass(frozen=True, slots=True)
class _TokenizerConfig:
    special_tokens: dict[str, str | list[str]]
    chat_template: str | None
    eos_token: str | None


def load_chat(engine_dir: Path) -> Chat:
    """Open the text side of an engine directory; EngineError when a file cannot be used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork, cores are the engine's
    path = engine_dir / "tokenizer.json"
    if not path.is_file():
        raise EngineError(f"{path} is missing; build the engine again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception, nothing narrower
        raise EngineError(f"{path} cannot be used: {error}") from None
    config = _read_tokenizer_config(engine_dir)
    template_path = engine_dir / "chat_template.jinja"
    source = config.chat_template
    if template_path.is_file():
        source = template_path.read_text(encoding="utf-8")
    template = None if source is None else ChatTemplate(source, config.special_tokens)
    return Chat(tokenizer, template, _stop_token_ids(engine_dir, tokenizer, config.eos_token))


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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngineError(f"{path} is not JSON: {error}") from None
    return data if isinstance(data, dict) else {}


def _read_tokenizer_config(engine_dir: Path) -> _TokenizerConfig:
    data = _read_json(engine_dir / "tokenizer_config.json")
    special: dict[str, str | list[str]] = {}
    for key, value in data.items():
        if key.endswith("_token") and (text := _token_text(value)) is not None:
            special[key] = text
    if isinstance(more := data.get("additional_special_tokens"), list):
        texts = [_token_text(value) for value in more]
        special["additional_special_tokens"] = [text for text in texts if text is not None]
    source = data.get("chat_template")
    if isinstance(source, list):  # several named templates: the default one is for plain chat
        named = {item.get("name"): item.get("template") for item in source}
        source = named.get("default")
    eos_token = _token_text(data.get("eos_token"))
    return _TokenizerConfig(special, source if isinstance(source, str) else None, eos_token)


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _stop_token_ids(
    engine_dir: Path, tokenizer: Tokenizer, eos_token: str | None
) -> tuple[int, ...]:
    """Every token that ends a turn: generation_config.json often lists more than one."""
    listed = _read_json(engine_dir / "generation_config.json").get("eos_token_id")
    ids = {item for item in (listed if isinstance(listed, list) else [listed]) if item is not None}
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


def _role_refused(index: int, why: str) -> RequestError:
    param = f"messages[{index}].role"
    return RequestError(f"{param}: {why}", param=param, code="unsupported_parameter")


def _variable_refused(name: str, known: Set[str]) -> RequestError:
    param = f"chat_template_kwargs.{name[:64]}"
    wanted = f"wanted one of {', '.join(sorted(known))}" if known else "it reads none"
    return RequestError(
        f"{param}: this model's chat template reads no such variable; {wanted}",
        param=param,
        code="unsupported_parameter",
    )


def _cut(text: str) -> str:
    """What stands before the mark; without white space at its end where the template trims."""
    before, found, after = text.rpartition(_CUT.strip())
    if not found:
        raise RequestError(
            "continue_final_message: this model's chat template does not show the final message",
            param="continue_final_message",
            code="unsupported_parameter",
        )
    return before if after.startswith(" ") else before.rstrip()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: jinja's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
