"""Cases: log probabilities, of answers and of prompts, and the counts and costs of usage.

The same tokens are scored twice: as they are generated, and as part of a prompt. Both are the
model's own distribution, so they agree at the same positions, and only there.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from enginehouse.regress.behaviour.answers import Choice
from enginehouse.regress.behaviour.asker import (
    QUESTION,
    Asker,
    NotAsked,
    messages,
    name_of,
    want,
    want_equal,
)
from enginehouse.regress.subject.api import CHAT, COMPLETIONS

_DRAWN = 16
# Nats, the mean over _DRAWN tokens drawn among words: a step and a prefill may round otherwise, and
# an 8-bit KV cache is read by one of them only. A neighbour's number is more than one away.
_NEAR, _SAME = 0.3, 0.05
_ROUND = 1e-6


def logprobs(asker: Asker) -> None:
    """Of a chat: each token's, beside the likeliest; at its own position."""
    if asker.scores_prompts:
        drawn = {"temperature": 1, "max_tokens": _DRAWN, "logprobs": True, **asker.at_least(_DRAWN)}
        found = asker.chat(**drawn, **asker.among_words())
        _check_positions(asker, asker.chat_ids(), found)
    likeliest = asker.chat(logprobs=True, top_logprobs=3, **asker.endless())
    _check_form(likeliest, 3, ours=asker.known.is_ours)
    own = asker.chat(logprobs=True, **asker.endless())
    want(all(not e.top for e in own.entries), "found top_logprobs; wanted none, as none are asked")


def completion_logprobs(asker: Asker) -> None:
    """Of a completion, in OpenAI's older shape."""
    answer = asker.ask(COMPLETIONS, prompt=QUESTION, logprobs=2, **asker.among_words())
    told = answer["choices"][0]["logprobs"]
    text, offsets = answer["choices"][0]["text"], told["text_offset"]
    want_equal("".join(told["tokens"]), text, "the tokens of a completion, joined")
    wanted = [sum(map(len, told["tokens"][:index])) for index in range(len(offsets))]
    want_equal(offsets, wanted, "text_offset")
    if asker.scores_prompts:
        ids = asker.ids(QUESTION)
        drawn = {"temperature": 1, "max_tokens": _DRAWN, **asker.at_least(_DRAWN)}
        found = asker.text(ids, logprobs=0, **drawn, **asker.among_words())
        _check_positions(asker, ids, found)


def echo(asker: Asker) -> None:
    """The prompt comes first; with logprobs its tokens do too, all but the first with a number."""
    fields = {"echo": True, "max_tokens": 2, **asker.at_least(2)}
    found = asker.text(QUESTION, **fields)
    want(found.text.startswith(QUESTION), f"found {found.text!r}; wanted the prompt first")
    _skip_without_scores(asker)
    ids = asker.ids(QUESTION, add_special_tokens=False)
    answer = asker.ask(COMPLETIONS, prompt=ids, logprobs=1, **fields)
    told = answer["choices"][0]["logprobs"]
    own = told["token_logprobs"]
    want_equal(len(own), len(ids) + 2, "tokens of an echoed prompt and of its answer")
    want(own[0] is None and None not in own[1:], f"found {own}; wanted null for the first alone")
    scored = _scores(asker, ids)
    off = statistics.fmean(abs(a - b) for a, b in zip(own[1 : len(ids)], scored[1:], strict=True))
    want(off < _SAME, f"echo and prompt_logprobs are {off:.3f} nats apart; wanted under {_SAME}")


def prompt_logprobs(asker: Asker) -> None:
    """Of both endpoints, in vLLM's shape: the prompt's own tokens, beside the likeliest."""
    _skip_without_scores(asker)
    for path, fields, ids in (
        (CHAT, {"messages": messages(QUESTION)}, asker.chat_ids()),
        (COMPLETIONS, {"prompt": QUESTION}, asker.ids(QUESTION)),
    ):
        answer = asker.ask(path, max_tokens=1, prompt_logprobs=2, **fields)
        told = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
        want_equal(len(told), len(ids), f"prompt_logprobs of {path}")
        want(told[0] is None, f"found {told[0]}; wanted null for the first token")
        for token_id, row in zip(ids[1:], told[1:], strict=True):
            want(str(token_id) in row, f"found {list(row)}; wanted the prompt's own {token_id}")
            likeliest = max(row.values(), key=lambda each: float(each["logprob"]))
            want_equal(likeliest["rank"], 1, "rank of the likeliest")
            want(2 <= len(row) <= 3, f"found {len(row)} tokens; wanted two and the prompt's own")


