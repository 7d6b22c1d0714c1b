"""Talk to a running server with other people's clients, and print what was said.

    python scripts/client_transcripts.py --base-url http://127.0.0.1:8000/v1 --model NAME

The official openai client, LangChain's ChatOpenAI and LiteLLM each ask for a plain answer, a
stream, tools in two turns (the call, its result, the answer) and JSON of a schema. Clients that
are not installed are named and left out. The exit status is 1 when anything is not as it should
be. Answers are short, each request has a time limit, none is sent twice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

MAX_TOKENS = 64
TIMEOUT_S = 60
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER_QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
RESULT = json.dumps({"celsius": 18, "sky": "clear"})
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CITY: dict[str, Any] = {
    "title": "City",
    "description": "A city and its country.",
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "country": {"type": "string", "maxLength": 16},
        "capital": {"type": "boolean"},
    },
    "required": ["name", "country", "capital"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": CITY, "strict": True},
}


def say(title: str, told: Any) -> None:
    text = told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)
    print(f"  {title:<24} {text}", flush=True)


def check_arguments(name: str, arguments: Any) -> None:
    data = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "get_weather", name
    assert set(data) == {"city", "unit"} and data["unit"] in ("C", "F"), data


def check_city(data: Any) -> None:
    assert set(data) == {"name", "country", "capital"} and type(data["capital"]) is bool, data


def with_openai(base_url: str, model: str, api_key: str) -> None:
    """The official client."""
    import openai

    with openai.OpenAI(
        base_url=base_url, api_key=api_key, max_retries=0, timeout=TIMEOUT_S
    ) as client:
        _ask_as_openai(client.chat.completions.create, {"model": model})
        say("models", [card.id for card in client.models.list()])
        text = client.completions.create(
            model=model, prompt="The capital of France is", max_tokens=8, temperature=0
        )
        say("text completion", text.choices[0].text)
        parsed = client.chat.completions.parse(
            model=model,
            messages=QUESTION,
            max_tokens=MAX_TOKENS,
            response_format=_city_model(),
        )
        say("parsed", repr(parsed.choices[0].message.parsed))
        assert parsed.choices[0].message.parsed is not None
        try:
            client.chat.completions.create(model=model, messages=QUESTION, temperature=3)
        except openai.BadRequestError as error:
            say("refused", f"{error.status_code} param={error.param} code={error.code}")
        else:
            raise AssertionError("a temperature of 3 was taken")


def _city_model() -> Any:
    from pydantic import Field, create_model

    return create_model(
        "City", name=(str, Field(max_length=16)), country=(str, Field(max_length=16))
    )


def with_litellm(base_url: str, model: str, api_key: str) -> None:
    """LiteLLM, told that the server speaks as OpenAI's does."""
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    common = {
        "model": f"openai/{model}",
        "api_base": base_url,
        "api_key": api_key,
        "timeout": TIMEOUT_S,
        "num_retries": 0,
    }
    _ask_as_openai(litellm.completion, common)
    try:
        litellm.completion(**common, messages=QUESTION, temperature=3)
    except litellm.BadRequestError as error:
        say("refused", str(error.status_code))
    else:
        raise AssertionError("a temperature of 3 was taken")


