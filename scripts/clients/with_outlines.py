# /// script
# requires-python = ">=3.10"
# dependencies = ["outlines>=1.2", "openai>=1.60"]
# ///
"""outlines: a schema through its OpenAI model; a regex and a choice through its vLLM model."""

import json
import re
from typing import Literal

import openai
import outlines
from asked import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, TIMEOUT_S, say
from city import City
from outlines.types import Regex

client = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=TIMEOUT_S)
as_openai = outlines.from_openai(client, MODEL)
as_vllm = outlines.from_vllm(client, MODEL)

fields = {"max_tokens": MAX_TOKENS, "temperature": 0}
say("plain", as_openai(QUESTION, **fields))
say("stream", "|".join(as_openai.stream(QUESTION, **fields)))
for title, model in (("schema", as_openai), ("schema, as vLLM", as_vllm)):
    city = City(**json.loads(model(QUESTION, City, **fields)))
    say(title, repr(city))
date = as_vllm("When did it open?", Regex(r"\d{4}-\d{2}-\d{2}"), **fields)
say("regex", date)
assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
choice = as_vllm("Is Paris in France?", Literal["yes", "no"], **fields)
say("choice", choice)
assert choice in ("yes", "no")
