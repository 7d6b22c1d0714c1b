"""Cases: how messages and texts become a prompt, and the token routes that tell it."""

from __future__ import annotations

from typing import Any

from enginehouse.regress.behaviour.asker import (
    QUESTION,
    Asker,
    messages,
    settled,
    want,
    want_equal,
)
from enginehouse.regress.behaviour.grammars import CHARACTERS
from enginehouse.regress.subject.api import CHAT, COMPLETIONS, DETOKENIZE, TEMPLATE, TOKENIZE

_BEGUN = "The river and"


def turns(asker: Asker) -> None:
    """An answer is opened, left closed, or continued, in every route that takes messages."""
    opened, closed = asker.prompt(), asker.prompt(add_generation_prompt=False)
    want(opened.startswith(closed), f"found {closed!r}; wanted the beginning of {opened!r}")
    begun = [*messages(QUESTION), {"role": "assistant", "content": _BEGUN}]
    prefix = [*begun[:-1], {**begun[-1], "prefix": True}]
    continued = asker.prompt(begun, continue_final_message=True, add_generation_prompt=False)
    want(
        continued.endswith(_BEGUN),
        f"found a prompt that ends with {continued[-40:]!r}; wanted {_BEGUN!r}, which goes on",
    )
    want_equal(asker.prompt(prefix), continued, "the prompt of prefix: true")
    for fields, wanted in (
        ({}, opened),
        ({"add_generation_prompt": False}, closed),
    ):
        answer = asker.ask(CHAT, messages=messages(QUESTION), max_tokens=1, **fields)
        count = len(asker.ids(wanted, add_special_tokens=False))
        want_equal(answer["usage"]["prompt_tokens"], count, f"tokens of a prompt with {fields}")
    told = asker.ask(CHAT, messages=begun, continue_final_message=True, max_tokens=1)["usage"]
    count = len(asker.ids(continued, add_special_tokens=False))
    want_equal(told["prompt_tokens"], count, "tokens of a prompt that is continued")


def roles(asker: Asker) -> None:
    """Text and its parts, system and developer, names and refusals; a system message anywhere."""
    parts = [{"type": "text", "text": "Name a river"}, {"type": "text", "text": "and a bridge."}]
    whole = asker.prompt("Name a river\nand a bridge.")
    want_equal(asker.prompt([{"role": "user", "content": parts}]), whole, "the prompt of parts")
    named = [{"role": "user", "content": "Name a river\nand a bridge.", "name": "somebody"}]
    want("Name a river" in asker.prompt(named), "the words of a named user are not in the prompt")
    said = {"role": "system", "content": "Be brief."}
    developer = {**said, "role": "developer"}
    question, answer = messages(QUESTION)[0], {"role": "assistant", "content": "No."}
    reply = asker.api.reply(TEMPLATE, messages=[said, question])
    if reply.status == 200:
        told = asker.prompt([developer, question])
        want_equal(told, reply.body["prompt"], "the prompt of developer, beside system")
    amid = asker.api.reply(CHAT, messages=[question, answer, said, question], max_tokens=1)
    want(amid.status in (200, 400), f"a system message amid others: HTTP {amid.status}")
    refused = {"role": "assistant", "refusal": "I will not."}
    thought = {**answer, "reasoning_content": "Hm."}
    older = {**answer, "reasoning": "Hm."}
    for turn in (refused, thought, older):
        asker.ask(CHAT, messages=[question, turn, question], max_tokens=1)
    part = {"type": "refusal", "refusal": "I will not."}
    asker.ask(CHAT, messages=[question, {**answer, "content": [part]}, question], max_tokens=1)


def template_fields(asker: Asker) -> None:
    """What the template is given, and what it does not read is told; thoughts as they are asked."""
    fields: dict[str, Any] = {"chat_template_kwargs": {"nobodys_variable": 1}}
    reply = asker.granted(CHAT, messages=messages(QUESTION), max_tokens=1, **fields)
    told = reply.headers.get("x-ignored-fields", "")
    want("nobodys_variable" in told, f"found X-Ignored-Fields {told!r}; wanted nobodys_variable")
    want_equal(asker.prompt(**fields), asker.prompt(), "a prompt with a variable that nobody reads")
    asker.chat(reasoning_effort="low", max_tokens=1)
    for fields in ({"include_reasoning": False}, {"separate_reasoning": False}):
        found = asker.chat(max_tokens=4, **fields)
        want_equal(found.thought, "", f"reasoning_content with {fields}")
    asker.chat(separate_reasoning=True, max_tokens=4)


def texts(asker: Asker) -> None:
    """A prompt as text, texts, ids and lists of ids: the same answer, in order."""

    def check(attempt: int) -> None:
        prompts = [f"{attempt} rivers", f"{attempt} bridges, and"]
        ids = [asker.ids(prompt) for prompt in prompts]
        fields = asker.at_least(4)
        wanted = [asker.text(prompt, **fields).text for prompt in prompts]
        for form in (prompts, ids):
            found = asker.texts(form, **fields)
            want_equal([choice.text for choice in found], wanted, "answers of two prompts")
        want_equal(asker.text(ids[0], **fields).text, wanted[0], "the answer of a prompt of ids")

    settled(check)
    for special in (True, False):
        answer = asker.ask(COMPLETIONS, prompt=QUESTION, add_special_tokens=special, max_tokens=1)
        count = len(asker.ids(QUESTION, add_special_tokens=special))
        want_equal(answer["usage"]["prompt_tokens"], count, f"tokens, special tokens: {special}")


def tokenize(asker: Asker) -> None:
    """Text to tokens and back, without a loss."""
    fields = {"return_token_strs": True, "add_special_tokens": False, "strict_fields": True}
    told = asker.ask(TOKENIZE, prompt=CHARACTERS, **fields)
    want_equal(told["count"], len(told["tokens"]), "count of /tokenize")
    want_equal(len(told["token_strs"] or ()), told["count"], "token_strs of /tokenize")
    back = asker.ask(DETOKENIZE, tokens=told["tokens"])["prompt"]
    want_equal(back.strip(), CHARACTERS, "the text of its tokens")
    if asker.known.max_seq_len is not None:
        want_equal(told["max_model_len"], asker.known.max_seq_len, "max_model_len of /tokenize")
    ids = asker.ids(asker.prompt(), add_special_tokens=False)
    want_equal(asker.chat_ids(), ids, "tokens of a conversation, and of its prompt")


CASES = {
    "turns": turns,
    "roles": roles,
    "template_fields": template_fields,
    "tokenize": tokenize,
}
ALONE = {"texts": texts}
