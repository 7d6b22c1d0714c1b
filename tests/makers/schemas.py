"""JSON schemas of growing nastiness, for every test that sends some. Plain data and makers.

GOOD: ordinary ones. ODD: legal and unusual, each compiled or refused. BAD: refused.
"""

from __future__ import annotations

import json
from typing import Any

_KIND = {"a": {"const": 1}, "b": {"const": 1}, "c": {"const": 1}}
_DEFS = {
    "cat": {
        "type": "object",
        "properties": {"kind": {"const": "cat"}, "lives": {"enum": [7, 9]}},
        "required": ["kind", "lives"],
    },
    "dog": {
        "type": "object",
        "properties": {"kind": {"const": "dog"}, "good": {"type": "boolean"}},
        "required": ["kind", "good"],
    },
}


def obj(required: bool = True, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required else []
    return {"type": "object", "properties": properties, "required": names}


GOOD: dict[str, Any] = {
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer"},
    "integer_range": {"type": "integer", "minimum": -5, "maximum": 120},
    "integer_exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 9},
    "integer_multiple": {"type": "integer", "multipleOf": 7},
    "number_range": {"type": "number", "minimum": -0.5, "maximum": 1.25},
    "number_exclusive": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
    "string_length": {"type": "string", "minLength": 2, "maxLength": 5},
    "string_short": {"type": "string", "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]+$"},
    "pattern_open": {"type": "string", "pattern": "cat|dog"},
    "pattern_not": {"type": "string", "pattern": "^[^a]{1,6}$"},
    "date": {"type": "string", "format": "date"},
    "date_time": {"type": "string", "format": "date-time"},
    "time": {"type": "string", "format": "time"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "uuid": {"type": "string", "format": "uuid"},
    "enum": {"enum": ["red", "gr\u00fcn", 'b"l\\u\ne', 4, 0.1, None, True]},
    "enum_typed": {"type": "string", "enum": ["a", "b", 3]},
    "const": {"const": {"a": [1, 2.5, "x\n\u00e9"], "b": None}},
    "array": {"type": "array", "items": {"type": "integer", "maximum": 3}, "maxItems": 3},
    "array_min": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False},
    "tuple_open": {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}},
    "object": obj(a={"type": "integer", "maximum": 9}, b={"type": "boolean"}),
    "optional": obj(False, a={"const": 1}, b={"const": "x"}),
    "closed": {**obj(a={"const": 1}), "additionalProperties": False},
    "open": {**obj(a={"const": 1}), "additionalProperties": {"type": "null"}},
    "map": {"type": "object", "additionalProperties": {"enum": [1, 2]}, "maxProperties": 2},
    "keys": {"type": "object", "propertyNames": {"pattern": "^[a-c]$"}, "maxProperties": 2},
    "min_properties": {"type": "object", "properties": _KIND, "minProperties": 2},
    "max_properties": {"type": "object", "properties": _KIND, "maxProperties": 1},
    "pattern_properties": {
        "type": "object",
        "patternProperties": {"^[a-c]$": {"const": 1}},
        "additionalProperties": False,
    },
    "nullable": {"type": ["integer", "null"], "minimum": 3, "maximum": 5},
    "any_of": {"anyOf": [{"const": 1}, {"type": "string", "pattern": "^z+$"}]},
    "any_of_typed": {"type": "object", "anyOf": [obj(a={"const": 1}), obj(b={"const": 2})]},
    "one_of_types": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "discriminated": {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": _DEFS,
    },
    "all_of_one": {"allOf": [{"$ref": "#/$defs/cat"}], "$defs": _DEFS},
    "annotated": {"type": "null", "title": "t", "description": "d", "examples": [1], "$id": "x:y"},
    "tree": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"anyOf": [{"type": "null"}, obj(n={"$ref": "#/$defs/n"})]}},
    },
    "root_recursion": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
    },
    "odd_keys": obj(**{"a/b": {"const": 1}, "\u00e9": {"const": 2}, 'q"': {"const": 3}}),
    "required_elsewhere": {"type": "object", "required": ["x"], "properties": {"y": {"const": 1}}},
}

