"""The form of embeddings, for the OpenAPI document. Source: OpenAI's API reference."""

from __future__ import annotations

from typing import Literal

from enginehouse.server.wire.answers import AnswerShape


class Embedding(AnswerShape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(AnswerShape):
    prompt_tokens: int
    total_tokens: int
    estimated_cost: float


class EmbeddingList(AnswerShape):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
