"""A conversation -> its answer, in whichever endpoint's form. Read this page first.

    what is asked -> prompt ids -> plan of the answer -> engine -> answer, whole or streamed

Each step is one call into the wing that does it. An endpoint of `server/api/` has read its body
into a ChatRequest, and gives the form that its answer is told in; this is the one way between the
two. This file knows no field's meaning and no token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from flask import Response, g, request

from enginehouse.runtime.request import EngineInfo
from enginehouse.server.answer.choice import Endings
from enginehouse.server.answer.completion import Completion, Generation, Terms
from enginehouse.server.answer.plan import plan_answer
from enginehouse.server.answer.prompt_scores import PromptScores
from enginehouse.server.http.service import Service, fingerprint_of, tell
from enginehouse.server.observe.logged import log_prompt
from enginehouse.server.observe.tracing import TRACE
from enginehouse.server.prompt.chat import Prompt
from enginehouse.server.prompt.prompts import check_tokens
from enginehouse.server.prompt.truncation import latest_that_fits
from enginehouse.server.request.asked import Asked, check_constraint
from enginehouse.server.request.chat_request import ChatRequest
from enginehouse.server.request.own_names import own_name

Form = Callable[..., Completion]  # of Completion's arguments


class Begun(NamedTuple):
    """An answer that the engine is at work on. generation None: there is nothing to generate."""

    asked: ChatRequest
    completion: Completion
    generation: Generation | None


def converse(service: Service, asked: ChatRequest, form: Form, started_s: float) -> Response:
    """started_s: the monotonic clock when the request came."""
    asked, completion, generation = begin(service, asked, form, started_s)
    response = service.answer(completion, generation, asked.fields.stream, asked.unenforced)
    return tell_of(service, asked, response)


def tell_of(service: Service, asked: ChatRequest, response: Response) -> Response:
    """With the headers that say what of the request had no effect, by the body's own names."""
    unread = [own_name(name, asked.names) for name in service.chat.unread(asked.options)]
    ignored = [*asked.ignored_fields, *filter(None, unread)]
    unenforced = [own_name(path, asked.names) for each in asked.unenforced for path in each.paths]
    return tell(response, ignored, unenforced, asked.repaired)


def begin(service: Service, asked: ChatRequest, form: Form, started_s: float) -> Begun:
    info = check(service, asked)
    prompt = prompt_of(service, asked, info)
    if service.settings.log_prompts:
        log_prompt(prompt.text)
    plan = service.beside(
        lambda: plan_answer(
            service.chat,
            prompt.text,
            asked.options.tools,
            asked.constraint,
            asked.unenforced,
            reasoning=asked.separate_reasoning,
            include_reasoning=asked.include_reasoning,
            continued=asked.messages[-1].content if asked.options.continue_final_message else "",
        )
    )
    check_constraint(asked.fields, plan.constraint)
    asked = replace(asked, constraint=plan.constraint, unenforced=plan.unenforced)
    terms = Terms(
        **terms_of(service, info, asked),
        num_prompt_tokens=len(prompt.ids),
        kept_ids=plan.keep,
        only_calls=asked.options.tools.forced,
    )
    scores = scores_of(service, asked, [(prompt.ids, range(0))])
    completion = form(terms, plan.new_parser, scores=scores, started_s=started_s)
    return Begun(asked, completion, submit(service, asked, prompt.ids, info))


def prompt_of(service: Service, asked: ChatRequest, info: EngineInfo) -> Prompt:
    """RequestError where it has a token that the model has not."""
    chat, most = service.chat, info.max_seq_len
    if asked.truncates:
        room = min(asked.max_tokens or 1, most // 2)  # for the answer
        prompt = latest_that_fits(chat, asked.messages, most - room + 1, asked.options)
    else:
        prompt = chat.prompt(asked.messages, most, asked.options)
    check_tokens(chat, prompt.ids, info.vocab_size, "messages")
    return prompt


def check(service: Service, asked: Asked) -> EngineInfo:
    """What is served is asked of, and each token is one of its own."""
    info = check_served(service, asked.fields.model)
    asked.check_vocabulary(info.vocab_size)
    asked.check_scores(info.scores_prompts)
    return info


def check_served(service: Service, model: str) -> EngineInfo:
    """The model must be the one that is served, and its engine there, with room in its queue."""
    service.check_model(model, param="model")
    service.check_ready()
    service.client.check_room()
    return service.client.info


def scores_of(
    service: Service, asked: Asked, prompts: Iterable[tuple[list[int], range]]
) -> list[PromptScores]:
    """One for each prompt, of its ids and the span of its text; none where nobody asks."""
    if asked.num_prompt_logprobs is None:
        return []
    return [PromptScores(ids, service.chat.pieces, span) for ids, span in prompts]


def terms_of(service: Service, info: EngineInfo, asked: Asked) -> dict[str, Any]:
    fields = asked.fields
    return {
        "model": service.settings.model_name,
        "pieces": service.chat.pieces,
        "prices": service.prices,
        "num_sequences": asked.num_sequences,
        "num_returned": fields.n,
        "endings": Endings(
            texts=tuple(fields.stop),
            keep_text=fields.include_stop_str_in_output,
            token_ids=frozenset(fields.stop_token_ids),
            min_tokens=fields.min_tokens,
        ),
        "num_logprobs": asked.num_logprobs,
        "num_prompt_logprobs": None if fields.stream else fields.prompt_logprobs,
        "include_usage": asked.include_usage,
        "continuous_usage": asked.continuous_usage,
        "fingerprint": fingerprint_of(info),
    }


def submit(
    service: Service, asked: Asked, prompt_ids: list[int], info: EngineInfo
) -> Generation | None:
    """None when no token may be generated: the engine is not troubled with that."""
    room = info.max_seq_len - len(prompt_ids)
    max_tokens = room if asked.max_tokens is None else min(asked.max_tokens, room)
    ends = tuple(i for i in service.chat.stop_token_ids if i < info.vocab_size)
    samplings = asked.samplings(max_tokens, ends)
    if max_tokens == 0 and asked.num_prompt_logprobs is None:
        return None
    if TRACE in request.environ:
        request.environ[TRACE].asked(samplings[0])
    return service.client.submit(prompt_ids, samplings, asked.fields.priority, g.request_id)