def _ask_as_openai(create: Callable[..., Any], common: dict[str, Any]) -> None:
    """Every kind of request, by a function that takes and gives what OpenAI's does."""
    short = {**common, "max_tokens": MAX_TOKENS, "temperature": 0}
    answer = create(**short, messages=QUESTION)
    plain = answer.choices[0].message.content
    say("plain", plain)
    say("", f"finish_reason={answer.choices[0].finish_reason} tokens={answer.usage.total_tokens}")
    chunks = list(
        create(**short, messages=QUESTION, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    say("stream", "|".join(piece for piece in pieces if piece))
    assert "".join(pieces) == plain, "the stream says something else"
    for choice in ("required", NAMED, "auto"):
        for stream in (False, True):
            _two_turns(create, short, choice, stream)
    answer = create(**short, messages=QUESTION, response_format=RESPONSE_FORMAT)
    say("json_schema", answer.choices[0].message.content)
    check_city(json.loads(answer.choices[0].message.content))


def _two_turns(create: Callable[..., Any], short: Any, choice: Any, stream: bool) -> None:
    """Ask, answer each call, ask again."""
    asked: list[Any] = [WEATHER_QUESTION]
    name = choice if isinstance(choice, str) else "named"
    title = f"tools {name}{' streamed' if stream else ''}"
    fields = {**short, "tools": [WEATHER], "tool_choice": choice, "messages": asked}
    message, reason = _message(create, fields, stream)
    calls = message.get("tool_calls") or []
    for call in calls:
        say(title, f"{call['function']['name']}({call['function']['arguments']}) {call['id']}")
        if reason != "length":
            check_arguments(call["function"]["name"], call["function"]["arguments"])
    if not calls:
        say(title, message["content"])
        assert choice == "auto", "no call was made"
        return
    assert reason == "tool_calls", reason
    asked.append(message)
    asked += [{"role": "tool", "tool_call_id": call["id"], "content": RESULT} for call in calls]
    answer, reason = _message(create, {**fields, "tool_choice": "none"}, stream)
    say("  and then", f"{answer['content']} ({reason})")
    assert answer["content"] and not answer.get("tool_calls")


def _message(create: Callable[..., Any], fields: Any, stream: bool) -> tuple[dict[str, Any], str]:
    """The assistant's message as it is sent back, and how it ended."""
    if not stream:
        choice = create(**fields).choices[0]
        message = choice.message.model_dump(include={"role", "content", "tool_calls"})
        return message, choice.finish_reason
    content, reason, calls = "", "", []
    for chunk in create(**fields, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for delta in choice.delta.tool_calls or []:
                if delta.index == len(calls):
                    function = {"name": delta.function.name, "arguments": ""}
                    calls.append({"id": delta.id, "type": delta.type, "function": function})
                calls[delta.index]["function"]["arguments"] += delta.function.arguments or ""
    message = {"role": "assistant", "content": content or None}
    return ({**message, "tool_calls": calls} if calls else message), reason


def with_langchain(base_url: str, model: str, api_key: str) -> None:
    """ChatOpenAI with tools bound to it and with structured output."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=base_url,
        api_key=api_key,
        model=model,
        temperature=0,
        max_tokens=MAX_TOKENS,
        timeout=TIMEOUT_S,
        max_retries=0,
    )
    question = [HumanMessage(str(QUESTION[0]["content"]))]
    plain = chat.invoke(question)
    say("plain", plain.content)
    say("", f"{plain.response_metadata['finish_reason']} {plain.usage_metadata['total_tokens']}")
    pieces = [chunk.content for chunk in chat.stream(question)]
    say("stream", "|".join(piece for piece in pieces if piece))
    assert "".join(pieces) == plain.content, "the stream says something else"
    for choice in ("required", "get_weather", "auto"):
        for stream in (False, True):
            asked: list[Any] = [HumanMessage(str(WEATHER_QUESTION["content"]))]
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


def _joined(chunks: Any) -> Any:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


CLIENTS: dict[str, tuple[str, Callable[[str, str, str], None]]] = {
    "openai": ("openai", with_openai),
    "langchain": ("langchain_openai", with_langchain),
    "litellm": ("litellm", with_litellm),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--api-key", default="-", help="sent as the bearer key")
    parser.add_argument("--client", choices=list(CLIENTS), action="append", help="default: all")
    args = parser.parse_args(argv)
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    os.environ.setdefault("LANGSMITH_TRACING", "false")
    failed = False
    for name in args.client or CLIENTS:
        module, run = CLIENTS[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"{name}: left out, as it is not installed ({error})")
            continue
        from importlib.metadata import version

        print(f"{name} {version(module.replace('_', '-'))}")
        try:
            run(args.base_url, args.model, args.api_key)
        except Exception:
            failed = True
            traceback.print_exc()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
