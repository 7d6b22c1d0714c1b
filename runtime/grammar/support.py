"""What each version of xgrammar enforces: the rest is refused, or written in other words.

Found by following grammars at random and holding what they let through against jsonschema and re
(0.1.25, 0.1.32, 0.2.8). A version between two known ones counts as the lower; so does what
TensorRT-LLM is compiled with, whichever Python package lies beside it.
Imports neither torch nor xgrammar.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from functools import cache

from enginehouse.runtime.errors import EngineError

OLDEST = "0.1.25"
# Features that OLDEST lacks, and the first version known to have each.
SINCE = {
    "multipleOf": "0.2.8",
    "bounds of numbers": "0.2.8",  # before, the decimal point is any character
    "bounds of integers": "0.2.8",  # before, -137 is within -136 to 116
    "maxLength": "0.2.8",  # before, bytes that are no UTF-8 count as one character
    "classes beyond ASCII": "0.2.8",  # before, each character is one byte
    "anchors within": "0.2.8",  # before, they are passed over with a warning
    "alternatives in strings": "0.2.8",  # before, a|b has one quote on either side
    "names with escapes": "0.2.8",
    "propertyNames beside additionalProperties": "0.2.8",
    "oneOf of branches that may overlap": "0.2.8",
    "every field of structural tags": "0.2.8",
    "max_whitespace_cnt": "0.2.8",
    "automata that are right": "0.2.1",  # before, see automata.py
    "counted characters": "0.2.8",  # rules with max_chars, see counted.py
}
# What a structural tag may say to versions without "every field of structural tags", which pass
# over fields they do not know.
TAG_FIELDS = {
    "structural_tag": {"format"},
    "const_string": {"value"},
    "json_schema": {"json_schema"},
    "any_text": set(),
    "grammar": {"grammar"},
    "regex": {"pattern"},
    "sequence": {"elements"},
    "or": {"elements"},
    "tag": {"begin", "content", "end"},
    "triggered_tags": {"triggers", "tags", "at_least_one", "stop_after_first"},
    "tags_with_separator": {"tags", "separator", "at_least_one", "stop_after_first"},
}


class SchemaError(ValueError):
    """A constraint that is refused, in one sentence."""


def _ordered(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


@dataclass(frozen=True, slots=True)
class Support:
    """What one version of xgrammar enforces. EngineError for one older than OLDEST.

    any_whitespace: JSON of a schema is followed with any white space in it, not on one line.
    """

    version: str
    any_whitespace: bool = False

    def __post_init__(self) -> None:
        if _ordered(self.version) < _ordered(OLDEST):
            raise EngineError(
                f"xgrammar {self.version} is installed; wanted {OLDEST} or later: install that"
            )

    def has(self, feature: str) -> bool:
        return _ordered(self.version) >= _ordered(SINCE[feature])

    @property
    def is_newest(self) -> bool:
        """It has every feature."""
        return all(map(self.has, SINCE))

    def require(self, feature: str, found: str, instead: str = "leave it out") -> None:
        """SchemaError where the feature is lacking. found: where the request asks for it."""
        if not self.has(feature):
            raise SchemaError(
                f"{found} needs xgrammar {SINCE[feature]} or later, and this engine uses "
                f"{self.version}; {instead}"
            )


NEWEST = Support(max(SINCE.values(), key=_ordered))
TENSORRT_LLM = Support("0.1.25", any_whitespace=True)  # of 1.2.1, in C++; 1.3's is 0.1.32


@cache
def installed() -> Support:
    """Of the Python package, which the CPU backend follows grammars with."""
    return Support(importlib.metadata.version("xgrammar"))


def doubt_beside_tensorrt_llm() -> str | None:
    """Why grammars are tried with a package that does not make TensorRT-LLM's mistakes, if so."""
    if not installed().has("automata that are right"):
        return None
    return (
        f"TensorRT-LLM follows constraints with xgrammar {TENSORRT_LLM.version}, and the package "
        f"beside it is {installed().version}: automata that only the first gets wrong are not "
        f"seen; install xgrammar=={TENSORRT_LLM.version}"
    )
