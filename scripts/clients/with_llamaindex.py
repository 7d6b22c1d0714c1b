# /// script
# requires-python = ">=3.10"
# dependencies = ["llama-index-llms-openai-like>=0.5"]
# ///
"""LlamaIndex's OpenAILike: chat, stream, a tool, a structured answer, a text completion."""

from asked import (
    API_KEY,
    BASE_URL,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    RESULT,
    TIMEOUT_S,
    WEATHER_QUESTION,
    say,
    say_stream,
)
from city import City
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def get_weather(city: str, unit: str) -> str:
    """The weather in a city."""
    return RESULT


llm = OpenAILike(
    api_base=BASE_URL,
    api_key=API_KEY,
    model=MODEL,
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=8192,
    temperature=0,
    max_tokens=MAX_TOKENS,
    timeout=TIMEOUT_S,
    max_retries=0,
)

question = [ChatMessage(role="user", content=QUESTION)]
plain = llm.chat(question).message.content
say("plain", plain)
say_stream([part.delta or "" for part in llm.stream_chat(question)], plain)
tool = FunctionTool.from_defaults(get_weather)
asked = ChatMessage(role="user", content=WEATHER_QUESTION)
forced = {"tools": [tool], "chat_history": [asked], "tool_required": True}
*_, streamed = llm.stream_chat_with_tools(**forced)
for title, answer in (("call", llm.chat_with_tools(**forced)), ("call streamed", streamed)):
    calls = llm.get_tool_calls_from_response(answer)
    for call in calls:
        say(title, f"{call.tool_name}({call.tool_kwargs})")
    assert calls and all(set(call.tool_kwargs) == {"city", "unit"} for call in calls)
    results = [
        ChatMessage(
            role="tool",
            content=get_weather(**call.tool_kwargs),
            additional_kwargs={"tool_call_id": call.tool_id},
        )
        for call in calls
    ]
    say("  and then", llm.chat([asked, answer.message, *results]).message.content)
city = llm.as_structured_llm(City).chat(question).raw
say("structured", repr(city))
assert isinstance(city, City)
