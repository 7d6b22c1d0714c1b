# /// script
# requires-python = ">=3.10"
# dependencies = ["anthropic>=0.75"]
# ///
"""Anthropic's own package: text, a stream, a tool by hand and by its runner, counted tokens."""

from typing import Literal

import anthropic
from asked import (
    API_KEY,
    BASE_URL,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    RESULT,
    TIMEOUT_S,
    WEATHER,
    WEATHER_QUESTION,
    say,
)

root = BASE_URL.removesuffix("/v1")
client = anthropic.Anthropic(base_url=root, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)
short = {"model": MODEL, "max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}
turns = [{"role": "user", "content": QUESTION}]

plain = client.messages.create(messages=turns, **short)
say("plain", plain.content[0].text)
with client.messages.stream(messages=turns, **short) as stream:
    pieces = list(stream.text_stream)
say("streamed", f"{len(pieces)} pieces: {''.join(pieces)}")
assert "".join(pieces) == plain.content[0].text
counted = client.messages.count_tokens(model=MODEL, messages=turns)
say("counted", f"{counted.input_tokens} tokens")
usage = plain.usage
assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens

function = WEATHER["function"]
tool = {name: function[name] for name in ("name", "description")}
tool["input_schema"] = function["parameters"]
asked = [{"role": "user", "content": WEATHER_QUESTION}]
with client.messages.stream(
    messages=asked, tools=[tool], tool_choice={"type": "any"}, **short
) as stream:
    pieces = [e.partial_json for e in stream if e.type == "input_json"]
    called = stream.get_final_message()
[call] = [block for block in called.content if block.type == "tool_use"]
say("call", f"{call.name}({call.input}), in {len(pieces)} pieces")
result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
asked += [
    {"role": "assistant", "content": called.content},
    {"role": "user", "content": [result]},
]
answer = client.messages.create(messages=asked, tools=[tool], tool_choice={"type": "none"}, **short)
say("  and then", answer.content[0].text)


ran = []


@anthropic.beta_tool
def get_weather(city: str, unit: Literal["C", "F"]) -> str:
    """The weather in a city.

    Args:
        city: its name.
        unit: of its temperature.
    """
    ran.append(city)
    return RESULT


for stream in (False, True):
    runner = client.beta.messages.tool_runner(
        messages=turns,
        tools=[get_weather],
        tool_choice={"type": "any"},  # else the model says whether it calls one
        max_iterations=2,
        stream=stream,
        **short,
    )
    say("runner streamed" if stream else "runner", runner.until_done().stop_reason)
say("  ran", f"{len(ran)} calls")
assert len(ran) >= 2
try:
    client.messages.create(messages=turns, **{**short, "max_tokens": 0})
    raise SystemExit("max_tokens of 0 was taken")
except anthropic.BadRequestError as error:
    say("refused", str(error.body["error"]["message"]))
