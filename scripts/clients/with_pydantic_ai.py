# /// script
# requires-python = ">=3.10"
# dependencies = ["pydantic-ai-slim[openai]>=1.0"]
# ///
"""pydantic-ai: text, a stream, and structured output by a tool and by a schema."""

import asyncio

from asked import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, TIMEOUT_S, say, say_stream
from city import City
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=API_KEY))
settings = {"temperature": 0, "max_tokens": MAX_TOKENS, "timeout": TIMEOUT_S}


async def main() -> None:
    agent = Agent(model, model_settings=settings)
    plain = (await agent.run(QUESTION)).output
    say("plain", plain)
    async with agent.run_stream(QUESTION) as stream:
        say_stream([part async for part in stream.stream_text(delta=True)], plain)
    for title, output in (("by a tool", ToolOutput(City)), ("by a schema", NativeOutput(City))):
        structured = Agent(model, model_settings=settings, output_type=output)
        city = (await structured.run(QUESTION)).output
        say(title, repr(city))
        assert isinstance(city, City)
        async with structured.run_stream(QUESTION) as stream:
            parts = [part async for part in stream.stream_output(debounce_by=None)]
        say("  streamed", f"{len(parts)} parts, the last is {parts[-1]!r}")
        assert isinstance(parts[-1], City)


asyncio.run(main())
