"""Which of many like cases a test is asked each time; `make test THOROUGH=1` asks all of them.

A test that asks the same of every family, form, cut or instruction set is here with the cases that
differ in kind: a regular expression of the parameters in its name, None for a test that is long
and whose parts others have. What is left out is deselected, which pytest counts.
"""

from __future__ import annotations

import os
import re

import pytest

THOROUGH = os.environ.get("ENGINEHOUSE_THOROUGH", "0") != "0"
_KINDS = "llama|biased|gemma2|phi3|mixtral|qwen2-moe|gpt-oss|deepseek-v3|qwen3-next|gemma3n"
FEW = rf"^({_KINDS})(?!\w)"
IN_PLANS = rf"^({_KINDS}|nemotron-nas|llama4)(?!\w)"  # whose TensorRT network has layers of its own
SOME_KINDS = "^(awq|gptq v1|modelopt fp8|compressed-tensors fp8 static|auto-round|modelopt int8)$"
IN_FOUR = r"(^|-)2-2(-|$)"  # TP x PP, which has all that one rank has

ASKED: dict[str, dict[str, str | None]] = {
    "build/families/test_families.py": {
        "test_logits_and_greedy_tokens_equal_transformers": IN_FOUR,
        "test_fp8_weights_are_the_models_within_a_rounding": FEW,
        "test_layers_that_read_others_keys_have_no_scale_of_their_own": r"gemma3n",
        "test_a_walk_over_layers_of_several_kinds_settles_awqs_factors": r"gemma3n",
    },
    "build/tensorrt/test_network.py": {
        "test_the_network_answers_as_the_torch_backend": IN_PLANS + ".*-[24]$",
        "test_parts_one_after_another_answer_as_the_torch_backend": IN_PLANS,
    },
    "build/tensorrt/test_compile.py": {
        "test_every_kind_of_decoder_compiles_for_all_targets_at_once": (
            "^(llama|gemma2|phi3-longrope|mixtral|gpt-neox|gpt-oss|deepseek-v3)$"
        ),
        "test_fewer_ranks_compile_for_all_that_the_table_takes_at_once": "(int4|fp8)-1$",
        "test_every_form_compiles_with_its_weights_in_the_plan": "int4|fp8$",
        "test_an_engine_in_parts_lists_them_in_the_order_in_which_they_run": None,
        "test_baked_weights_give_each_rank_plans_of_its_own": None,
        "test_each_form_compiles_or_is_refused_as_the_table_says": r"\b89\b",
    },
    "build/plan/test_plan_matrix.py": {
        "test_a_plan_is_a_page_or_one_sentence": "^(Llama|Deci|Mixtral|Youtu|DeepseekV2)For|-fp8$",
    },
    "runtime/batching/test_determinism.py": {
        "test_a_deterministic_engine_gives_the_same_bits_beside_neighbours_and_when_preempted": (
            "none-bfloat16|int4-bfloat16|fp8-float32"
        ),
    },
    "build/tensorrt_llm/test_builder.py": {
        "test_an_engine_of_other_arithmetic_is_accepted": None,
    },
    "build/convert/test_resume.py": {
        "test_an_interrupted_conversion_goes_on": "^6-",
    },
    "build/sources/test_corrupt_inputs.py": {
        "test_a_real_limit_on_file_sizes_is_one_sentence": "^100$",
    },
    "build/convert/test_padded_engines.py": {
        "test_merged_ranks_equal_transformers_at_every_tp": FEW,
        "test_fp8_is_the_unpadded_models_to_the_last_bit": FEW,
        "test_other_forms_answer_as_the_unpadded_model": r"^(llama|gemma2)",
        "test_the_strict_double_takes_a_padded_checkpoint": r"^llama",
    },
    "build/convert/test_hf_export.py": {
        "test_both_formats_hold_the_same_numbers": FEW,
        "test_an_unquantised_export_is_the_source": FEW,
    },
    "build/convert/test_cuts.py": {
        "test_a_familys_folder_is_cut_again_bit_for_bit": FEW,
        "test_merging_every_tensor_of_every_rank_gives_the_model_back": None,
    },
    "build/convert/test_conversion.py": {
        "test_peak_memory_stays_near_the_largest_tensor": None,
        "test_what_is_written_does_not_depend_on_the_pieces": r"^(int4|fp8)$",
        "test_rank_files_equal_the_contracts_tables": r"\.none|fp8_rowwise|g64",
    },
    "build/sources/test_quantized_families.py": {
        "test_an_engine_of_the_family_holds_the_checkpoints_own_numbers": IN_FOUR,
    },
    "build/sources/test_quantized_source.py": {
        "test_an_engine_holds_the_checkpoints_own_numbers": IN_FOUR,
        "test_an_engine_answers_as_transformers_with_the_dequantised_weights": SOME_KINDS,
    },
    "runtime/tensorrt/test_executor.py": {
        "test_greedy_tokens_equal_the_torch_backends": r"int4|gemma2|fp8_rowwise|mixtral|biased",
        "test_no_neighbour_changes_a_step_when_deterministic": r"float32",
    },
    "runtime/tensorrt/test_parts.py": {
        "test_greedy_tokens_equal_the_torch_backends": (
            r"^(llama-|gemma3|olmoe|nemotron-nas|deepseek)"
        ),
    },
    "runtime/cpu/test_tiny_model.py": {
        "*": None,  # the kernels under sanitizers, and on ARM64: minutes of compilers
    },
    "runtime/cpu/test_executor.py": {
        "test_forms_of_one_byte_are_run": r"^(?!gemma(4|3n))|-fp8$",
        "test_every_compiler_of_this_machine_gives_the_logits": r"\+\+$",
        "test_every_instruction_set_of_this_cpu_gives_the_logits": r"-(avx2|plain)$",
    },
    "regress/mutations/test_numerics_see.py": {
        "test_it_is_flagged_by_the_check_named_for_it": ("group's scale|rows swapped|EOS|template"),
    },
    "regress/test_backends.py": {
        "*": None,
    },
    "regress/test_run.py": {
        "test_an_engine_that_fails_under_load_is_a_finding_and_ends_no_run": None,
        "test_memory_up_by_a_third_is_flagged": None,
        "test_a_url_of_our_own_server_is_asked_what_can_be_asked_of_it": None,
    },
    "regress/test_any_bytes.py": {
        "test_a_text_file_that_is_nested_too_deep_is_refused": None,
    },
    "server/test_generated_clients.py": {
        "*": None,
    },
    "server/launch/test_json_schemas.py": {
        "*": None,
    },
    "server/launch/test_stream_equals_plain.py": {
        "*": None,
    },
    "server/ray_serve/test_cluster.py": {  # test_recipes.py builds of its file
        "*": None,
    },
    "server/launch/test_gunicorn.py": {  # scripts/faults.py has the first
        "test_a_host_that_stands_still_is_ended_and_its_streams_are_told": None,
        "test_a_worker_that_is_still_starting_is_ended_too": None,
    },
    "test_deploy.py": {
        "test_slurm_s_array_makes_shares_and_the_job_behind_it_joins_them": None,
    },
    "server/launch/test_traces.py": {
        "test_a_collector_that_hangs_holds_no_answer_up_and_no_worker": None,
    },
    "server/launch/test_tools.py": {
        "*": r"^(?!hermes)",
    },
    "test_ci_recipes.py": {
        "test_the_recipe_builds_keeps_and_judges_an_engine": None,
    },
    "test_trtllm_path.py": {
        "test_a_checkpoint_without_an_engine_is_served_over_the_gpus_that_are_asked_for": None,
    },
}


def is_asked(item: pytest.Item) -> bool:
    """Whether this case of a test is one that is asked each time."""
    path, _, rest = item.nodeid.partition("::")
    name, _, case = rest.partition("[")
    tests = ASKED.get(path.removeprefix("tests/"), {})
    wanted = tests.get(name, tests.get("*", ""))
    return wanted is not None and re.search(wanted, case.removesuffix("]")) is not None
