"""What differs between two builds is said in sentences and in a word, from the manifests alone."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from enginehouse.build.plan.settings import BuildSettings
from enginehouse.regress.explain import (
    ORDER_CHOICES,
    ROUNDING_CHOICES,
    Relation,
    explain,
    relation_of,
)
from enginehouse.runtime.engine import FileRecord, Limits, Manifest, ModelRecord

OLD = Manifest(
    format=1,
    name="mine",
    created="2026-01-01T00:00:00+00:00",
    backend="cpu",
    model=ModelRecord("mine", (2,)),
    limits=Limits(4096, 64, 512, 32),
    source={"kind": "hf", "digest": "sha256:aa", "files": {"a": {"mtime_ns": 1}}},
    choices={"quant": "int8", "tp": 1, "max_seq_len": 4096, "trtllm_build": {}},
    versions={"torch": "2.12.0", "python": "3.11.7"},
    files={"rank0.safetensors": FileRecord(9, "00"), "tokenizer.json": FileRecord(9, "11")},
    digest="sha256:old",
    verify={"mean_kl": 0.01, "answer": "Yes."},
)


def test_builds_of_the_same_files_are_said_to_be_alike() -> None:
    later = replace(OLD, created="2026-02-02T00:00:00+00:00")
    [sentence] = explain(OLD, later)
    assert sentence == "Both hold the same files (sha256:old...) within the same limits."
    assert relation_of(OLD, later) is Relation.REBUILD


def test_each_thing_that_differs_has_a_sentence() -> None:
    new = replace(
        OLD,
        source={**OLD.source, "digest": "sha256:bb", "files": {"a": {"mtime_ns": 2}}},
        choices={"quant": "int4", "tp": 1, "max_seq_len": 2048, "trtllm_build": {"plugin": "auto"}},
        limits=Limits(2048, 64, 512, 64),
        model=ModelRecord("mine", (2, 7)),
        versions={"torch": "2.13.0"},
        machine={"sm": "90"},
        files={"rank0.safetensors": FileRecord(5, "22"), "config.json": FileRecord(9, "33")},
        digest="sha256:new",
        verify={"mean_kl": 0.0213999, "answer": "No,\n  never."},
    )
    assert explain(OLD, new) == [
        "The source's content is sha256:bb, was sha256:aa.",
        "The choice of quant is int4, was int8.",
        "The choice of max_seq_len is 2048, was 4096.",
        "The choice of trtllm_build.plugin is auto, was not given.",
        "The limit kv_block_size is 64, was 32.",
        "The model's eos_token_ids is (2, 7), was (2,).",
        "The version of torch is 2.13.0, was 2.12.0.",
        "The version of python is not given, was 3.11.7.",
        "The machine's sm is 90, was not given.",
        "rank0.safetensors has other contents.",
        "config.json has no older one beside it.",
        "tokenizer.json has no newer one beside it.",
        "Verify's mean KL to the unquantised model is 0.0214, was 0.01.",
        "Verify's answer to verify's prompt is No, never., was Yes..",
    ]


def test_files_that_nothing_explains_are_said_to_be_that() -> None:
    files = {f"rank{i}.safetensors": FileRecord(9, "old") for i in range(6)}
    others = {name: FileRecord(9, "new") for name in files}
    old, new = replace(OLD, files=files), replace(OLD, files=others, digest="sha256:new")
    assert explain(old, new) == [
        f"{', '.join(sorted(files)[:4])} and 2 more have other contents.",
        "Nothing else that the manifests record differs, neither source nor choice.",
    ]
    assert relation_of(old, new) is Relation.REBUILD


@pytest.mark.parametrize(
    ("changed", "relation"),
    [
        ({"versions": {"torch": "9"}}, Relation.REORDERED),
        ({"machine": {"sm": "90"}}, Relation.REORDERED),
        ({"choices": {**OLD.choices, "tp": 2}}, Relation.REORDERED),
        ({"choices": {**OLD.choices, "trtllm_build": {"plugin": "auto"}}}, Relation.REORDERED),
        ({"choices": {**OLD.choices, "name": "other"}}, Relation.REBUILD),
        ({"choices": {**OLD.choices, "quant": "fp8", "tp": 2}}, Relation.REQUANTISED),
        ({"source": {"digest": "sha256:bb"}, "versions": {}}, Relation.OTHER_WEIGHTS),
    ],
)
def test_how_near_two_builds_are_is_the_farthest_of_what_differs(
    changed: dict[str, Any], relation: Relation
) -> None:
    assert relation_of(OLD, replace(OLD, digest="sha256:new", **changed)) is relation


def test_a_side_without_a_manifest_is_unknown() -> None:
    assert relation_of(None, OLD) is relation_of(OLD, None) is Relation.UNKNOWN


def test_every_choice_of_a_build_is_known_to_change_numbers_or_not_to() -> None:
    """A new setting has to be sorted: into what rounds, what reorders, or what does neither."""
    neither = {"model", "output", "name", "tokenizer", "format", "tool_format", "reasoning_format"}
    neither |= {"max_batch_size", "max_num_tokens", "kv_block_size", "kv_cache_gib"}
    neither |= {"price_input", "price_output", "verify_max_mean_kl", "verify_with", "until"}
    neither |= {"workers", "ignore_tensors", "layout"}
    assert {*ROUNDING_CHOICES, *ORDER_CHOICES, *neither} == {*BuildSettings.__dataclass_fields__}