def usage(asker: Asker) -> None:
    """What was read and what was generated, all of it, and what it costs."""
    fields = {"max_tokens": 6, "logprobs": True, **asker.at_least(6)}
    answer = asker.ask(CHAT, messages=messages(QUESTION), n=2, temperature=1, **{**fields})
    told = answer["usage"]
    counted = sum(len(choice["logprobs"]["content"]) for choice in answer["choices"])
    _check_usage(asker, told, counted, len(asker.chat_ids()))
    scored = {**fields, "logprobs": 0}
    answer = asker.ask(COMPLETIONS, prompt=[QUESTION, "And?"], **scored)
    counted = sum(len(choice["logprobs"]["tokens"]) for choice in answer["choices"])
    prompts = len(asker.ids(QUESTION)) + len(asker.ids("And?"))
    _check_usage(asker, answer["usage"], counted, prompts)
    best = asker.ask(COMPLETIONS, prompt=QUESTION, best_of=3, temperature=1, **scored)
    _check_usage(asker, best["usage"], 18, len(asker.ids(QUESTION)))


def _check_usage(asker: Asker, told: dict[str, Any], answered: int, asked: int) -> None:
    want_equal(told["completion_tokens"], answered, "completion_tokens, by the tokens told")
    want_equal(told["prompt_tokens"], asked, "prompt_tokens, by /tokenize")
    want_equal(told["total_tokens"], asked + answered, "total_tokens")
    cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    want(0 <= cached <= asked, f"found {cached} cached tokens; wanted at most {asked}")
    if asker.known.prices is not None:
        price = (asked * asker.known.prices[0] + answered * asker.known.prices[1]) / 1e6
        cost = told["estimated_cost"]
        want(abs(cost - price) < 1e-9, f"found a cost of {cost} dollars; wanted {price:.10f}")


def _check_positions(asker: Asker, ids: list[int], found: Choice) -> None:
    """Tokens that were drawn among words, whose ids are known by their names."""
    known = {token.name: token.id for token in asker.words}
    drawn = [known.get(name_of(entry.token), -1) for entry in found.entries]
    want(-1 not in drawn, "found a token that the bias forbids; wanted the words it names")
    want_equal(len(drawn), _DRAWN, "log probabilities of an answer")
    scored = [s for s in _scores(asker, [*ids, *drawn])[-_DRAWN:] if s is not None]
    off, before, behind = (
        statistics.fmean(abs(a - b) for a, b in zip(one, two, strict=True))
        for one, two in (
            (found.logprobs, scored),
            (found.logprobs[1:], scored[:-1]),
            (found.logprobs[:-1], scored[1:]),
        )
    )
    shifted = min(before, behind)
    hint = f"; one position off it would be {shifted:.3f}" if shifted < off else ""
    want(
        off < _NEAR,
        f"log probabilities of an answer and of the same tokens in a prompt are {off:.3f} nats "
        f"apart{hint}; wanted under {_NEAR}",
    )


def _check_form(found: Choice, num_top: int, *, ours: bool) -> None:
    want(bool(found.entries), "found no log probabilities; wanted each token's")
    for entry in found.entries:
        total = sum(map(math.exp, entry.top.values()))
        want(
            len(entry.top) <= num_top, f"found {len(entry.top)} of the likeliest; wanted {num_top}"
        )
        want(total < 1.001, f"the likeliest of a token sum up to {total:.4f}; wanted 1 at most")
        want(entry.logprob <= _ROUND, f"found a log probability of {entry.logprob}; wanted under 0")
        top = entry.top.get(entry.token)
        want(
            top is not None and abs(top - entry.logprob) < 1e-4,
            f"a greedy token has {entry.logprob} alone and {top} among the likeliest",
        )
        best = max(entry.top.values())
        want(
            not ours or best <= entry.logprob + 1e-4,
            f"a greedy token has {entry.logprob}, and another {best}; wanted the likeliest",
        )


def _scores(asker: Asker, ids: list[int]) -> list[float | None]:
    """The log probability of each token of a prompt."""
    answer = asker.ask(COMPLETIONS, prompt=ids, max_tokens=1, prompt_logprobs=0)
    told = answer["choices"][0]["prompt_logprobs"]
    return [
        None if row is None else row[str(token_id)]["logprob"]
        for token_id, row in zip(ids, told, strict=True)
    ]


def _skip_without_scores(asker: Asker) -> None:
    if not asker.scores_prompts:
        raise NotAsked("this engine does not tell the log probabilities of a prompt's tokens")


CASES = {
    "logprobs": logprobs,
    "completion_logprobs": completion_logprobs,
    "echo": echo,
    "prompt_logprobs": prompt_logprobs,
    "usage": usage,
}
