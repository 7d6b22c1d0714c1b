# /// script
# requires-python = ">=3.10"
# dependencies = ["litellm>=1.60"]
# ///
"""LiteLLM, told that the server speaks as OpenAI's does; and how it names a full context."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network

import litellm
from as_openai import MESSAGES, ask_as_openai
from asked import API_KEY, BASE_URL, MODEL, TIMEOUT_S, say

litellm.telemetry = False
litellm.suppress_debug_info = True
common = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": API_KEY}
bounded = {**common, "timeout": TIMEOUT_S, "num_retries": 0}

ask_as_openai(litellm.completion, bounded)
effort = litellm.completion(
    **bounded, messages=MESSAGES, max_tokens=4, reasoning_effort="low", drop_params=True
)
say("reasoning_effort", effort.choices[0].message.content)
for title, refused, fields in (
    ("refused", litellm.BadRequestError, {"messages": MESSAGES, "temperature": 3}),
    (
        "context full",
        litellm.ContextWindowExceededError,
        {"messages": [{"role": "user", "content": "many words " * 100_000}]},
    ),
):
    try:
        litellm.completion(**bounded, **fields)
    except refused as error:
        say(title, f"{type(error).__name__} {error.status_code}")
    else:
        raise AssertionError(f"{title}: it was taken")
