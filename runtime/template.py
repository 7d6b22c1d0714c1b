"""The Jinja of chat templates, as transformers has it: one sandbox to judge and to render them.

What a build takes the server can therefore render. Knows no message, tokenizer or engine.
Source: `_cached_compile_jinja_template` of transformers' chat_template_utils.py, 5.23.
"""

from __future__ import annotations

import functools
import json
import re
import string
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes, parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# Of one rendering. A template comes with a checkpoint, whoever made that: it may not hold a server
# up by loops within loops, nor fill its memory by doubling a text.
MAX_TURNS, MAX_S = 1_000_000, 5.0
MAX_SIZE = 32 << 20  # characters of a text or of all that is printed, items of a list
MAX_MADE = 1 << 30  # of all texts and lists together
_TURNS_A_LOOK = 256  # between looks at the clock
_LONGEST_INT = 4096  # bits
_OURS = ("_turn", "_join")
_SIZED = (str, list, tuple)
_WIDE_METHODS = ("center", "expandtabs", "ljust", "rjust", "zfill")
_WIDE_FILTERS = ("batch", "center", "indent", "slice", "tojson", "truncate", "wordwrap")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*([0-9]+|\*)?(?:\.([0-9]+|\*))?")


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
    template.globals = dict(template.globals)  # Jinja's chain of them is walked by each rendering
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


class _Budget:
    """What a rendering may still take: turns, its thread's seconds, what is made and printed."""

    def __init__(self) -> None:
        self._turns, self._look_at = MAX_TURNS, MAX_TURNS - _TURNS_A_LOOK
        self._end_s = time.thread_time() + MAX_S
        self._made = self._printed = 0

    def spend(self, turns: int) -> None:
        self._turns -= turns
        late = False
        if self._turns <= self._look_at:
            self._look_at = self._turns - _TURNS_A_LOOK
            late = time.thread_time() > self._end_s
        if self._turns < 0 or late:
            raise jinja2.exceptions.SecurityError(
                f"the chat template takes more than {MAX_TURNS} turns of its loops or {MAX_S:g} s"
            )

    def make(self, size: int, printed: bool = False) -> None:
        self._made += size
        self._printed += size if printed else 0
        if self._made > MAX_MADE or self._printed > MAX_SIZE:
            raise jinja2.exceptions.SecurityError("the chat template makes too much text")


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


class _Template(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        """Within a budget of its own."""
        token = _budget.set(_Budget())
        try:
            return super().render(*args, **kwargs)
        finally:
            _budget.reset(token)


class _Counted(NodeTransformer):
    """Each turn of a loop and each call of a macro is counted; `~` is joined by a function."""

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.ctx != "load":
            _check_free(node.name, node.lineno)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        turn = _call("_turn", [], node.lineno)
        if node.test is None:
            node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        else:  # what the condition leaves out is looked at too
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        _check_free(node.name, node.lineno)
        self.generic_visit(node)
        turn = _call("_turn", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("_join", node.nodes, node.lineno)


def _check_free(name: str, line: int) -> None:
    if name in _OURS:
        raise jinja2.TemplateSyntaxError(f"a chat template may not set {name}", line)


def _call(name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    called = nodes.Name(name, "load", lineno=line)
    return nodes.Call(called, args, [], None, None, lineno=line)


def _turn() -> bool:
    budget = _budget.get()
    if budget is not None:
        budget.spend(1)
    return True


def _join(*parts: object) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _range(*args: int) -> range:
    made, budget = range(*args), _budget.get()
    if budget is not None and len(made) > 1:
        budget.spend(len(made))
    return made


def _printed(value: Any) -> Any:
    budget = _budget.get()
    if budget is not None and isinstance(value, str):
        budget.make(len(value), printed=True)
    return value


def _check_size(size: int) -> None:
    """Of a text or a list that is made, or is about to be."""
    if size > MAX_SIZE:
        raise jinja2.exceptions.SecurityError(
            f"the chat template makes a text or a list of {size}; {MAX_SIZE} are allowed"
        )
    budget = _budget.get()
    if budget is not None:
        budget.make(size)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on what a rendering computes."""

    template_class = _Template
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        counted: nodes.Template = _Counted().visit(tree)
        return counted

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox has put its own around format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            args = _check_method(text, getattr(method, "__name__", ""), args, kwargs)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, _SIZED) and isinstance(right, _SIZED):
            _check_size(len(left) + len(right))
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, _SIZED) and isinstance(times, int):
                    _check_size(len(one) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_percent(left)
        return _checked(super().call_binop(context, operator, left, right))


def _check_method(
    text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Of a text, before it is called; its arguments, of which an iterator is a list by then."""
    if name in _WIDE_METHODS:
        _check_widths(*args, *kwargs.values())
    elif name in ("format", "format_map"):
        for _, _, spec, _ in string.Formatter().parse(text):
            _check_widths(
                *(
                    MAX_SIZE + 1 if "{" in part else int(part[:12])
                    for part in re.findall(r"[0-9]+|{", spec or "")
                )
            )
    elif name == "replace" and len(args) > 1:
        _check_replaced(text, *args[:2])
    elif name == "join" and args:
        items = list(args[0])
        _check_joined(items, text)
        return (items, *args[1:])
    return args


def _check_percent(form: str) -> None:
    for found in _PERCENT.finditer(form.replace("%%", "")):
        _check_widths(*(MAX_SIZE + 1 if n == "*" else int(n[:12]) for n in found.groups() if n))


def _check_widths(*values: Any) -> None:
    """Numbers that say how large something is to be."""
    for value in values:
        if isinstance(value, int) and value > MAX_SIZE:
            _check_size(value)


def _check_replaced(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_size(len(text) + text.count(old) * len(new))


def _check_joined(items: list[Any], between: object) -> None:
    size = sum(len(item) for item in items if isinstance(item, str))
    _check_size(size + len(str(between)) * len(items))


def _checked(made: Any) -> Any:
    if isinstance(made, _SIZED):
        _check_size(len(made))
    elif isinstance(made, int):
        _check_bits(made.bit_length())
    return made


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that neither asks for nor makes what is too large."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # of its arguments, what is filtered

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        before, (value, *rest) = args[:first], args[first:]
        if name in _WIDE_FILTERS:
            _check_widths(*rest, *kwargs.values())
        elif name == "format":
            _check_percent(str(value))
        elif name == "replace" and len(rest) > 1:
            _check_replaced(str(value), *rest[:2])
        elif name == "join":
            value = list(value)
            _check_joined(value, rest[0] if rest else kwargs.get("d", ""))
        elif name == "sum" and isinstance(kwargs.get("start", (rest + [None, 0])[1]), _SIZED):
            raise jinja2.exceptions.SecurityError("a chat template may not sum lists or texts")
        return _checked(function(*before, value, *rest, **kwargs))

    return filtered


def _check_bits(bits: int) -> None:
    if bits > _LONGEST_INT:
        raise jinja2.exceptions.SecurityError(
            f"the chat template makes a number of {bits} bits; {_LONGEST_INT} are allowed"
        )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        finalize=_printed,
    )
    environment.filters["tojson"] = _tojson
    filters = environment.filters
    environment.filters = {name: _bounded(name, each) for name, each in filters.items()}
    del environment.globals["lipsum"]  # text of any length
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
        "range": _range,
        "_turn": _turn,
        "_join": _join,
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
