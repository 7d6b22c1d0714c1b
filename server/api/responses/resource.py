"""The response object and its output items, as they are told and kept. Knows no event, no HTTP.

Source: OpenAI's API reference, "The response object"; Open Responses, `ResponseResource`.
"""

from __future__ import annotations

from enginehouse.server.answer.completion import Completion
from enginehouse.server.api.responses.body import (
    AllowedTools,
    FunctionChoice,
    FunctionTool,
    ResponsesBody,
    TextFormat,
)
from enginehouse.server.wire.ids import Json, new_id


def head_of(body: ResponsesBody, response_id: str, created: int, model: str) -> Json:
    """A response of which nothing is known yet, with what was asked of it."""
    effort, summary = body.reasoning.effort, body.reasoning.summary
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions or None,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "conversation": None if body.conversation is None else {"id": body.conversation.id},
        "reasoning": {"effort": effort, "summary": summary or body.reasoning.generate_summary},
        "service_tier": "default",
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": _format(body.text.format), "verbosity": body.text.verbosity or "medium"},
        "tool_choice": _choice(body.tool_choice),
        "tools": [_tool(tool) for tool in body.tools],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "truncation": body.truncation,
        "usage": None,
        "user": body.user,
        "metadata": body.metadata,
        "safety_identifier": body.safety_identifier or None,
        "prompt_cache_key": body.prompt_cache_key or None,
    }


def usage_of(completion: Completion) -> Json:
    num_input, num_output = completion.num_prompt_tokens, completion.num_completion_tokens
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": completion.num_cached_tokens},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": completion.num_reasoning_tokens},
        "total_tokens": num_input + num_output,
        "estimated_cost": completion.cost,
    }


def message_item(status: str) -> Json:
    return {
        "id": new_id("msg"),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [],
    }


def text_part() -> Json:
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def reasoning_item(status: str) -> Json:
    """What was thought is told openly, and nothing summarises it."""
    item = {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": []}
    return {**item, "status": status}


def reasoning_part() -> Json:
    return {"type": "reasoning_text", "text": ""}


def call_item(call_id: str, name: str, namespace: str | None, status: str) -> Json:
    item = {"id": new_id("fc"), "type": "function_call", "status": status, "call_id": call_id}
    group = {} if namespace is None else {"namespace": namespace}
    return {**item, "name": name, **group, "arguments": ""}


def _format(wanted: TextFormat) -> Json:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return {
        "type": "json_schema",
        "name": wanted.name,
        "description": wanted.description or None,
        "schema": wanted.schema_,
        "strict": wanted.strict,
    }


def _tool(tool: FunctionTool) -> Json:
    group = {} if tool.namespace is None else {"namespace": tool.namespace}
    return {
        "type": "function",
        "name": tool.name,
        **group,
        "description": tool.description or None,
        "parameters": tool.parameters or None,
        "strict": tool.strict,
    }


def _choice(choice: str | FunctionChoice | AllowedTools) -> str | Json:
    if isinstance(choice, str):
        return choice
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "name": choice.name}
    tools = [{"type": "function", "name": tool.name} for tool in choice.tools]
    return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
