"""Every tag, filter and function of chat templates gives the text that transformers gives."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from enginehouse.runtime.template import compile_template
from makers.templates import TEMPLATES

CONVERSATION = [
    {"role": "system", "content": "be <brief> & kind"},
    {"role": "user", "content": "  Où est 'Paris'? "},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nIn France."},
    {"role": "user", "content": "Sure?"},
]
# Microsoft's Phi-4-reasoning-plus, its system message shortened.
PHI = (
    "<|im_start|>system<|im_sep|>You are Phi.<|im_end|>"
    "{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>'}}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant<|im_sep|>'}}{% endif %}"
)
# In the manner of TRL's training templates.
TRL = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if '</think>' in content and not loop.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
PIECES = {
    "a generation's own lines": "a\n  {% generation %}\n  b\n  {% endgeneration %}\nc\n",
    "what a generation sets": "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}[{{ x }}]",
    "what it changes": "{% set n = namespace(i=1) %}{% generation %}{% set n.i = 2 %}"
    "{% endgeneration %}{{ n.i }}",
    "break and continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
    "{% endif %}{{ m.content }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}"
    "{{ messages[1] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "strftime_now": "{{ strftime_now('%Y-%m-%d') }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['b'], 2) }}{{ dict([['c', 3]], d=4) }}",
    "blocks": "  {% if true %}\n  x\n  {% endif %}\n{# gone #}\ny",
}


def ours(source: str, **more: Any) -> str:
    return compile_template(source).template.render(
        messages=CONVERSATION, tools=None, documents=None, **more
    )


def theirs(source: str, **more: Any) -> str:
    texts, _ = render_jinja_template([CONVERSATION], chat_template=source, **more)
    return str(texts[0])


@pytest.mark.parametrize("source", [PHI, TRL, *PIECES.values()], ids=["Phi", "TRL", *PIECES])
@pytest.mark.parametrize("open_turn", [True, False])
def test_a_template_renders_as_in_transformers(source: str, open_turn: bool) -> None:
    text = ours(source, add_generation_prompt=open_turn)
    assert text == theirs(source, add_generation_prompt=open_turn) and text


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{% set n = namespace(_a=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[9].content }}",
        "{{ x | nosuchfilter }}",
        "{% generation %}",
        "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    ],
)
def test_what_transformers_refuses_is_refused(source: str) -> None:
    with pytest.raises((jinja2.TemplateError, SyntaxError)):
        theirs(source)
    with pytest.raises(jinja2.TemplateError):
        ours(source)


def test_the_variables_are_those_that_jinja_does_not_know() -> None:
    assert compile_template("{{ x | tojson }}{{ namespace }}{% set y = 1 %}{{ y }}").variables == {
        "x"
    }
    assert "messages" in compile_template(TEMPLATES["hermes"]).variables


GROWS = "{% set n = namespace(x='a') %}{% for a in range(60) %}{% set n.x = GROWN %}{% endfor %}"
FOR_B = "{% for b in range(99999) %}{% endfor %}"
HOSTILE = {
    "loops within loops": "{% for a in range(99999) %}" + FOR_B + "{% endfor %}",
    "loops over what is given": "{% for a in m %}{% for b in m %}{% for c in m %}{% for d in m %}"
    "{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    "what a condition leaves out": "{% for a in range(99999) %}{% for b in m * 99 if false %}"
    "{% endfor %}{% endfor %}",
    "macros that call themselves": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}"
    "{{ f(60) }}",
    "doubling by ~": GROWS.replace("GROWN", "n.x ~ n.x"),
    "doubling by +": GROWS.replace("GROWN", "n.x + n.x"),
    "doubling by a filter": GROWS.replace("GROWN", "n.x | replace('a', 'aa')"),
    "doubling by a method": GROWS.replace("GROWN", "n.x.replace('a', 'aa')"),
    "doubling a list": GROWS.replace("'a'", "[1]").replace("GROWN", "n.x + n.x"),
    "a growing number": GROWS.replace("'a'", "3").replace("GROWN", "n.x * n.x"),
    "a product": "{{ 'a' * 10 ** 11 }}",
    "a product of a list": "{{ (10 ** 11 * [1]) | length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a width by %": "{{ '%099999999999d' % 1 }}",
    "a width that is given": "{{ '%*d' % (99999999999, 1) }}",
    "a width by format": "{{ '{:99999999999}'.format(1) }}",
    "a width by a filter": "{{ 'a' | center(99999999999) }}",
    "a width by a method": "{{ 'a'.ljust(99999999999) }}",
    "a width of a name": "{{ '%(a)99999999999d' % {'a': 1} }}",
    "a precision": "{{ '%.99999999999f' % 1 }}",
    "a width that is formatted": "{{ '{1:{0}}'.format('9999999999', 'x') }}",
    "a width by the filter format": "{{ '%99999999999d' | format(1) }}",
    "a sum of lists": "{{ [[1] * 1000] * 30000 | sum(start=[]) | length }}",
    "a join": "{{ (['a' * 9999999] * 100) | join | length }}",
    "a join by a method": "{{ ''.join(['a' * 9999999] * 100) | length }}",
    "one large replacement": "{{ ('a' * 9999) | replace('a', 'b' * 9999999) | length }}",
    "many large texts": "{% for a in range(99) %}{% set x = 'a' * 30000000 %}{% endfor %}",
    "much that is printed": "{% set x = 'a' * 3000000 %}{% for a in range(20) %}{{ x }}"
    "{% endfor %}",
    "a long number": "{{ ('f' * 6000000) | int(0, 16) // 3 }}",
    "a range": "{{ range(10 ** 9) | list | length }}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_that_takes_too_much_is_stopped(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginehouse.runtime.template.MAX_S", 1.0)
    template = compile_template(HOSTILE[what]).template
    with pytest.raises((jinja2.exceptions.SecurityError, RecursionError)):
        template.render(m=list(range(1000)))


@pytest.mark.parametrize("name", ["_turn", "_join"])
def test_what_counts_cannot_be_replaced(name: str) -> None:
    for source in (
        f"{{% set {name} = joiner %}}",
        f"{{% for {name} in m %}}{{% endfor %}}",
        f"{{% macro {name}() %}}{{% endmacro %}}",
        f"{{% macro f({name}) %}}{{% endmacro %}}",
    ):
        with pytest.raises(jinja2.TemplateSyntaxError):
            compile_template(source)


@pytest.mark.parametrize(
    "source",
    [
        "at {{ 'x=' ~ v }}",
        "{% macro f(v) %}{{ v }}{% endmacro %}{{ f(v) }}",
        "{{ dict(a=v).a }}{{ {}.get('a', v) }}{{ missing | default(v) }}{{ [v].count(v) }}",
        "{% set n = namespace(t=v) %}{{ n.t + 1 }}",
        "{{ 'is 5%% of %s' % v }}{{ '{}: id 12:99999999999'.format(v) }}{{ '%05.1f' % 2.5 }}",
        "{{ '{:>8}|{:<5}'.format('a', 'b') }}{{ 'a'.center(9) }}{{ 'a' | center(9) }}",
        "{{ [1, 2] | sum }}{{ ['a', v] | join(', ') }}{{ 'a-b' | replace('-', '+') }}",
        "{{ {'a': [v]} | tojson(indent=2) }}{{ 'a b' | wordwrap(1) }}{{ 'ab'.replace('a', 'c') }}",
    ],
)
def test_what_is_honest_is_as_it_was(source: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda value, indent: json.dumps(value, indent=indent)
    wanted = plain.from_string(source).render(v=1700000000)
    assert compile_template(source).template.render(v=1700000000) == wanted


def test_a_long_conversation_is_not_too_much() -> None:
    messages = [{"role": "user", "content": "word " * 100}] * 20_000
    source = (
        "{% for m in messages %}{% for part in [m.content] %}{{ m.role ~ ': ' ~ part }}"
        "{% endfor %}{% endfor %}"
    )
    assert len(compile_template(source).template.render(messages=messages)) == 20_000 * 506
