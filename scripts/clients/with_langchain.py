# /// script
# requires-python = ">=3.10"
# dependencies = ["langchain-openai>=0.3"]
# ///
"""LangChain's ChatOpenAI, with tools bound to it and with structured output."""

import json
from typing import Any

from asked import (
    API_KEY,
    BASE_URL,
    CITY,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    RESULT,
    TIMEOUT_S,
    WEATHER,
    WEATHER_QUESTION,
    check_arguments,
    check_city,
    say,
    say_stream,
)
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def _joined(chunks: Any) -> Any:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


chat = ChatOpenAI(base_url=BASE_URL, api_key=API_KEY, model=MODEL)
chat = chat.model_copy(
    update={"temperature": 0, "max_tokens": MAX_TOKENS, "request_timeout": TIMEOUT_S}
)
question = [HumanMessage(QUESTION)]
plain = chat.invoke(question)
say("plain", plain.content)
say("", f"{plain.response_metadata['finish_reason']} {plain.usage_metadata['total_tokens']}")
pieces = [chunk.content for chunk in chat.stream(question)]
say_stream(pieces, plain.content)
for choice in ("required", "get_weather", "auto"):
    for stream in (False, True):
        asked: list[Any] = [HumanMessage(WEATHER_QUESTION)]
        bound = chat.bind_tools([WEATHER], tool_choice=choice)
        title = f"tools {choice}{' streamed' if stream else ''}"
        message = _joined(bound.stream(asked)) if stream else bound.invoke(asked)
        for call in message.tool_calls:
            say(title, f"{call['name']}({json.dumps(call['args'])}) {call['id']}")
            check_arguments(call["name"], call["args"])
        if not message.tool_calls:
            say(title, message.content)
            assert choice == "auto", "no call was made"
            continue
        asked += [
            message,
            *(ToolMessage(RESULT, tool_call_id=c["id"]) for c in message.tool_calls),
        ]
        second = chat.bind_tools([WEATHER], tool_choice="none")
        answer = _joined(second.stream(asked)) if stream else second.invoke(asked)
        say("  and then", answer.content)
        assert answer.content and not answer.tool_calls
for method in ("json_schema", "function_calling"):
    city = chat.with_structured_output(CITY, method=method).invoke(question)
    say(f"structured, {method}"[:24], city)
    check_city(city)
