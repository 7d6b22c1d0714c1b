"""One page of HTML that needs nothing but itself: no script, no font, no request.

Its form is page.html, its looks are page.css. Whatever comes from a model, a path or a server is
text to the template, which escapes it; only the plots, which the standard library's XML wrote, are
taken as they are.
"""

from __future__ import annotations

from pathlib import Path

from enginehouse.build.report.templates import templates
from enginehouse.build.report.words import one_line
from enginehouse.regress.outcome import Outcome
from enginehouse.regress.report import plots, wording

_FOLDER = Path(__file__).parent
_SHOWN_PLOTS = 6  # texts whose divergence is seen without unfolding


def page(outcome: Outcome) -> str:
    """The page as text, to be written as UTF-8."""
    environment = templates(_FOLDER)
    environment.filters["figure"] = wording.figure
    concerns = [found for found in outcome.findings if found.status in wording.CONCERNS]
    divergences = {
        "baseline": plots.divergence_plots(outcome.divergence, "baseline"),
        "reference": plots.divergence_plots(outcome.reference_divergence, "reference"),
    }
    return environment.get_template("page.html").render(
        outcome=outcome,
        mark=wording.mark_of(outcome.verdict),
        marks=wording.MARKS,
        headline=wording.headline(outcome),
        compared=wording.compared(outcome),
        suite=one_line(outcome.suite, 120),
        created=wording.moment(outcome),
        differences=wording.differences(outcome),
        concerns=wording.by_concern(concerns),
        groups=[
            (group, wording.count_words(findings), findings)
            for group, findings in wording.grouped(outcome.findings)
        ],
        facts=wording.facts(outcome),
        divergences={against: found for against, found in divergences.items() if any(found)},
        shown_plots=_SHOWN_PLOTS,
        perplexity=plots.perplexity_plot(outcome.perplexity),
        load=plots.load_plot(outcome.loads),
        load_rows=plots.load_rows(outcome.loads),
        latencies=plots.latency_plots(outcome.loads),
    )
