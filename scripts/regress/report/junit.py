"""JUnit XML as GitHub's actions, GitLab and Jenkins read it: a suite a group, a case a check.

A regression is a failure. What cannot be told is an error, JUnit's word for a test that came to no
assertion: GitLab and GitHub's actions count errors beside failures, under a name of their own, and
Jenkins shows both in red. A run that lets `cannot tell` pass writes it as skipped, and one that
does not as a failure, so that the test page and the exit status agree. GitLab shows a failure's
text and its system-out but no attribute, and of two cases of one name only the first: the sentence
is the text, what differs between the builds is system-out, and names are made unique.
"""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

from enginehouse.build.report.words import one_line, visible
from enginehouse.regress.findings import Finding, Status
from enginehouse.regress.outcome import Outcome
from enginehouse.regress.report.wording import (
    compared,
    differences,
    figure,
    grouped,
)

_CANNOT_TELL = {None: "error", "pass": "skipped", "fail": "failure"}
_COUNTED = {"failure": "failures", "error": "errors", "skipped": "skipped"}


def junit_xml(outcome: Outcome, *, cannot_tell: str | None = None) -> bytes:
    """UTF-8. cannot_tell: what it counts as, as in Verdict.exit_status."""
    elements = {
        Status.REGRESSED: "failure",
        Status.CANNOT_TELL: _CANNOT_TELL[cannot_tell],
        Status.NOT_JUDGED: "skipped",
    }
    differs = differences(outcome)
    root = ElementTree.Element("testsuites", name="enginehouse regress")
    totals = Counter(tests=0, failures=0, errors=0, skipped=0)
    for group, findings in grouped(outcome.findings):
        suite = ElementTree.SubElement(root, "testsuite", name=one_line(group, 200))
        counts = Counter(tests=len(findings), failures=0, errors=0, skipped=0)
        properties = ElementTree.SubElement(suite, "properties")
        told = {"compared": compared(outcome), "suite": visible(outcome.suite)}
        told |= {f"differs.{number}": text for number, text in enumerate(differs, 1)}
        for name, value in told.items():
            ElementTree.SubElement(properties, "property", name=name, value=value)
        names: Counter[str] = Counter()
        for finding in findings:
            name = one_line(finding.check, 200)
            names[name] += 1
            name += f" ({names[name]})" if names[name] > 1 else ""
            kind = elements.get(finding.status)
            _add_case(suite, group, name, finding, kind, differs)
            if kind:
                counts[_COUNTED[kind]] += 1
        suite.attrib |= {name: str(count) for name, count in counts.items()}
        suite.set("timestamp", visible(outcome.created)[:19])  # without a zone
        totals.update(counts)
    root.attrib |= {name: str(count) for name, count in totals.items()}
    root.set("time", f"{outcome.seconds:.3f}")
    ElementTree.indent(root)
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written


def _add_case(
    suite: ElementTree.Element,
    group: str,
    name: str,
    finding: Finding,
    kind: str | None,
    differs: list[str],
) -> None:
    classname = f"regress.{one_line(group, 200)}"
    case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name)
    sentence = visible(finding.sentence)
    if kind is None:
        ElementTree.SubElement(case, "system-out").text = sentence
        return
    told = ElementTree.SubElement(case, kind, message=one_line(sentence, 500))
    if kind != "skipped":
        told.set("type", finding.status.value)
    figures = [f"{visible(key)} = {figure(value)}" for key, value in finding.figures.items()]
    told.text = "\n".join([sentence, *figures])
    if kind != "skipped":
        heading = "What differs between the builds:"
        ElementTree.SubElement(case, "system-out").text = "\n".join([heading, *differs])
