"""POST /v1/completions: texts and token ids, several at once, as they are.

They go the way of a conversation (http/conversations.py), but that no template is about them.
"""

from __future__ import annotations

import time

from flask import Response

from enginehouse.runtime.request import EngineInfo
from enginehouse.server.answer.completion import Generation, Terms
from enginehouse.server.api.texts.answer import TextCompletion
from enginehouse.server.api.texts.batch import Batch
from enginehouse.server.api.texts.request import parse_text_request
from enginehouse.server.http.conversations import check, scores_of, submit, terms_of
from enginehouse.server.http.service import Service, tell
from enginehouse.server.observe.logged import log_prompt
from enginehouse.server.prompt.prompts import detokenize, echo_of, text_prompt, text_span
from enginehouse.server.request.asked import Asked


def text_completions(service: Service) -> Response:
    started_s = time.monotonic()
    max_seq_len = service.max_messages
    asked = service.read(lambda body: parse_text_request(body, max_seq_len))
    info = check(service, asked)
    prompts = [
        text_prompt(service.chat, prompt, asked.add_special_tokens, info, param)
        for prompt, param in asked.prompts_with_params()
    ]
    if service.settings.log_prompts:
        for ids in prompts:
            log_prompt(detokenize(service.chat, ids))
    echoes = [echo_of(service.chat, prompt) if asked.echo else "" for prompt in asked.prompts]
    terms = Terms(
        **terms_of(service, info, asked),
        num_prompts=len(prompts),
        num_prompt_tokens=sum(map(len, prompts)),
    )
    spans = [
        text_span(service.chat, prompt, ids) if asked.echoes_logprobs else range(0)
        for prompt, ids in zip(asked.prompts, prompts, strict=True)
    ]
    scores = scores_of(service, asked, zip(prompts, spans, strict=True))
    completion = TextCompletion(
        terms, echoes, asked.echoes_logprobs, scores=scores, started_s=started_s
    )
    generation = _submit_all(service, asked, prompts, info)
    response = service.answer(completion, generation, asked.fields.stream, asked.unenforced)
    paths = [path for each in asked.unenforced for path in each.paths]
    return tell(response, asked.ignored_fields, paths)


def _submit_all(
    service: Service, asked: Asked, prompts: list[list[int]], info: EngineInfo
) -> Generation | None:
    started: list[Generation] = []
    try:
        for prompt_ids in prompts:
            generation = submit(service, asked, prompt_ids, info)
            if generation is None:  # max_tokens is 0, and so it is for every prompt
                return None
            started.append(generation)
    except Exception:
        for generation in started:
            generation.cancel()
        raise
    return started[0] if len(started) == 1 else Batch(started, asked.num_sequences)
