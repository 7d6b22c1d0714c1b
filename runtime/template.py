"""The Jinja of chat templates, as transformers has it: one sandbox to judge and to render them.

What a build takes the server can therefore render. Knows no message, tokenizer or engine.
Source: `_cached_compile_jinja_template` of transformers' chat_template_utils.py, 5.23.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes, parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class CompiledTemplate(NamedTuple):
    """variables: the names that it reads and neither sets nor has from Jinja."""

    template: jinja2.Template
    variables: frozenset[str]


def compile_template(source: str) -> CompiledTemplate:
    """Compile a chat template; jinja2.TemplateSyntaxError, with the line, for what is none."""
    environment = _environment()
    try:
        template = environment.from_string(source)
    except SyntaxError as error:  # of the Python that Jinja makes: a `break` out of a generation
        raise jinja2.TemplateSyntaxError(error.msg, 0) from None
    read = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return CompiledTemplate(template, frozenset(read - environment.globals.keys()))


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it prints its body."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a block of its own, as transformers has it: what is set in it is not seen behind it
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of Python's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` without names that begin with `_`, which lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        self, *rest = args
        for name in (values := dict(*rest, **kwargs)):
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a chat template may not keep {name!r} in a namespace: it begins with _"
        )


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
