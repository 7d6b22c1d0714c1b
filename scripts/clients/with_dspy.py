# /// script
# requires-python = ">=3.10"
# dependencies = ["dspy>=3.4"]
# ///
"""dspy: a signature answered through its JSON adapter, which sends the schema of its outputs."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network

import dspy
import litellm
from asked import API_KEY, BASE_URL, MAX_TOKENS, MODEL, QUESTION, TIMEOUT_S, say

litellm.register_model({f"openai/{MODEL}": {"supports_response_schema": True}})
lm = dspy.LM(f"openai/{MODEL}", engine="litellm", api_base=BASE_URL, api_key=API_KEY)
dspy.configure(lm=lm, adapter=dspy.JSONAdapter())

lm.kwargs.update(timeout=TIMEOUT_S, max_tokens=MAX_TOKENS)
lm.num_retries = 0
say("plain", lm(QUESTION, cache=False)[0])


class Place(dspy.Signature):
    """Answer the question."""

    question: str = dspy.InputField()
    in_europe: bool = dspy.OutputField()
    continent: str = dspy.OutputField()


answer = dspy.Predict(Place)(question="Is Paris in Europe?")
say("signature", f"in_europe={answer.in_europe!r} continent={answer.continent!r}")
assert isinstance(answer.in_europe, bool) and isinstance(answer.continent, str)
