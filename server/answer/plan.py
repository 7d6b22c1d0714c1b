"""How one request's answer is held to what was asked, and how its text is taken apart.

The one place where tools, reasoning and response_format meet. This file does not know HTTP, the
engine or any format of calls but Harmony, whose channels part reasoning and calls alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import Constraint
from enginehouse.server.formats.harmony import Harmony
from enginehouse.server.prompt.chat import Chat
from enginehouse.server.text.answer import AnswerParser
from enginehouse.server.text.reasoning import (
    MARKS,
    THINK,
    AroundParser,
    ReasoningParser,
    after_reasoning,
    goes_on_thinking,
    opens_reasoning,
)
from enginehouse.server.tools.format import Format, once
from enginehouse.server.tools.tool_choice import ToolUse, as_constraint, as_tag
from enginehouse.server.tools.unenforced import Unenforced


class AnswerPlan(NamedTuple):
    """new_parser: for each choice one. keep: special tokens the detokenizer shows it. unenforced:
    what the schemas say that the constraint does not.
    """

    new_parser: Callable[[], AnswerParser]
    keep: frozenset[int]
    constraint: Constraint | None
    unenforced: tuple[Unenforced, ...] = ()


def plan_answer(
    chat: Chat,
    prompt: str,
    tools: ToolUse,
    constraint: Constraint | None = None,
    unenforced: tuple[Unenforced, ...] = (),
    *,
    reasoning: bool | None = None,
    include_reasoning: bool = True,
    continued: str = "",
) -> AnswerPlan:
    """prompt: its text. constraint: of response_format, for an answer that calls no tool; it says
    all of it but for `unenforced`.

    continued: the text of the assistant's message that the answer goes on with.

    reasoning: whether it is parted from the content; None: as the engine says. Raises RequestError
    for tool_choice without a tool, two tools of a name, and schemas that cannot be promised.
    """
    if tools.forced and not tools.functions:
        raise RequestError(
            "tool_choice: found without tools; wanted tools, or no tool_choice",
            param="tool_choice",
            code="invalid_value",
        )
    names = [item.name for item in tools.functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            param = f"tools[{index}].function.name"
            raise RequestError(
                f'{param}: "{name}" is the name of tools[{names.index(name)}] too; '
                "wanted a name for each function",
                param=param,
                code="invalid_value",
            )
    form = chat.tool_format
    marks = chat.marks or THINK
    reasons = chat.marks is not None if reasoning is None else reasoning
    may_reason = reasons or chat.marks is not None
    kept: tuple[str, ...] = ()
    if isinstance(form, Harmony) or marks is MARKS["harmony"]:
        marks, form = MARKS["harmony"], Harmony(prompt, reasons, include_reasoning)
        within = opens_reasoning(prompt, continued, marks)
        kept, may_reason = form.kept, within or not form.in_message
        if constraint is not None and may_reason:
            constraint = _behind(marks.answer, constraint)
    within = opens_reasoning(prompt, continued, marks)
    begun, midway = reasons and within, reasons and goes_on_thinking(continued, marks)

    def new_parser() -> AnswerParser:
        parser = tools.parser(form)
        if not reasons or isinstance(form, Harmony):
            return parser
        if marks.around is not None:
            parser = AroundParser(parser, marks.around)
        return ReasoningParser(parser, begun, include_reasoning, midway=midway, marks=marks)

    if may_reason:
        kept += (marks.open, marks.close)
    if form is not None and tools.shown:
        kept += form.kept
    joined = _joined(form, tools, constraint)
    if form is not None and tools.shown and (tools.forced or constraint is not None):
        unenforced = (*(() if tools.forced else unenforced), *tools.unenforced())
    constraint = joined
    if constraint is not None and may_reason and not prompt.rstrip().endswith(marks.close):
        tag = after_reasoning(as_tag(constraint), within, marks)
        constraint = as_constraint(tag, constraint.param)
    return AnswerPlan(new_parser, chat.pieces.ids_of(kept), constraint, unenforced)


def _behind(text: str, constraint: Constraint) -> Constraint:
    elements = [{"type": "const_string", "value": text}, as_tag(constraint)]
    return as_constraint({"type": "sequence", "elements": elements}, constraint.param)


def _joined(
    form: Format | None, tools: ToolUse, constraint: Constraint | None
) -> Constraint | None:
    """What tools ask, and what response_format asks where no tool is called."""
    if form is None or not tools.shown:
        return constraint
    tag: dict[str, Any] | None
    if constraint is None or tools.forced:
        tag = tools.tag(form)
        return None if tag is None else as_constraint(tag)
    calls, other = tools.call_tag(form), as_tag(constraint)
    if calls["type"] not in ("or", "tag"):  # it may go on: several calls with no end of their own
        other = once(other)
    tag = {"type": "or", "elements": [calls, other]}
    return as_constraint(tag, constraint.param)
