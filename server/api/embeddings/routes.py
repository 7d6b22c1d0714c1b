"""POST /v1/embeddings: texts and token ids, several at once, each one's vector.

They go the way of text completions, but that the engine pools a prompt instead of answering it.
"""

from __future__ import annotations

import time
from functools import partial

import gevent
from flask import Response, g
from gevent.lock import Semaphore

from enginehouse.runtime.request import EngineInfo, Pooling, PoolingKind, SamplingParams
from enginehouse.server.answer.completion import Terms
from enginehouse.server.api.embeddings.answer import Embeddings
from enginehouse.server.api.embeddings.body import EmbeddingsBody
from enginehouse.server.api.embeddings.in_turn import InTurn
from enginehouse.server.api.texts.batch import Batch
from enginehouse.server.http.conversations import check_served
from enginehouse.server.http.service import Service, fingerprint_of, tell
from enginehouse.server.observe.logged import log_prompt
from enginehouse.server.prompt.prompts import detokenize, text_prompt
from enginehouse.server.request.asked import ignored_fields
from enginehouse.server.wire.refusal import parse_body, refuse
from enginehouse.server.wire.texts_or_ids import check_sizes

_STEPS_AT_ONCE = 2  # of one request in the engine, so that one waits while the other is computed


def embeddings(service: Service) -> Response:
    started_s = time.monotonic()
    max_seq_len = service.max_messages
    asked = service.read(lambda body: _parse(body, max_seq_len))
    ignored = ignored_fields(asked)
    info = check_served(service, asked.model)
    sampling = SamplingParams(0, pooling=_pooling(service, asked, info))
    prompts = [_prompt(service, asked, index, info) for index in range(len(asked.input))]
    terms = Terms(
        model=service.settings.model_name,
        pieces=service.chat.pieces,
        prices=service.prices,
        num_prompts=len(prompts),
        num_prompt_tokens=sum(map(len, prompts)),
        fingerprint=fingerprint_of(info),
    )
    room = Semaphore(_STEPS_AT_ONCE * info.max_batch_size)
    submit, label = service.client.submit, g.request_id
    starts = [partial(submit, ids, [sampling], asked.priority, label) for ids in prompts]
    generation = Batch([InTurn(start, room) for start in starts], 1)
    completion = Embeddings(terms, asked.encoding_format == "base64", started_s=started_s)
    return tell(service.answer(completion, generation, stream=False), ignored)


def _parse(body: bytes, max_seq_len: int | None) -> EmbeddingsBody:
    return parse_body(EmbeddingsBody, body, lambda data: check_sizes(data, "input", max_seq_len))


def _pooling(service: Service, asked: EmbeddingsBody, info: EngineInfo) -> Pooling:
    """RequestError where the engine does not tell what is asked."""
    if not info.embedding_size:
        refuse(
            "model",
            f'this engine gives no embeddings, as backend "{info.backend}" tells no hidden states; '
            "wanted one that was built with --backend cpu or torch",
            "unsupported_parameter",
        )
    if asked.dimensions is not None and asked.dimensions > info.embedding_size:
        refuse(
            "dimensions",
            f"{asked.dimensions} is more than this model's embeddings have; wanted at most "
            f"{info.embedding_size}",
        )
    kind = PoolingKind(asked.pooling or service.settings.pooling)
    return Pooling(kind, asked.dimensions, asked.normalize)


def _prompt(service: Service, asked: EmbeddingsBody, index: int, info: EngineInfo) -> list[int]:
    param = "input" if len(asked.input) == 1 else f"input[{index}]"
    ids = text_prompt(service.chat, asked.input[index], asked.add_special_tokens, info, param)
    if service.settings.log_prompts:
        log_prompt(detokenize(service.chat, ids))
    gevent.sleep(0)  # of two thousand, others have their turn between them
    return ids
