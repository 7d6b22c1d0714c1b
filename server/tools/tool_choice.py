"""What a request's tool_choice makes of its tools and of a format of calls.

This file does not know HTTP, the tokenizer, any format or how calls are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.constraint import MAX_VALUE_BYTES
from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.runtime.schemas.effort import limited
from enginehouse.server.text.answer import AnswerParser, OnlyCalls, PlainParser
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.json_reader import to_json
from enginehouse.server.tools.unenforced import Unenforced


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says of tools. choice: none, auto, required; named: the function's name.

    parallel false: one call at most.
    """

    functions: tuple[ToolFunction, ...] = ()
    choice: str = "auto"
    named: str | None = None
    parallel: bool = True

    @property
    def shown(self) -> tuple[ToolFunction, ...]:
        """The functions the model is told of: with tool_choice none, none."""
        return () if self.choice == "none" and self.named is None else self.functions

    @property
    def forced(self) -> bool:
        """The answer is a call, whatever the model would have liked."""
        return self.named is not None or self.choice == "required"

    def parser(self, form: Format | None) -> AnswerParser:
        """Of one choice. form None: of a model that calls no tools."""
        functions = self._callable()
        if form is None or not functions:
            return PlainParser() if form is None else form.plain()
        single = self.named is not None or not self.parallel
        parser = form.reader(functions, 1 if single else None)
        return OnlyCalls(parser) if self.forced else parser

    def tag(self, form: Format) -> dict[str, Any] | None:
        """The structural tag's format that the answer must follow; None: it is free.

        Raises RequestError where a schema is promised that the format cannot enforce.
        """
        functions = self._callable()
        if self.forced:
            return self.call_tag(form)
        strict = [index for index, item in enumerate(functions) if item.strict]
        if not strict and (self.parallel or not functions):
            return None
        self._check_schemas([functions[index] for index in strict])
        tag = form.free(functions, self.parallel)
        if tag is None and strict:
            param = f"tools[{strict[0]}].function.strict"
            raise RequestError(
                f"{param}: this model's calls ({form.name}) cannot be held to a schema unless "
                'tool_choice is "required" or names the function; leave strict out',
                param=param,
                code="unsupported_parameter",
            )
        return tag

    def call_tag(self, form: Format) -> dict[str, Any]:
        """The structural tag's format of an answer that is nothing but calls."""
        functions = self._callable()
        self._check_schemas(functions)
        return form.forced(functions, self.parallel and self.named is None)

    def unenforced(self) -> tuple[Unenforced, ...]:
        """What the schemas of forced calls say and `call_tag` does not."""
        callable_ = self._callable()
        return tuple(
            each
            for index, item in enumerate(self.functions)
            if item in callable_
            for each in item.unenforced(f"tools[{index}].function.parameters")
        )

    def _check_schemas(self, functions: Sequence[ToolFunction]) -> None:
        """RequestError where one of them cannot be enforced, or all are too long together."""
        size = sum(len(to_json(item.declared()).encode(errors="replace")) for item in functions)
        if size > MAX_VALUE_BYTES:
            raise RequestError(
                f"tools: the schemas to enforce have {size} bytes; wanted at most "
                f"{MAX_VALUE_BYTES}: send fewer tools, or shorter descriptions",
                param="tools",
                code="invalid_value",
            )
        with limited():
            for index, item in enumerate(self.functions):
                if item in functions:
                    item.check_schema(f"tools[{index}].function.parameters")

    def _callable(self) -> tuple[ToolFunction, ...]:
        if self.named is None:
            return self.shown
        found = tuple(item for item in self.functions if item.name == self.named)
        if not found:
            raise RequestError(
                f'tool_choice.function.name: "{self.named}" is none of the tools; '
                f"wanted one of {', '.join(item.name for item in self.functions) or '(no tools)'}",
                param="tool_choice.function.name",
                code="invalid_value",
            )
        return found


def as_constraint(tag: dict[str, Any], param: str = "tools") -> Constraint:
    text = json.dumps({"type": "structural_tag", "format": tag}, ensure_ascii=False)
    return Constraint(ConstraintKind.STRUCTURAL_TAG, text, param)


def as_tag(constraint: Constraint) -> dict[str, Any]:
    """A constraint of any kind as a structural tag's format, to be joined with others."""
    match constraint.kind:
        case ConstraintKind.STRUCTURAL_TAG:
            tag: dict[str, Any] = json.loads(constraint.value)["format"]
            return tag
        case ConstraintKind.JSON_OBJECT:
            schema: Any = {"type": "object"}
        case ConstraintKind.JSON_SCHEMA:
            schema = json.loads(constraint.value)
        case ConstraintKind.REGEX:
            return {"type": "regex", "pattern": constraint.value}
        case ConstraintKind.EBNF:
            return {"type": "grammar", "grammar": constraint.value}
        case ConstraintKind.CHOICE:
            choices = [
                {"type": "const_string", "value": text} for text in json.loads(constraint.value)
            ]
            return {"type": "or", "elements": choices}
    return {"type": "json_schema", "json_schema": schema}
