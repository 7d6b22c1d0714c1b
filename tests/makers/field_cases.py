"""A row for each field of a completion request: what is legal, each bound, and what is not.

legal: JSON values that are taken. refused: (value, param, code). null is legal of all but those
that are required. needs: what else the request has to have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TYPE, VALUE, MISSING = "invalid_type", "invalid_value", "missing_required_parameter"
HELLO = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "a"}
SCHEMA = {"type": "object"}


class Field(NamedTuple):
    legal: list[Any]
    refused: list[tuple[Any, str, str]]
    needs: dict[str, Any] = {}
    required: bool = False


def number(name: str, legal: list[Any], outside: list[Any], **needs: Any) -> Field:
    """A number that may have a fraction."""
    wrong = [(value, name, TYPE) for value in ("0.7", True, [1], {}, "")]
    return Field(legal, [(value, name, VALUE) for value in outside] + wrong, needs)


def integer(name: str, legal: list[Any], outside: list[Any], **needs: Any) -> Field:
    made = number(name, legal, outside, **needs)
    return made._replace(refused=[*made.refused, (float(legal[-1]), name, TYPE)])


def flag(name: str, legal: tuple[bool, ...] = (True, False), **needs: Any) -> Field:
    return Field(list(legal), [(v, name, TYPE) for v in ("true", 1, 0, [], {})], needs)


def text(name: str, legal: list[Any], empty_is_refused: bool = False) -> Field:
    refused = [(value, name, TYPE) for value in (5, True, ["a"], {})]
    return Field(legal, refused + ([("", name, VALUE)] if empty_is_refused else []))


def words(name: str, legal: list[Any]) -> Field:
    """One of a few words."""
    return Field(legal, [(value, name, VALUE) for value in ("gold", "", 5, True, ["a"], {})])


def grammar(name: str, legal: list[Any], refused: list[tuple[Any, str, str]]) -> Field:
    return Field(legal, refused)


SHARED: dict[str, Field] = {
    "model": Field(
        ["tiny/chat"],
        [(5, "model", TYPE), (["tiny/chat"], "model", TYPE), (None, "model", MISSING)],
        required=True,
    ),
    "stream": flag("stream"),
    "stream_options": Field(
        [{}, {"include_usage": True}, {"continuous_usage_stats": True, "include_usage": None}],
        [
            (True, "stream_options", TYPE),
            ([], "stream_options", TYPE),
            ({"include_usage": 1}, "stream_options.include_usage", TYPE),
            ({"continuous_usage_stats": "a"}, "stream_options.continuous_usage_stats", TYPE),
            ({"include_obfuscation": 0}, "stream_options.include_obfuscation", TYPE),
        ],
        {"stream": True},
    ),
    "temperature": number("temperature", [0, 2, 0.7, 1e-9], [-0.001, 2.001]),
    "top_p": number("top_p", [1e-9, 1], [0, -1, 1.001]),
    "min_p": number("min_p", [0, 1, 0.5], [-0.001, 1.001]),
    "top_k": integer("top_k", [0, -1, 999], [-2, 1000]),
    "max_tokens": integer("max_tokens", [0, 1_000_000], [-1, 1_000_001]),
    "min_tokens": integer("min_tokens", [0, 5], [-1, 1_000_001], max_tokens=9),
    "stop": Field(
        ["a", [], ["a"], ["a"] * 16, "x" * 1000],
        [
            ("", "stop", VALUE),
            (["a", ""], "stop[1]", VALUE),
            ([5], "stop[0]", TYPE),
            ([None], "stop[0]", TYPE),
            (["a"] * 17, "stop", VALUE),
            (5, "stop", TYPE),
            ({}, "stop", TYPE),
        ],
    ),
    "include_stop_str_in_output": flag("include_stop_str_in_output", stop="a"),
    "stop_token_ids": Field(
        [[], [0], [303, 5]],
        [
            (5, "stop_token_ids", TYPE),
            ([True], "stop_token_ids[0]", TYPE),
            ([1.0], "stop_token_ids[0]", TYPE),
            ([-1], "stop_token_ids[0]", VALUE),
            ([304], "stop_token_ids[0]", VALUE),
            ([1] * 1025, "stop_token_ids", VALUE),
        ],
    ),
    "ignore_eos": flag("ignore_eos"),
    "n": integer("n", [1, 4], [0, 5]),
    "best_of": integer("best_of", [1, 20], [0, 21]),
    "presence_penalty": number("presence_penalty", [-2, 2, 0.5], [-2.001, 2.001]),
    "frequency_penalty": number("frequency_penalty", [-2, 2, 0.5], [-2.001, 2.001]),
    "repetition_penalty": number("repetition_penalty", [0.01, 5], [0.009, 0, 5.001]),
    "logit_bias": Field(
        [{}, {"0": -100, "303": 100}, {"5": 0.5}],
        [
            ([], "logit_bias", TYPE),
            ({"a": 1}, "logit_bias.a", VALUE),
            ({"01": 1}, "logit_bias.01", VALUE),
            ({"5": "1"}, "logit_bias.5", TYPE),
            ({"5": True}, "logit_bias.5", TYPE),
            ({"5": 101}, "logit_bias.5", VALUE),
            ({"5": -100.5}, "logit_bias.5", VALUE),
            ({"304": 1}, "logit_bias.304", VALUE),
        ],
    ),
    "prompt_logprobs": integer("prompt_logprobs", [0, 20], [-1, 21]),
    "seed": integer("seed", [0, 2**63, 9223372036854775999], [-1, 9223372036854776000, 10**30]),
    "priority": integer("priority", [-(2**31), 2**31 - 1], [-(2**31) - 1, 2**31]),
    "response_format": Field(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_object", "schema": SCHEMA},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            {"type": "structural_tag", "format": {}},
        ],
        [
            ("json", "response_format", TYPE),
            ({}, "response_format.type", MISSING),
            ({"type": "xml"}, "response_format.type", VALUE),
            ({"type": "json_schema"}, "response_format.json_schema", MISSING),
            ({"type": "text", "schema": SCHEMA}, "response_format.schema", VALUE),
            ({"type": "json_object", "schema": 5}, "response_format.schema", TYPE),
            (
                {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
                "response_format.json_schema.name",
                VALUE,
            ),
            (
                {"type": "json_schema", "json_schema": {"name": "x"}},
                "response_format.json_schema.schema",
                MISSING,
            ),
        ],
    ),
    "structured_outputs": Field(
        [{"regex": "a"}, {"json": SCHEMA}, {"choice": ["a"]}, {"json_object": True}],
        [
            ([], "structured_outputs", TYPE),
            ({}, "structured_outputs", VALUE),
            ({"regex": "a", "grammar": "b"}, "structured_outputs.grammar", VALUE),
            ({"choice": []}, "structured_outputs.choice", VALUE),
        ],
    ),
    "guided_json": Field(
        [SCHEMA, "{}"],
        [(5, "guided_json", TYPE), ("", "guided_json", TYPE), ("{", "guided_json", VALUE)],
    ),
    "guided_regex": text("guided_regex", ["a+"], empty_is_refused=True),
    "guided_grammar": text("guided_grammar", ['root ::= "a"'], empty_is_refused=True),
    "guided_choice": Field(
        [["a"], ["a", "b"]],
        [
            ("a", "guided_choice", TYPE),
            ([], "guided_choice", VALUE),
            ([""], "guided_choice[0]", VALUE),
            ([5], "guided_choice[0]", TYPE),
        ],
    ),
    "regex": text("regex", ["a+"], empty_is_refused=True),
    "ebnf": text("ebnf", ['root ::= "a"'], empty_is_refused=True),
    "strict_fields": flag("strict_fields"),
    "user": text("user", ["", "somebody"]),
    "metadata": Field([{}, {"a": {"b": [1]}}], [("a", "metadata", TYPE), ([], "metadata", TYPE)]),
    "service_tier": words("service_tier", ["auto", "flex"]),
    "safety_identifier": text("safety_identifier", ["", "a"]),
    "prompt_cache_key": text("prompt_cache_key", ["", "a"]),
}
CHAT: dict[str, Field] = {
    **SHARED,
    "messages": Field(
        [
            [HELLO],
            [HELLO, ANSWER, HELLO],
            [{"role": "system", "content": "a"}, HELLO],
            [HELLO, ANSWER],
            [ANSWER],
            [{"role": "system", "content": "a"}],
        ],
        [
            (None, "messages", MISSING),
            ([], "messages", VALUE),
            ("hello", "messages", TYPE),
            ([5], "messages[0]", TYPE),
            ([{"role": "user"}], "messages[0].content", MISSING),
            ([{"role": "robot", "content": "a"}], "messages[0].role", VALUE),
        ],
        required=True,
    ),
    "add_generation_prompt": flag("add_generation_prompt"),
    "continue_final_message": flag("continue_final_message", (True,), messages=[HELLO, ANSWER]),
    "chat_template_kwargs": Field(
        [{}],
        [([], "chat_template_kwargs", TYPE), ("a", "chat_template_kwargs", TYPE)],
    ),
    "reasoning_effort": words("reasoning_effort", ["none", "low", "xhigh"]),
    "verbosity": words("verbosity", ["low", "high"]),
    "prediction": Field(
        [{"type": "content", "content": "a"}],
        [
            ("a", "prediction", TYPE),
            ({"type": "x", "content": "a"}, "prediction.type", VALUE),
            ({"type": "content"}, "prediction.content", MISSING),
        ],
    ),
    "store": flag("store"),
    "max_completion_tokens": integer("max_completion_tokens", [0, 1_000_000], [-1, 1_000_001]),
    "logprobs": flag("logprobs"),
    "top_logprobs": integer("top_logprobs", [0, 20], [-1, 21], logprobs=True),
    "tools": Field(
        [[]],
        [
            ({}, "tools", TYPE),
            ([5], "tools[0]", TYPE),
            ([{"type": "x", "function": {"name": "f"}}], "tools[0].type", VALUE),
            ([{"type": "function"}], "tools[0].function", MISSING),
            (
                [{"type": "function", "function": {"name": "a b"}}],
                "tools[0].function.name",
                VALUE,
            ),
        ],
    ),
    "tool_choice": Field(
        ["none", "auto"],
        [
            ("perhaps", "tool_choice", VALUE),
            (5, "tool_choice", VALUE),
            ({"type": "function"}, "tool_choice", VALUE),
            ("required", "tool_choice", VALUE),
            ({"type": "function", "function": {"name": "f"}}, "tool_choice", VALUE),
        ],
    ),
    "parallel_tool_calls": flag("parallel_tool_calls"),
    "include_reasoning": flag("include_reasoning"),
    "separate_reasoning": flag("separate_reasoning"),
}
COMPLETIONS: dict[str, Field] = {
    **SHARED,
    "prompt": Field(
        ["hello", ["hello", "dog"], [5, 6], [[5], [6, 7]]],
        [
            (None, "prompt", MISSING),
            (5, "prompt", TYPE),
            ({}, "prompt", TYPE),
            ([], "prompt", TYPE),
            (["a", 5], "prompt[1]", TYPE),
            ([[5], []], "prompt[1]", TYPE),
            ([5, -1], "prompt[1]", TYPE),
            ([5, 304], "prompt[1]", VALUE),
            ("", "prompt", VALUE),
        ],
        required=True,
    ),
    "echo": flag("echo"),
    "logprobs": integer("logprobs", [0, 20], [-1, 21]),
    "add_special_tokens": flag("add_special_tokens"),
}

# Fields that only advise: values with which X-Ignored-Fields names them.
ADVICE: dict[str, list[Any]] = {
    "metadata": [{"a": {"b": [1]}}],
    "service_tier": ["flex"],
    "safety_identifier": ["a"],
    "prompt_cache_key": ["a"],
    "reasoning_effort": ["none", "low", "xhigh"],  # the tests' template reads none
    "verbosity": ["low", "high"],
    "prediction": [{"type": "content", "content": "a"}],
    "store": [True],
}
