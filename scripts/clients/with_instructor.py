# /// script
# requires-python = ">=3.10"
# dependencies = ["instructor>=1.7"]
# ///
"""instructor: a pydantic object by a tool, by a schema, and in parts while it is written."""

import instructor
import openai
from asked import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, TIMEOUT_S, say
from city import City

client = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)
by_tool = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
by_schema = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)

fields = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "response_model": City,
    "max_tokens": MAX_TOKENS,
    "temperature": 0,
    "max_retries": 0,
}
for title, asked in (("by a tool", by_tool), ("by a schema", by_schema)):
    city = asked.chat.completions.create(**fields)
    say(title, repr(city))
    assert isinstance(city, City)
    parts = list(asked.chat.completions.create_partial(**fields))
    say("  in parts", f"{len(parts)}, the last is {parts[-1].model_dump()}")
    assert len(parts) > 1 and City(**parts[-1].model_dump())
