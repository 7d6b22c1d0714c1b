# /// script
# requires-python = ">=3.10"
# dependencies = ["openai>=1.60"]
# ///
"""The official Python client: every kind of request, its parse helper and its errors."""

import openai
from as_openai import MESSAGES, ask_as_openai
from asked import API_KEY, BASE_URL, MAX_TOKENS, MODEL, TIMEOUT_S, say
from city import City

client = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)

ask_as_openai(client.chat.completions.create, {"model": MODEL})
say("models", [card.id for card in client.models.list()])
text = client.completions.create(
    model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0
)
say("text completion", text.choices[0].text)
parsed = client.chat.completions.parse(
    model=MODEL, messages=MESSAGES, max_tokens=MAX_TOKENS, response_format=City
)
say("parsed", repr(parsed.choices[0].message.parsed))
assert parsed.choices[0].message.parsed is not None
try:
    client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
except openai.BadRequestError as error:
    say("refused", f"{error.status_code} param={error.param} code={error.code}")
else:
    raise AssertionError("a temperature of 3 was taken")