ODD: dict[str, Any] = {
    "anything": True,
    "empty": {},
    "any_object": {"type": "object"},
    "any_array": {"type": "array"},
    "any_string": {"type": "string"},
    "email": {"type": "string", "format": "email"},
    "uri": {"type": "string", "format": "uri"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "wide": obj(**{f"p{i}": {"type": "integer"} for i in range(300)}),
    "wide_optional": obj(False, **{f"p{i}": {"type": "integer"} for i in range(200)}),
    "wide_enum": {"enum": [f"value {i}" for i in range(3000)]},
    "long_string": {"type": "string", "maxLength": 10_000},
    "long_array": {"type": "array", "items": {"type": "integer"}, "maxItems": 10_000},
    "square": {
        "type": "array",
        "maxItems": 1000,
        "items": {"type": "array", "maxItems": 1000, "items": {"type": "string", "maxLength": 999}},
    },
    "deep": None,  # made below
    "refs": {
        "$ref": "#/$defs/d0",
        "$defs": {
            **{f"d{i}": obj(x={"$ref": f"#/$defs/d{i + 1}"}) for i in range(40)},
            "d40": {"type": "null"},
        },
    },
    "doubling": {
        "$ref": "#/$defs/d0",
        "$defs": {
            **{
                f"d{i}": obj(x={"$ref": f"#/$defs/d{i + 1}"}, y={"$ref": f"#/$defs/d{i + 1}"})
                for i in range(40)
            },
            "d40": {"type": "null"},
        },
    },
    "blow_up": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "nested_stars": {"type": "string", "pattern": "^(((a*)*)*)*b$"},
    "alternation": {"type": "string", "pattern": "^(a|a|aa|aaa){1,300}$"},
    "big_counts": {"type": "string", "pattern": "^" + "[a-z]{0,999}" * 40 + "$"},
    "subsets": {"type": "string", "pattern": "^(a|b)*a(a|b){22}$"},
    "endless": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
}


def nested(depth: int, leaf: Any) -> Any:
    schema = leaf
    for _ in range(depth):
        schema = obj(a=schema)
    return schema


def copied(depth: int, leaf: Any) -> dict[str, Any]:
    """A small text in which each of `depth` references points to all that is below it."""
    paths = ["#/$defs/x" + "/properties/a" * i for i in range(depth)]
    refs = {f"r{i}": {"$ref": path} for i, path in enumerate(paths)}
    return {**obj(False, **refs), "$defs": {"x": nested(depth, leaf)}}


ODD["deep"] = nested(25, {"type": "null"})

BAD: dict[str, Any] = {
    "false": False,
    "number": 3,
    "text": "{",
    "list": [],
    "not": {"not": {}},
    "if": {"if": {}, "then": {}, "type": "object"},
    "unique": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "dependent": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "all_of_two": {"allOf": [{"type": "integer"}, {"minimum": 2}]},
    "overlap": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "remote": {"$ref": "https://example.com/schema"},
    "missing_ref": {"$ref": "#/$defs/nothing"},
    "self_ref": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "ref_and_more": {"$ref": "#/$defs/a", "type": "object", "$defs": {"a": {}}},
    "typo": {"type": "object", "proprties": {}},
    "unknown_type": {"type": "float"},
    "typeless": {"minimum": 3},
    "format": {"type": "string", "format": "shoe size"},
    "format_and_length": {"type": "string", "format": "date", "maxLength": 3},
    "number_multiple": {"type": "number", "multipleOf": 0.5},
    "range_multiple": {"type": "integer", "multipleOf": 7, "minimum": 3},
    "huge_bound": {"type": "integer", "minimum": 10**30},
    "fine_bound": {"type": "number", "minimum": 1e-9},
    "empty_range": {"type": "integer", "minimum": 5, "maximum": 4},
    "empty_enum": {"enum": []},
    "enum_of_no_type": {"type": "integer", "enum": ["a"]},
    "backreference": {"type": "string", "pattern": r"(a)\1"},
    "lookahead": {"type": "string", "pattern": "a(?=b)"},
    "half_group": {"type": "string", "pattern": "(a"},
    "inner_anchor": {"type": "string", "pattern": "a^b"},
    "required_forbidden": {"type": "object", "required": ["a"], "additionalProperties": False},
    "huge_count": {"type": "array", "items": {}, "maxItems": 10**9},
    "negative_count": {"type": "string", "minLength": -1},
    "count_text": {"type": "string", "minLength": "2"},
    "required_text": {"type": "object", "required": "a"},
    "properties_list": {"type": "object", "properties": []},
    "too_deep": nested(80, {"type": "null"}),
    "surrogate": {"const": "\ud800"},
    "huge_number": {"const": 10**400},
}


_POINT = obj(x={"type": "integer", "maximum": 9}, y={"type": "integer", "maximum": 9})
_EXPRESSION = {
    "number": obj(value={"type": "integer", "minimum": 0, "maximum": 9}),
    "sum": obj(left={"$ref": "#/$defs/number"}, right={"$ref": "#/$defs/any"}),
    "any": {"anyOf": [{"$ref": "#/$defs/number"}, {"$ref": "#/$defs/sum"}]},
}
GOOD |= {
    "const_empty": {"const": ""},
    "const_null": {"const": None},
    "const_false": {"const": False},
    "const_number": {"const": -1.5},
    "const_deep": {"const": [[], {}, [[{"a": [None]}]]]},
    "const_text": {"const": '</think> <tool_call> \U0001f642 \\ " \u2028'},
    "enum_nested": {"enum": [[1, 2], {"a": None}, "x", {"\u043a\u043b\u044e\u0447": "\u043d"}]},
    "enum_prefixes": {"enum": ["a", "ab", "abc", "abcd", ""]},
    "pattern_words": {"type": "string", "pattern": "^(red|green)(,(red|green)){0,2}$"},
    "pattern_classes": {"type": "string", "pattern": r"^\d{4}/\d\d?\s\w$"},
    "pattern_dots": {"type": "string", "pattern": "^.{1,4}$"},
    "pattern_accents": {"type": "string", "pattern": "^[\u00e0-\u00fc]{1,3}$"},
    "pattern_escaped": {"type": "string", "pattern": r"^\(\[\.\*\]\)$"},
    "json_pointer": {"type": "string", "format": "json-pointer"},
    "duration": {"type": "string", "format": "duration"},
    "negative": {"type": "integer", "minimum": -99, "maximum": -1},
    "one_number": {"type": "integer", "minimum": 7, "maximum": 7},
    "wide_range": {"type": "integer", "minimum": -(2**53), "maximum": 2**53},
    "narrow_range": {"type": "number", "minimum": 0.25, "maximum": 0.5},
    "array_empty": {"type": "array", "items": {"type": "integer"}, "maxItems": 0},
    "array_exact": {"type": "array", "items": {"const": "x"}, "minItems": 3, "maxItems": 3},
    "array_of_arrays": {
        "type": "array",
        "maxItems": 2,
        "items": {"type": "array", "maxItems": 2, "items": {"type": "null"}},
    },
    "array_of_points": {"type": "array", "items": _POINT, "minItems": 1, "maxItems": 2},
    "empty_object": {"type": "object", "properties": {}, "additionalProperties": False},
    "required_backwards": {**obj(a={"const": 1}, b={"const": 2}), "required": ["b", "a"]},
    "optional_middle": {
        **obj(a={"const": 1}, b={"const": 2}, c={"const": 3}),
        "required": ["a", "c"],
    },
    "property_named_properties": obj(properties={"const": 1}, type={"const": "object"}),
    "map_of_points": {"type": "object", "additionalProperties": _POINT, "maxProperties": 1},
    "nullable_object": {**_POINT, "type": ["object", "null"]},
    "three_types": {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 5},
    "expression": {"$ref": "#/$defs/sum", "$defs": _EXPRESSION},
    "ref_into_properties": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"$ref": "#/properties/a"}},
        "required": ["a", "b"],
    },
    "ref_of_old": {"$ref": "#/definitions/p", "definitions": {"p": _POINT}},
    "as_pydantic_writes": {
        "$defs": {"P": {**_POINT, "title": "P", "description": "A point."}},
        "properties": {
            "at": {"$ref": "#/$defs/P"},
            "label": {"anyOf": [{"enum": ["a"]}, {"type": "null"}], "default": None},
        },
        "required": ["at"],
        "title": "Place",
        "type": "object",
    },
    "draft_named": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "null"},
}

