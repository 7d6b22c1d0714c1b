"""What differs between two builds, in sentences and in a word: read from their manifests.

Knows what a manifest records; measures nothing, and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import msgspec

from enginehouse.runtime.engine import FileRecord, Manifest

_WORDS = {  # what is recorded -> what a person calls it
    "digest": "content",
    "mean_kl": "mean KL to the unquantised model",
    "max_kl": "largest KL to the unquantised model",
    "top1_agreement": "share of positions with the unquantised model's likeliest token",
    "answer": "answer to verify's prompt",
}
_MANY = 4  # files of one kind that are named; more are counted
_LONGEST = 80  # characters of a value
# Choices that change which numbers the weights, the keys or the activations are rounded to.
ROUNDING_CHOICES = {
    *("quant", "group_size", "kv_cache_dtype", "exclude", "dtype", "cpu_activations"),
    *("calib_samples", "calib_length", "dequantize"),
    *("mixed_forms", "effective_bits", "max_kl"),
}
# Choices that change in which order, or by what, the same numbers are added.
ORDER_CHOICES = {
    *("backend", "tp", "pp", "pad", "gpu", "sm", "plan_layers", "bake_weights"),
    *("compute_dtype", "trtllm_build", "max_seq_len", "max_num_tokens", "max_batch_size"),
    "kv_block_size",
}


class Relation(str, Enum):
    """How near two builds are by what is recorded, and so how alike their numbers should be.

    rebuild: nothing that is recorded explains a difference. reordered: other versions, machine or
    cut: the same numbers, added otherwise. requantised: rounded to other numbers. other_weights:
    another source. unknown: one of them has no manifest, such as a server elsewhere.
    """

    REBUILD = "rebuild"
    REORDERED = "reordered"
    REQUANTISED = "requantised"
    OTHER_WEIGHTS = "other_weights"
    UNKNOWN = "unknown"


def relation_of(old: Manifest | None, new: Manifest | None) -> Relation:
    if old is None or new is None:
        return Relation.UNKNOWN
    if old.source.get("digest") != new.source.get("digest"):
        return Relation.OTHER_WEIGHTS
    chosen = {name.partition(".")[0] for name, _, _ in _differences(old.choices, new.choices)}
    if chosen & ROUNDING_CHOICES:
        return Relation.REQUANTISED
    alike = (old.versions, old.machine, old.backend) == (new.versions, new.machine, new.backend)
    return Relation.REBUILD if alike and not chosen & ORDER_CHOICES else Relation.REORDERED


def explain(old: Manifest, new: Manifest) -> list[str]:
    """A sentence for each difference: source, choices, limits, model, versions, machine, files, and
    what verify found of them. One sentence where there is none.
    """
    if old.digest == new.digest and old.limits == new.limits and old.backend == new.backend:
        return [f"Both hold the same files ({new.digest[:19]}...) within the same limits."]
    choices = list(_differences(old.choices, new.choices))
    chosen = {name for name, _, _ in choices}
    limits = (
        found
        for found in _differences(_plain(old.limits), _plain(new.limits))
        if found[0] not in chosen
    )
    recorded = [
        *_sentences("The source's", _differences(_of_source(old), _of_source(new))),
        *_sentences("The choice of", choices),
        *_sentences("The limit", limits),
        *_sentences("The model's", _differences(_plain(old.model), _plain(new.model))),
        *_sentences("The version of", _differences(old.versions, new.versions)),
        *_sentences("The machine's", _differences(old.machine or {}, new.machine or {})),
    ]
    files = list(_files(old.files, new.files))
    if files and not recorded:
        files.append("Nothing else that the manifests record differs, neither source nor choice.")
    found = _sentences("Verify's", _differences(old.verify or {}, new.verify or {}))
    return [*recorded, *files, *found]


def _plain(struct: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _of_source(manifest: Manifest) -> dict[str, Any]:
    """What a source is, not where its files lay nor when they were written."""
    return {name: value for name, value in manifest.source.items() if name != "files"}


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(name, old value, new value), None for one that is not there; mappings by their entries."""
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) or isinstance(after, Mapping):
            yield from _differences(before or {}, after or {}, f"{within}{name}.")
        elif before != after:
            yield f"{within}{name}", before, after


def _sentences(of: str, differences: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [
        f"{of} {_WORDS.get(name, name)} is {_said(after)}, was {_said(before)}."
        for name, before, after in differences
    ]


def _said(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _files(old: Mapping[str, FileRecord], new: Mapping[str, FileRecord]) -> Iterator[str]:
    kinds = {
        "other contents": [n for n in new if n in old and new[n].sha256 != old[n].sha256],
        "no older one beside it": [n for n in new if n not in old],
        "no newer one beside it": [n for n in old if n not in new],
    }
    for what, names in kinds.items():
        if names:
            more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
            have = "has" if len(names) == 1 else "have"
            yield f"{', '.join(sorted(names)[:_MANY])}{more} {have} {what}."
