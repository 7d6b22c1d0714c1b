"""The flags of trtllm-build: which are refused and how, and the lines that are printed."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from enginehouse.build import cli
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.plan.trtllm_flags import (
    FLAGS,
    Facts,
    check_flags,
    command_words,
    serving_flags,
)
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import PlanError
from makers.paths import CONTRACT, ROOT

KNOWN_FLAGS = json.loads((CONTRACT / "trtllm_build_flags.json").read_text())
FP8 = Facts("fp8", "fp8", 4, 1, "LlamaForCausalLM", 90)
INT4 = Facts("int4", "auto", 2, 1, "LlamaForCausalLM", None)
BF16 = Facts("none", "auto", 1, 1, "LlamaForCausalLM", None)


def test_the_flags_are_those_of_the_contract() -> None:
    assert FLAGS == KNOWN_FLAGS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_beam_with": 2}, "max_beam_with is no flag .* did you mean max_beam_width?"),
        ({"xyzzy": 2}, "xyzzy is no flag .* see `trtllm-build --help`"),
        ({"max_beam_width": "two"}, "max_beam_width='two' is not legal; wanted a number"),
        ({"max_beam_width": True}, "max_beam_width=True is not legal; wanted a number"),
        ({"max_beam_width": -1}, "max_beam_width=-1 is not legal"),
        ({"multiple_profiles": "maybe"}, "'maybe' is not legal; wanted enable, disable"),
        ({"moe_plugin": "float8"}, "wanted auto, float16, float32, bfloat16, int32, disable"),
        ({"log_level": ""}, "log_level='' is not legal; wanted a word"),
        ({"log_level": {"a": 1}}, "is not legal; wanted a word"),
        ({"max_beam_width": 0}, "max_beam_width=0 is not legal; wanted a number"),
        ({"max_beam_width": 10**30}, "is not legal; wanted a number"),
        ({"max_beam_width": None}, "max_beam_width=None is not legal; wanted a number"),
        ({"log_level": "--dry_run"}, "log_level='--dry_run' is not legal; wanted a word"),
        ({"lora_dir": ["a", "--workers"]}, "is not legal; wanted words"),
        ({"log_level": None}, "log_level=None is not legal; wanted a word"),
        ({"log_level": ["info", "debug"]}, "is not legal; wanted a word"),
        ({"lora_dir": {"a": 1}}, "is not legal; wanted words"),
        ({"lora_dir": []}, r"lora_dir=\[\] is not legal; wanted words"),
        ({"lora_dir": ["a", ""]}, "is not legal; wanted words"),
        ({"lora_dir": ["a,b"]}, "is not legal; wanted words"),
        ({"paged_kv_cache": "maybe"}, "'maybe' is not legal; wanted enable, disable"),
        ({"multiple-profiles": True, "multiple_profiles": False}, "multiple_profiles is given twi"),
        ({"max_multimodal_len": 1, "max_prompt_embedding_table_size": 2}, "is given twice"),
        ({"max_seq_len": 4096}, "max_seq_len is settled by max_seq_len; set that instead"),
        ({"--max-input-len": 4096}, "--max-input-len is settled by max_seq_len"),
        ({"tokens_per_block": 64}, "settled by kv_block_size"),
        ({"workers": 2}, "settled by workers"),
        ({"dry_run": True}, "with dry_run no engine comes of this checkpoint"),
    ],
)
def test_a_wrong_flag_is_refused_with_what_would_be_right(
    asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        check_flags(asked, BF16)


@pytest.mark.parametrize(
    ("facts", "flag", "value", "reason"),
    [
        (BF16, "kv_cache_type", "continuous", "in-flight batching"),
        (BF16, "remove_input_padding", "disable", "in-flight batching"),
        (BF16, "context_fmha", False, "in-flight batching"),
        (BF16, "gpt_attention_plugin", "disable", "in-flight batching"),
        (BF16, "use_paged_context_fmha", "disable", "block reuse"),
        (BF16, "paged_kv_cache", False, "in-flight batching"),
        (BF16, "streamingllm", "enable", "asserts it off"),
        (BF16, "strip_plan", True, "without its weights"),
        (BF16, "speculative_decoding_mode", "eagle", "no draft heads"),
        (INT4, "use_fp8_context_fmha", "enable", "FP8 weights and an FP8 KV cache"),
        (FP8._replace(kv_cache_dtype="auto"), "use_fp8_context_fmha", "enable", "an FP8 KV cache"),
        (INT4, "gemm_plugin", "fp8", "wants quant=fp8"),
        (INT4, "low_latency_gemm_plugin", "fp8", "quant=fp8 on SM90"),
        (FP8._replace(sm=100), "gemm_swiglu_plugin", "fp8", "quant=fp8 on SM90"),
        (INT4, "fast_build", True, "need their plugin"),
        (BF16, "reduce_fusion", "enable", "tp > 1, pp = 1"),
        (FP8._replace(pp=2), "reduce_fusion", "enable", "tp > 1, pp = 1"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(
    facts: Facts, flag: str, value: Any, reason: str
) -> None:
    with pytest.raises(PlanError, match=f"{flag}=.* does not work: .*{reason}"):
        check_flags({flag: value}, facts)


@pytest.mark.parametrize(
    ("facts", "asked"),
    [
        (FP8, {"use_fp8_context_fmha": "disable", "reduce_fusion": "enable"}),
        (FP8, {"low_latency_gemm_plugin": "fp8", "gemm_swiglu_plugin": "fp8"}),
        (BF16, {"fast_build": True, "gemm_plugin": "bfloat16"}),
        (INT4, {"multiple_profiles": True, "kv_cache_type": "paged"}),
    ],
)
def test_a_combination_that_works_is_accepted(facts: Facts, asked: dict[str, Any]) -> None:
    assert set(check_flags(asked, facts)) == set(asked)


def test_words_are_written_as_the_program_reads_them() -> None:
    asked = {
        "gather-context-logits": True,
        "monitor_memory": False,
        "multiple_profiles": True,
        "max_multimodal_len": 3,
        "lora_dir": ["a", "b"],
    }
    words = command_words(check_flags(asked, BF16))
    assert words == [
        "--gather_context_logits",
        "--multiple_profiles",
        "enable",
        "--max_prompt_embedding_table_size",
        "3",
        "--lora_dir",
        "a",
        "b",
    ]


@pytest.mark.parametrize("facts", [FP8, INT4, BF16, FP8._replace(kv_cache_dtype="auto")])
def test_our_own_flags_pass_our_own_checks(facts: Facts) -> None:
    flags = serving_flags(facts, 4096, 8, 8192, 32)
    limits = {"max_seq_len", "max_input_len", "max_batch_size", "max_num_tokens"}
    free = {key: word for key, word in flags.items() if key not in {*limits, "tokens_per_block"}}
    assert check_flags(free, facts) == free
    assert set(flags) <= set(KNOWN_FLAGS)


def test_flags_of_the_command_line_are_added_to_those_of_the_file(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("trtllm_build:\n  multiple_profiles: true\n  max_beam_width: 2\n")
    parser = argparse.ArgumentParser()
    cli.add_settings(parser)
    args = parser.parse_args(
        ["m", "--trtllm-build", "max_beam_width=3", "--trtllm-build", "gather_context_logits"]
    )
    flags = {"trtllm_build": cli._pairs(args.trtllm_build)}
    plan = make_plan(load_settings(flags, config), tiny_source)
    assert plan.builder_flags == {
        "multiple_profiles": "enable",
        "max_beam_width": "3",
        "gather_context_logits": "enable",
    }


def test_a_file_with_a_word_for_a_mapping_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("trtllm_build: fast\n")
    with pytest.raises(PlanError, match="trtllm_build is str 'fast'; wanted a mapping of flags"):
        load_settings({}, config)


@pytest.mark.parametrize(
    ("config", "tp", "differing"),
    [
        ("nemotron-70b-fp8.yaml", 4, "--gemm_plugin disable|--use_fp8_context_fmha enable"),
        ("nemotron-70b-int4.yaml", 2, "--gemm_plugin auto|--use_fp8_context_fmha disable"),
    ],
)
def test_the_plan_of_nemotron_prints_its_line(
    config: str,
    tp: int,
    differing: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    flags = [str(ROOT / "configs" / "nemotron-70b"), "--config", str(ROOT / "configs" / config)]
    assert cli.main([*flags, "--plan", "--tp", str(tp)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    name = "llama-3.1-nemotron-70b-instruct-" + config.split("-")[2].split(".")[0] + f"-tp{tp}"
    assert f"{name}.checkpoint --output_dir " in line
    assert "--max_seq_len 131072 --max_input_len 131072 --max_batch_size 64" in line
    for words in differing.split("|"):
        assert words in line
    assert line in written_lines(), "docs/tensorrt_llm.md shows another line"


def written_lines() -> set[str]:
    """The trtllm-build lines of the documentation, each written over several lines there."""
    text = (ROOT / "docs" / "tensorrt_llm.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return {shlex.join(shlex.split(line)) for line in lines if line.startswith("trtllm-build --")}