ODD |= {
    "ref_escaped": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 1}}},
    "open_property": obj(a=True),
    "number": {"type": "number"},
    "hostname": {"type": "string", "format": "hostname"},
    "uri_reference": {"type": "string", "format": "uri-reference"},
    "uri_template": {"type": "string", "format": "uri-template"},
    "array_huge_minimum": {"type": "array", "items": {"const": 1}, "minItems": 9_999},
    "string_huge_minimum": {"type": "string", "minLength": 10_000, "maxLength": 10_000},
    "many_required": {
        "type": "object",
        "required": [f"r{i}" for i in range(400)],
        "additionalProperties": {"type": "null"},
    },
    "any_of_many": {"anyOf": [{"const": i} for i in range(1500)]},
    "any_of_objects": {"anyOf": [obj(**{f"k{i}": {"type": "string"}}) for i in range(200)]},
    "any_of_ambiguous": {"anyOf": [{"type": "string"}] * 200},
    "array_of_anything": {"type": "array", "items": {}, "minItems": 50, "maxItems": 60},
    "cube": {
        "type": "array",
        "maxItems": 100,
        "items": {
            "type": "array",
            "maxItems": 100,
            "items": {"type": "array", "maxItems": 100, "items": {"type": "number"}},
        },
    },
    "long_key": obj(**{"k" * 20_000: {"const": 1}}),
    "long_const": {"const": "\u00fc" * 20_000},
    "key_of_controls": obj(**{"\x00\x1f\x7f\n\t": {"const": 1}}),
    "mutual": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": obj(False, b={"$ref": "#/$defs/b"}),
            "b": obj(False, a={"$ref": "#/$defs/a"}),
        },
    },
    "mutual_endless": {
        "$ref": "#/$defs/a",
        "$defs": {"a": obj(b={"$ref": "#/$defs/b"}), "b": obj(a={"$ref": "#/$defs/a"})},
    },
    "fan_of_refs": {
        "type": "object",
        "properties": {f"p{i}": {"$ref": "#/$defs/x"} for i in range(400)},
        "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}},
    },
    "pattern_of_alternatives": {"type": "string", "pattern": "|".join(f"w{i}" for i in range(900))},
    "pattern_counted_twice": {"type": "string", "pattern": "^(.{0,500}){0,500}$"},
    "pattern_all_of_unicode": {"type": "string", "pattern": "^[^\\x00-\\x7f]{0,300}$"},
    "pattern_properties_wide": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,200}$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "names_of_a_pattern": {"type": "object", "propertyNames": {"pattern": "^(a|aa|aaa)*$"}},
    "min_properties_open": {"type": "object", "minProperties": 200},
    "required_and_named": {
        **obj(False, **{f"p{i}": {"const": i} for i in range(60)}),
        "minProperties": 30,
        "maxProperties": 31,
    },
}

