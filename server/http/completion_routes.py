"""The two endpoints that generate: chat completions and text completions. Read this page first.

    body -> what is asked -> prompt ids -> plan of the answer -> engine -> answer, whole or streamed

Each step is one call into the wing that does it. This file knows no field's meaning and no token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flask import Response, g, request

from enginehouse.runtime.request import EngineInfo
from enginehouse.server.answer.choice import Endings
from enginehouse.server.answer.completion import Completion, Generation, Terms
from enginehouse.server.answer.plan import plan_answer
from enginehouse.server.answer.prompt_scores import PromptScores
from enginehouse.server.answer.text_completion import Batch, TextCompletion
from enginehouse.server.http.service import Service, fingerprint_of, tell
from enginehouse.server.observe.logged import log_prompt
from enginehouse.server.observe.tracing import TRACE
from enginehouse.server.prompt.prompts import (
    check_tokens,
    detokenize,
    echo_of,
    text_prompt,
    text_span,
)
from enginehouse.server.request.asked import Asked, check_constraint
from enginehouse.server.request.chat_request import parse_chat_request
from enginehouse.server.request.text_request import parse_text_request


def chat_completions(service: Service) -> Response:
    started_s = time.monotonic()
    info = service.info
    max_messages = info.max_seq_len if info else None
    asked = service.read(lambda body: parse_chat_request(body, max_messages))
    info = _check(service, asked)
    prompt = service.chat.prompt(asked.messages, info.max_seq_len, asked.options)
    if service.settings.log_prompts:
        log_prompt(prompt.text)
    check_tokens(service.chat, prompt.ids, info.vocab_size, "messages")
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
        **_terms(service, info, asked),
        num_prompt_tokens=len(prompt.ids),
        kept_ids=plan.keep,
        only_calls=asked.options.tools.forced,
    )
    scores = _scores(service, asked, [(prompt.ids, range(0))])
    completion = Completion(terms, plan.new_parser, scores=scores, started_s=started_s)
    generation = _submit(service, asked, prompt.ids, info)
    response = service.answer(completion, generation, asked.fields.stream, asked.unenforced)
    ignored = [*asked.ignored_fields, *service.chat.unread(asked.options)]
    return tell(response, ignored, asked.unenforced, asked.repaired)


def text_completions(service: Service) -> Response:
    started_s = time.monotonic()
    info = service.info
    max_seq_len = info.max_seq_len if info else None
    asked = service.read(lambda body: parse_text_request(body, max_seq_len))
    info = _check(service, asked)
    prompts = [
        text_prompt(service.chat, prompt, asked.add_special_tokens, info, param)
        for prompt, param in asked.prompts_with_params()
    ]
    if service.settings.log_prompts:
        for ids in prompts:
            log_prompt(detokenize(service.chat, ids))
    echoes = [echo_of(service.chat, prompt) if asked.echo else "" for prompt in asked.prompts]
    terms = Terms(
        **_terms(service, info, asked),
        num_prompts=len(prompts),
        num_prompt_tokens=sum(map(len, prompts)),
    )
    spans = [
        text_span(service.chat, prompt, ids) if asked.echoes_logprobs else range(0)
        for prompt, ids in zip(asked.prompts, prompts, strict=True)
    ]
    scores = _scores(service, asked, zip(prompts, spans, strict=True))
    completion = TextCompletion(
        terms, echoes, asked.echoes_logprobs, scores=scores, started_s=started_s
    )
    generation = _submit_all(service, asked, prompts, info)
    response = service.answer(completion, generation, asked.fields.stream, asked.unenforced)
    return tell(response, asked.ignored_fields, asked.unenforced)


def _check(service: Service, asked: Asked) -> EngineInfo:
    """The model must be the one that is served, its engine there, and each token one of its own."""
    service.check_model(asked.fields.model, param="model")
    service.check_ready()
    service.client.check_room()
    info = service.client.info
    asked.check_vocabulary(info.vocab_size)
    asked.check_scores(info.scores_prompts)
    return info


def _scores(
    service: Service, asked: Asked, prompts: Iterable[tuple[list[int], range]]
) -> list[PromptScores]:
    """One for each prompt, of its ids and the span of its text; none where nobody asks."""
    if asked.num_prompt_logprobs is None:
        return []
    return [PromptScores(ids, service.chat.pieces, span) for ids, span in prompts]


def _terms(service: Service, info: EngineInfo, asked: Asked) -> dict[str, Any]:
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


def _submit(
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


def _submit_all(
    service: Service, asked: Asked, prompts: list[list[int]], info: EngineInfo
) -> Generation | None:
    started: list[Generation] = []
    try:
        for prompt_ids in prompts:
            generation = _submit(service, asked, prompt_ids, info)
            if generation is None:  # max_tokens is 0, and so it is for every prompt
                return None
            started.append(generation)
    except Exception:
        for generation in started:
            generation.cancel()
        raise
    return started[0] if len(started) == 1 else Batch(started, asked.num_sequences)
