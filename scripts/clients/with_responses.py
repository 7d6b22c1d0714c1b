# /// script
# requires-python = ">=3.10"
# dependencies = ["openai>=2", "pydantic>=2"]
# ///
"""OpenAI's own package over the Responses API: text, a stream, a kept turn, a tool, parse."""

import openai
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
from city import City

client = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)
short = {"model": MODEL, "max_output_tokens": MAX_TOKENS, "temperature": 0}

plain = client.responses.create(input=QUESTION, **short)
say("plain", plain.output_text)
with client.responses.stream(input=QUESTION, **short) as stream:
    kinds = [event.type for event in stream]
    streamed = stream.get_final_response().output_text
say("streamed", f"{len(kinds)} events: {streamed}")
assert streamed == plain.output_text and kinds[-1].startswith("response.")

later = client.responses.create(
    input="And of Italy?", previous_response_id=plain.id, truncation="auto", **short
)
say("goes on", later.output_text)
assert later.previous_response_id == plain.id

tools = [{"type": "function", **WEATHER["function"]}]
with client.responses.stream(
    input=WEATHER_QUESTION, tools=tools, tool_choice="required", **short
) as stream:
    deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
    asked = stream.get_final_response()
[call] = [item for item in asked.output if item.type == "function_call"]
say("call", f"{call.name}({call.arguments}), in {len(deltas)} pieces")
assert "".join(deltas) == call.arguments
told = [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
answer = client.responses.create(
    input=told, previous_response_id=asked.id, tools=tools, tool_choice="none", **short
)
say("  and then", answer.output_text)

parsed = client.responses.parse(input=QUESTION, text_format=City, **short)
say("parse", repr(parsed.output_parsed))
assert isinstance(parsed.output_parsed, City)

later = client.responses.create(input=QUESTION, background=True, **short)
while later.status in ("queued", "in_progress"):
    later = client.responses.retrieve(later.id)
say("background", later.output_text)
client.responses.delete(later.id)
try:
    client.responses.retrieve(later.id)
    raise SystemExit("a response that was deleted is still there")
except openai.NotFoundError as error:
    say("deleted", error.code)
