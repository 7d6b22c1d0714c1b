"""Outcomes of regression runs: an empty one, one of everything, and one of hostile text."""

from __future__ import annotations

import math
import random

import msgspec

from enginehouse.regress.findings import Figure, Finding, Status, Verdict
from enginehouse.regress.outcome import (
    FORMAT,
    Described,
    LoadFigures,
    Outcome,
    PerplexityRatio,
    TextDivergence,
)

HOSTILE = (
    "<script>alert(1)</script>",
    "</details></table><img src=x onerror=alert(1)>",
    "a | b || c \\| d",
    "`code` ```fence``` *bold* _it_ ~~gone~~ [link](http://evil.example) ![p](http://evil.example/p)",
    "\x00\x01\x07\x0b\x1b[31mred\x1b]0;title\x07\x7f\x9b2J",
    "\ud83d lone \udc00 surrogates \ufffe\uffff",
    "right to left \u202egnp.exe\u202c",
    "🦙🚂 emoji, 日本語, العربية",
    "two\nlines\r\nand\ttabs",
    "@everyone #1 !2 %3 ~bug $4 &5",
    "]]> <!-- --> <![CDATA[ &amp; &lt; {{ 7 * 7 }} {% raw %}",
    "[bold red]markup[/bold red] :smile:",
    "- 1. # heading",
    "x" * 10_000,
    "long words " * 1_000,
)


def empty_outcome() -> Outcome:
    return Outcome(
        format=FORMAT,
        verdict=Verdict.PASSED,
        created="2026-01-02T03:04:05Z",
        seconds=0.0,
        suite="default",
        new=Described("engines/new", "engine"),
        old=None,
        reference=None,
        explained=[],
        findings=[],
    )


def full_outcome(*, verdict: Verdict = Verdict.REGRESSED, texts: int = 9) -> Outcome:
    """As a run of the whole suite leaves it; curves are seeded."""
    draw = random.Random(14)
    return Outcome(
        format=FORMAT,
        verdict=verdict,
        created="2026-01-02T03:04:05Z",
        seconds=187.4,
        suite="default, version 1 (41 prompts)",
        new=_described("engines/smollm2-135m-int4_awq", "int4_awq", "0.2.0"),
        old=_described("engines/smollm2-135m-fp8", "fp8", "0.1.0"),
        reference="HuggingFaceTB/SmolLM2-135M-Instruct",
        explained=[
            "Weights are INT4 (AWQ, groups of 128), and were FP8 with a scale for each row.",
            "Calibration read 128 samples of 512 tokens, and none before.",
            "The engine was built by enginehouse 0.2.0, and before by 0.1.0.",
        ],
        findings=_findings(),
        divergence=[
            TextDivergence(name, _kl(draw, length, scale)) for name, length, scale in _TEXTS[:texts]
        ],
        reference_divergence=[
            TextDivergence(name, _kl(draw, length, 3 * scale)) for name, length, scale in _TEXTS[:3]
        ],
        perplexity=[
            PerplexityRatio("all", 1.0123, 1.0041, 1.0209),
            PerplexityRatio("English prose", 1.0051, 0.9962, 1.0142),
            PerplexityRatio("code", 1.0312, 1.0118, 1.0523),
            PerplexityRatio("several languages", 0.9987, 0.9871, 1.0101),
        ],
        loads=[_load(draw, clients) for clients in (1, 4, 16)],
    )


def hostile_outcome() -> Outcome:
    """The full one, with hostile text wherever a report takes text from elsewhere."""
    full = full_outcome()
    findings = [
        Finding(text, text, status, text, {text: text, "nan": math.nan, "inf": -math.inf})
        for text in HOSTILE
        for status in Status
    ]
    everything = " ".join(HOSTILE)
    who = Described(everything, "engine", everything, {text: text for text in HOSTILE})
    return msgspec.structs.replace(
        full,
        created=HOSTILE[4],
        suite=everything,
        new=who,
        old=msgspec.structs.replace(who, kind="url", facts={}),
        reference=everything,
        explained=list(HOSTILE),
        findings=findings,
        divergence=[TextDivergence(text, [0.0, 1e-9, 2.0]) for text in HOSTILE],
        perplexity=[PerplexityRatio(text, 1.0, 0.9, 1.1) for text in HOSTILE],
    )


