"""All that a run found, as the reports tell it: `report.json` is this, field by field."""

from __future__ import annotations

import msgspec

from enginehouse.regress.findings import Finding, Verdict

FORMAT = 1


class Described(msgspec.Struct, frozen=True):
    """Who was asked. target: an engine directory's name, a URL or a baseline. facts: of the engine
    and its machine, by a person's words.
    """

    target: str
    kind: str  # engine | url | recording
    digest: str | None = None
    facts: dict[str, str] = {}


class TextDivergence(msgspec.Struct, frozen=True):
    """KL divergence, nats, of the engine from what it is compared with, at each position."""

    text: str
    kl: list[float]


class PerplexityRatio(msgspec.Struct, frozen=True):
    """New over old, with its interval; above 1 is worse."""

    texts: str  # which, such as "all" or "code"
    ratio: float
    low: float
    high: float


class LoadFigures(msgspec.Struct, frozen=True):
    """What turns at one number of clients gave; [] for an old that was not asked.

    tokens_per_s: of each turn. ttft_ms: to the first token, of each stream. gap_ms: between tokens.
    """

    clients: int
    old_tokens_per_s: list[float]
    new_tokens_per_s: list[float]
    old_ttft_ms: list[float]
    new_ttft_ms: list[float]
    old_gap_ms: list[float]
    new_gap_ms: list[float]


class Outcome(msgspec.Struct, frozen=True):
    """explained: what differs between the two builds, in sentences. created: ISO 8601, UTC."""

    format: int
    verdict: Verdict
    created: str
    seconds: float
    suite: str
    new: Described
    old: Described | None
    reference: str | None
    explained: list[str]
    findings: list[Finding]
    divergence: list[TextDivergence] = []
    reference_divergence: list[TextDivergence] = []
    perplexity: list[PerplexityRatio] = []
    loads: list[LoadFigures] = []