BAD |= {
    "null_schema": "null",
    "string_schema": '"object"',
    "draft_07_tuple": {"type": "array", "items": [{"type": "integer"}, {"type": "null"}]},
    "draft_07_dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "dynamic_ref": {"$dynamicRef": "#a"},
    "anchor_ref": {"$ref": "#a", "$defs": {"x": {"$anchor": "a"}}},
    "file_ref": {"$ref": "file:///etc/passwd"},
    "ref_number": {"$ref": 5},
    "type_number": {"type": 5},
    "type_empty": {"type": []},
    "type_nested": {"type": [["string"]]},
    "any_of_object": {"anyOf": {"type": "null"}},
    "any_of_empty": {"anyOf": []},
    "prefix_items_object": {"type": "array", "prefixItems": {"type": "null"}},
    "items_text": {"type": "array", "items": "integer"},
    "pattern_number": {"type": "string", "pattern": 5},
    "pattern_range": {"type": "string", "pattern": "[z-a]"},
    "pattern_count": {"type": "string", "pattern": "a{5,2}"},
    "pattern_bracket": {"type": "string", "pattern": "[a"},
    "pattern_boundary": {"type": "string", "pattern": r"a\bc"},
    "pattern_lookbehind": {"type": "string", "pattern": "(?<=a)b"},
    "minimum_text": {"type": "integer", "minimum": "5"},
    "minimum_bool": {"type": "integer", "minimum": True},
    "multiple_of_zero": {"type": "integer", "multipleOf": 0},
    "length_fraction": {"type": "string", "maxLength": 2.5},
    "length_crossed": {"type": "string", "minLength": 5, "maxLength": 2},
    "items_crossed": {"type": "array", "items": {}, "minItems": 3, "maxItems": 2},
    "required_of_numbers": {"type": "object", "required": [1, 2]},
    "contradiction_in_all_of": {"allOf": [{"const": 1}, {"const": 2}]},
}


def as_text(schema: Any) -> str:
    """The schema as a client would send it; a string is sent as it is."""
    return schema if isinstance(schema, str) else json.dumps(schema)


BAD["copied_by_refs"] = copied(40, obj(**{f"p{i}": {} for i in range(600)}))
DEEP_TEXT = '{"items":' * 5000 + "{}" + "}" * 5000
BAD["far_too_deep"] = DEEP_TEXT
BAD["long"] = {"enum": ["x" * 70_000]}
BAD["infinity"] = '{"const": Infinity}'
BAD["huge_exponent"] = '{"const": 1e999}'

# GOOD ones that xgrammar enforces from 0.2.8 on, and that are refused before.
NEWER = {
    *("integer_multiple", "number_range", "number_exclusive", "narrow_range", "wide_range"),
    *("string_length", "string_short", "pattern_not", "pattern_dots", "pattern_accents"),
    "odd_keys",
}
