# /// script
# requires-python = ">=3.10"
# dependencies = ["openai-agents>=0.3"]
# ///
"""OpenAI's agents SDK over Responses, its default, and over chat completions."""

import asyncio

from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
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
)
from city import City
from openai import AsyncOpenAI


@function_tool
def get_weather(city: str, unit: str) -> str:
    """The weather in a city."""
    return RESULT


client = AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)
set_tracing_disabled(True)
by_responses = OpenAIResponsesModel(MODEL, openai_client=client)
by_chat = OpenAIChatCompletionsModel(MODEL, openai_client=client)


async def main() -> None:
    for model in (by_responses, by_chat):
        say("by", type(model).__name__)
        await try_agents(model)


async def try_agents(model: Model) -> None:
    settings = ModelSettings(temperature=0, max_tokens=MAX_TOKENS)
    forced = settings.resolve(ModelSettings(tool_choice="required"))
    agent = Agent(
        "weather",
        model=model,
        tools=[get_weather],
        model_settings=forced,
        tool_use_behavior="stop_on_first_tool",  # else the model says when it calls no more
    )
    result = await Runner.run(agent, WEATHER_QUESTION, max_turns=3)
    kinds = [item.type for item in result.new_items]
    say("items", kinds)
    assert {"tool_call_item", "tool_call_output_item"} <= set(kinds), kinds
    say("result", str(result.final_output))
    words = Agent("words", model=model, model_settings=settings)
    say("answer", (await Runner.run(words, result.to_input_list())).final_output)
    streamed = Runner.run_streamed(agent, WEATHER_QUESTION, max_turns=3)
    events = [event.type async for event in streamed.stream_events()]
    say("streamed", f"{len(events)} events: {streamed.final_output}")
    assert streamed.final_output == result.final_output
    city = Agent("city", model=model, output_type=City, model_settings=settings)
    say("output type", repr((await Runner.run(city, QUESTION)).final_output))


asyncio.run(main())
