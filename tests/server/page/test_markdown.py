"""Markdown -> nodes: each case's nodes, written as markup by the browser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from makers.page_visit import Visit

CASES = {
    "a *b* **c** ~~d~~ `e*f*`": (
        "<p>a <em>b</em> <strong>c</strong> <del>d</del> <code>e*f*</code></p>"
    ),
    "snake_case_name and 2*3*4": "<p>snake_case_name and 2<em>3</em>4</p>",
    "__init__ `a``b`": "<p><strong>init</strong> <code>a``b</code></p>",
    "***both***": "<p><strong><em>both</em></strong></p>",
    "\\*not\\* &amp; <b>": "<p>*not* &amp;amp; &lt;b&gt;</p>",
    "a  \nb\nc": "<p>a  <br>b\nc</p>",
    "# One\ntext": "<h3>One</h3><p>text</p>",
    "#hashtag": "<p>#hashtag</p>",
    "- a\n- b\n\n  more\n- c": "<ul><li>a</li><li>b<p>more</p></li><li>c</li></ul>",
    "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "- a\n  - b\n    - c": "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li></ul>",
    "- [ ] a\n- [x] b": '<ul><li class="task">☐ a</li><li class="task">☑ b</li></ul>',
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    '[a](https://b.c/d_(e) "t")': (
        '<p><a href="https://b.c/d_(e)" target="_blank" rel="noopener noreferrer">a</a></p>'
    ),
    "see https://b.c/d?e=f.": (
        '<p>see <a href="https://b.c/d?e=f" target="_blank" rel="noopener noreferrer">'
        "https://b.c/d?e=f</a>.</p>"
    ),
    "[a](javascript:b) [c](data:d) [e](/f)": (
        "<p><span>a</span> <span>c</span> <span>e</span></p>"
    ),
    "![a](javascript:b)": "<p><span>image: a</span></p>",
    '[a](https://b.c/" onclick="d)': '<p>[a](<a href="https://b.c/" target="_blank" '
    'rel="noopener noreferrer">https://b.c/</a>" onclick="d)</p>',
    "**open": "<p>**open</p>",
    "`open": "<p>`open</p>",
    "2 * 3 * 4": "<p>2 * 3 * 4</p>",
}
HOSTILE = {
    "stars": "*a " * 20_000,
    "brackets": "[" * 20_000,
    "links": "[a](" * 10_000,
    "ticks": " ".join("`" * n for n in range(1, 200)) * 5,
    "quotes": ">" * 20_000,
    "lists": "\n".join("  " * n + "- a" for n in range(500)),
    "bars": "|" * 20_000 + "\n" + "|-" * 10_000,
    "open fence": "```js\n" + "/*" * 20_000,
    "quotes in code": "```python\n" + '"""\'' * 10_000 + "\n```",
}
_SHOW = """async text => {
  const { show } = await import(new URL("page/markdown.js", document.baseURI).href);
  const box = document.createElement("div");
  const began = performance.now();
  show(box, text);
  return [box.innerHTML, performance.now() - began];
}"""
_STREAM = """async text => {
  const { show } = await import(new URL("page/markdown.js", document.baseURI).href);
  const box = document.createElement("div");
  let first = null;
  for (let end = 1; end <= text.length; end++) {
    show(box, text.slice(0, end));
    first ??= end > 20 ? box.firstChild : null;
  }
  const whole = document.createElement("div");
  show(whole, text);
  return [box.innerHTML === whole.innerHTML, first === box.firstChild];
}"""


@pytest.fixture(scope="module")
def page(browser: Any, site: str) -> Iterator[Any]:
    visit = Visit(browser, site)
    yield visit.open()
    visit.close()


@pytest.mark.parametrize("text", CASES)
def test_a_text_becomes_these_nodes(page: Any, text: str) -> None:
    assert page.evaluate(_SHOW, text)[0] == CASES[text]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_long(page: Any, name: str) -> None:
    began = time.monotonic()
    markup, ms = page.evaluate(_SHOW, HOSTILE[name])
    assert markup and ms < 2000, f"{ms:.0f} ms"
    assert time.monotonic() - began < 10


def test_code_is_shown_as_it_is(page: Any) -> None:
    code = "if (a < b && c) {\n\n  return '<i>'; // \"x\"\n}"
    markup = page.evaluate(_SHOW, f"```js\n{code}\n```\n")[0]
    assert "<i>" not in markup
    for language in ("js", "python", "c++", "rust", "go", "sql", "bash", "json", "yaml", "none"):
        text = f"```{language}\n{code}\n```\n"
        same = """async text => {
          const { show } = await import(new URL("page/markdown.js", document.baseURI).href);
          const box = document.createElement("div");
          show(box, text);
          return box.querySelector("pre").textContent;
        }"""
        assert page.evaluate(same, text) == code


def test_a_stream_ends_as_the_whole_text_does_and_keeps_its_first_nodes(page: Any) -> None:
    text = (
        "First paragraph here.\n\n"
        + "\n\n".join(CASES)
        + "\n\n```c\nint a;\n```\n\n|a|b|\n|-|-|\n|1|2|\n"
    )
    assert page.evaluate(_STREAM, text) == [True, True]