_TEXTS = (
    ("English prose, 4,000 tokens", 4000, 2e-3),
    ("Python", 900, 4e-3),
    ("JSON", 350, 1e-3),
    ("emoji", 60, 2e-2),
    ("Japanese", 240, 8e-3),
    ("Arabic", 200, 6e-3),
    ("eight tokens", 8, 1e-3),
    ("repetition", 2000, 1e-4),
    ("tool template", 700, 3e-3),
)


def _kl(draw: random.Random, length: int, scale: float) -> list[float]:
    return [scale * draw.lognormvariate(0, 1.5) for _ in range(length)]


def _load(draw: random.Random, clients: int) -> LoadFigures:
    def turns(slower: float) -> list[float]:
        return [38 * clients**0.7 / slower * draw.gauss(1, 0.03) for _ in range(6)]

    def times(median: float, count: int, slower: float) -> list[float]:
        return [median * slower * draw.lognormvariate(0, 0.2) for _ in range(count)]

    return LoadFigures(
        clients,
        turns(1.0),
        turns(1.1),
        times(40 + 8 * clients, 6 * clients, 1.0),
        times(40 + 8 * clients, 6 * clients, 1.1),
        times(20 + 2 * clients, 180 * clients, 1.0),
        times(20 + 2 * clients, 180 * clients, 1.1),
    )


def _described(target: str, quant: str, version: str) -> Described:
    return Described(
        target,
        "engine",
        "sha256:" + "0123456789abcdef" * 4,
        {
            "backend": "torch",
            "quantisation": quant,
            "KV cache": "bfloat16",
            "enginehouse": version,
            "machine": "Intel Xeon, 2 cores, 23 GiB",
        },
    )


def _findings() -> list[Finding]:
    figures: dict[str, Figure] = {"ratio": 1.104, "low": 1.081, "high": 1.126, "limit": 1.05}
    rows = [
        ("numerics", "greedy agreement", Status.PASSED, "37 of 41 prompts gave the same 32 tokens; "
         "the others parted where two tokens were within 0.05 nats. At least 30 were wanted."),
        ("numerics", "perplexity, code", Status.REGRESSED, "Perplexity on code is 1.031 times the "
         "baseline's (1.012 to 1.052); at most 1.010 was wanted for int4_awq."),
        ("numerics", "among others", Status.PASSED, "Answers among 15 others equal those alone."),
        ("behaviour", "stop strings", Status.PASSED, "All 12 stop strings ended their answers."),
        ("behaviour", "transcript", Status.PASSED, "Every field of the baseline's is there."),
        ("behaviour", "cancel", Status.NOT_JUDGED, "The URL tells nothing of its requests in "
         "flight, so that nothing shows whether a cancelled one ended."),
        ("speed", "time between tokens, 1 client", Status.REGRESSED, "A token takes 1.104 times as "
         "long (1.081 to 1.126); at most 1.05 times was wanted."),
        ("speed", "TTFT, 4 clients", Status.CANNOT_TELL, "The first token takes 1.04 times as long "
         "(0.97 to 1.12), and 1.05 is the limit; about 14 more turns would settle it."),
        ("speed", "peak memory", Status.PASSED, "Peak memory is 0.61 times the baseline's."),
        ("quality", "arithmetic questions", Status.PASSED, "41 of 60 were answered, 42 before; "
         "McNemar's test gives p = 1.00."),
    ]  # fmt: skip
    return [Finding(group, check, status, text, figures) for group, check, status, text in rows]
