"""The default suite is what docs/regress.md says; a user's own is read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from enginehouse.regress.suite.long_texts import ledger
from enginehouse.regress.suite.reading import load_suite
from enginehouse.regress.suite.suite import Suite
from enginehouse.runtime.errors import EnginehouseError
from makers.paths import ROOT


def test_the_default_has_what_the_document_says() -> None:
    suite = load_suite()
    said = (ROOT / "docs" / "regress.md").read_text(encoding="utf-8")
    assert f"{len(suite.texts)} texts of 8 to 4,000 tokens" in said
    assert f"{len(suite.prompts)}\nprompts" in said and f"{len(suite.tasks)} small tasks" in said
    assert {text.kind for text in suite.texts} == {
        *("prose", "code", "data", "languages", "symbols", "long")
    }
    assert any(prompt.tools for prompt in suite.prompts)


def test_no_task_shows_its_own_answer_before_the_question() -> None:
    for task in load_suite().tasks:
        *shown, question = task.prompt.split("\n")
        assert question and not any(line.startswith(question) for line in shown)


def test_a_ledger_is_the_same_everywhere_and_another_from_each_number() -> None:
    assert ledger(2) == ledger(2) and len(set(ledger(200).splitlines())) == 200
    assert ledger(1, 102).split(" ")[1:] != ledger(1, 1).split(" ")[1:]


def test_a_suite_of_ones_own_replaces_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "name: mine\n"
        "texts: [{name: a, text: words, repeat: 2}]\n"
        "prompts: [{name: p, ledger: 1, messages: [{role: user, content: Sum up.}]}]\n"
        "tasks: [{kind: k, shown: 1, ask: [[Q, A], [R, B]]}]\n"
    )
    suite = load_suite(path)
    assert isinstance(suite, Suite) and suite.texts[0].text == "words\nwords"
    assert suite.prompts[0].messages == [{"role": "user", "content": f"{ledger(1)}\nSum up."}]
    assert [(task.prompt, task.answer) for task in suite.tasks] == [
        ("R B\nQ", "A"),
        ("Q A\nR", "B"),
    ]
    path.write_text(path.read_text().replace("Sum up", "Sum it up"))
    assert load_suite(path).digest != suite.digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("texts: [{name: a, txt: b}]", "txt"),
        ("texts: [{name: a}]", "text 'a' has to have either `text` or `ledger`"),
        ("prompts: [{name: a, prompt: b, messages: []}]", "either `prompt` or `messages`"),
        ("prompts: [{name: a, prompt: b}, {name: a, prompt: c}]", "prompts have 'a' twice"),
        ("tasks: [{kind: k, ask: [[Q, A]]}, {kind: k, ask: [[R, B]]}]", "tasks have 'k.0' twice"),
        ("texts: [{name: a, text: ' '}]", "text 'a' is empty"),
        ("texts: [", "is no suite"),
        ("- a", "is no suite"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(EnginehouseError) as caught:
        load_suite(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_suite_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EnginehouseError, match="is no suite"):
        load_suite(tmp_path / "none.yaml")
