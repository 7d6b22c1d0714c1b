"""Cases: what a server says of itself, and that it lets go of what nobody waits for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import closing

from enginehouse.regress.behaviour.asker import Asker, NotAsked, messages, want, want_equal
from enginehouse.regress.subject.api import CHAT, METRICS, MODELS
from enginehouse.runtime.errors import EnginehouseError

_PAGES = ("/health", "/health/live", "/health/ready", "/version", "/openapi.json")
# Ours, vLLM's and llama.cpp's names of the gauge.
_RUNNING = re.compile(
    r"^(?:enginehouse_num_requests_running|vllm:num_requests_running(?:\{.*\})?"
    r"|llamacpp:requests_processing) ([0-9.e+]+)$",
    re.MULTILINE,
)
_QUIET_S, _LET_GO_S, _POLL_S = 2.0, 10.0, 0.02
_LONGEST, _PROMPT, _TRIES = 4000, 200, 4


def models(asker: Asker) -> None:
    """The list has the model that is asked, and its own page is the same."""
    listed = asker.api.send("GET", MODELS).body
    want_equal(listed["object"], "list", "object of /models")
    cards = {card["id"]: card for card in listed["data"]}
    want(asker.api.model in cards, f"found {', '.join(cards)}; wanted {asker.api.model}")
    page = asker.api.send("GET", f"{MODELS}/{asker.api.model}")
    want_equal(page.body, cards[asker.api.model], "the page of a model, beside the list")
    limit = cards[asker.api.model].get("max_model_len")
    if asker.known.max_seq_len is not None:
        want_equal(limit, asker.known.max_seq_len, "max_model_len")


def pages(asker: Asker) -> None:
    """Health, version, metrics, the API's document, the tokenizer's facts."""
    for path in _PAGES:
        reply = asker.api.send("GET", path)
        want(reply.status == 200 and reply.body is not None, f"{path}: HTTP {reply.status}")
    info = asker.api.send("GET", "/tokenizer_info")
    want_equal(info.status, 200, "status of /tokenizer_info")
    want("eos_token" in info.body, "found no eos_token in /tokenizer_info; wanted it, or null")
    want("x-request-id" in info.headers, "found an answer without X-Request-Id; wanted one")


def cancel(asker: Asker) -> None:
    """A client that leaves its stream frees the engine, which goes on answering others."""
    before = _running(asker, _QUIET_S, lambda running: running == 0)
    room = (asker.known.max_seq_len or _LONGEST) - _PROMPT
    fields = {"temperature": 0, "max_tokens": min(room, _LONGEST), **asker.endless()}
    for _ in range(_TRIES):  # an answer may end before the server tells again
        with closing(
            asker.api.lines(CHAT, messages=messages("Count upwards."), **fields)
        ) as stream:
            next(stream)
            during = _running(asker, _QUIET_S, lambda running: running > before)
        if during > before:
            break
    else:
        raise NotAsked("the answer ended before the server told how many requests run")
    after = _running(asker, _LET_GO_S, lambda running: running <= before)
    want(
        after <= before,
        f"found {after:g} running {_LET_GO_S:g} s after a client left; wanted {before:g}",
    )
    found = asker.chat("Hello.", **asker.at_least(1))
    want(bool(found.said), "found no answer after a client left; wanted one")


def _running(asker: Asker, seconds: float, met: Callable[[float], bool]) -> float:
    """How many requests run, as soon as that is met, or after so long."""
    end_s = time.monotonic() + seconds
    while True:
        found = _RUNNING.search(asker.api.text(METRICS))
        if found is None:
            raise EnginehouseError(f"{METRICS} tells no number of running requests")
        if met(float(found[1])) or time.monotonic() > end_s:
            return float(found[1])
        time.sleep(_POLL_S)


CASES = {"models": models, "pages": pages}
ALONE = {"cancel": cancel}
