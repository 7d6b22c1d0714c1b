"""JUnit XML, read by another parser: counts, statuses, and no character that XML forbids."""

from __future__ import annotations

from xml.dom import minidom
from xml.etree import ElementTree

import msgspec
import pytest

from enginehouse.regress.findings import Finding, Status
from enginehouse.regress.report.junit import junit_xml
from makers.outcomes import HOSTILE, empty_outcome, full_outcome, hostile_outcome


def read(content: bytes) -> ElementTree.Element:
    minidom.parseString(content)  # expat refuses what XML forbids
    return ElementTree.fromstring(content)


def test_a_suite_is_a_group_and_a_case_a_check() -> None:
    outcome = full_outcome()
    root = read(junit_xml(outcome))
    assert root.tag == "testsuites"
    assert [suite.get("name") for suite in root] == ["numerics", "behaviour", "speed", "quality"]
    cases = {(case.get("classname"), case.get("name")) for case in root.iter("testcase")}
    assert cases == {(f"regress.{found.group}", found.check) for found in outcome.findings}
    differs = {item.get("value") for item in root.iter("property")}
    assert set(outcome.explained) <= differs


@pytest.mark.parametrize(
    ("cannot_tell", "element"), [(None, "error"), ("pass", "skipped"), ("fail", "failure")]
)
def test_each_status_is_what_ci_shows_as_it(cannot_tell: str | None, element: str) -> None:
    outcome = full_outcome()
    root = read(junit_xml(outcome, cannot_tell=cannot_tell))
    elements = {
        Status.REGRESSED: "failure",
        Status.CANNOT_TELL: element,
        Status.NOT_JUDGED: "skipped",
        Status.PASSED: None,
    }
    for finding in outcome.findings:
        [case] = [case for case in root.iter("testcase") if case.get("name") == finding.check]
        wanted = elements[finding.status]
        told = [child for child in case if child.tag != "system-out"]
        assert [child.tag for child in told] == ([wanted] if wanted else [])
        for child in told:
            assert child.get("message") == finding.sentence
            assert (child.text or "").splitlines()[0] == finding.sentence
        if wanted in ("failure", "error"):
            assert outcome.explained[0] in case.findtext("system-out", "")
            assert told[0].get("type") == finding.status.value


def test_the_counts_are_those_of_the_cases() -> None:
    root = read(junit_xml(hostile_outcome()))
    for element in [root, *root.iter("testsuite")]:
        cases = list(element.iter("testcase"))
        counted = {"tests": len(cases)}
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            counted[name] = sum(case.find(tag) is not None for case in cases)
        assert {name: int(element.get(name, -1)) for name in counted} == counted
    assert len(list(root.iter("testcase"))) == len(HOSTILE) * len(Status)


def test_hostile_text_stays_text() -> None:
    content = junit_xml(hostile_outcome())
    root = read(content)
    assert {element.tag for element in root.iter()} == {
        *("testsuites", "testsuite", "properties", "property", "testcase"),
        *("failure", "error", "skipped", "system-out"),
    }
    texts = "".join(root.itertext())
    assert HOSTILE[0] in texts and "␀␁␇␋␛[31mred␛]0;title␇␡" in texts and "🦙🚂" in texts
    assert HOSTILE[13] in texts, "a long sentence is told in full"
    assert not set(content.decode()) & {chr(code) for code in range(32) if code not in (9, 10)}


def test_two_checks_of_one_name_are_two_cases() -> None:
    """GitLab ignores the second case of a name, which may be the failure."""
    rows = [
        Finding("numerics", "kl", Status.PASSED, "Well."),
        Finding("numerics", "kl", Status.REGRESSED, "Not well."),
    ]
    root = read(junit_xml(msgspec.structs.replace(empty_outcome(), findings=rows)))
    assert sorted(case.get("name", "") for case in root.iter("testcase")) == ["kl", "kl (2)"]


def test_nothing_found_is_no_suite() -> None:
    root = read(junit_xml(empty_outcome()))
    assert len(root) == 0 and root.get("tests") == "0"
