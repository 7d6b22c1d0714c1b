"""POST /v1/embeddings: the form of its body. Knows no Flask and no model.

Source: OpenAI's API reference, "Create embeddings"; vLLM's and llama.cpp's for the rest.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from enginehouse.server.wire.refused_fields import UNSUPPORTED_IN_EMBEDDINGS
from enginehouse.server.wire.shapes import MAX_DIMENSIONS, MAX_INPUTS, Body, FreeObject
from enginehouse.server.wire.texts_or_ids import texts_or_ids

PoolingName = Literal["last", "mean"]


class EmbeddingsBody(Body):
    """POST /v1/embeddings"""

    refused = UNSUPPORTED_IN_EMBEDDINGS

    model: str
    """The served name, or one of the engine's own names."""
    input: Annotated[list[Any], texts_or_ids(MAX_INPUTS)]
    """A text, texts, token ids, or lists of token ids: an embedding is made of each."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: of the vector's float32 numbers, the lowest byte first."""
    dimensions: Annotated[int | None, Field(ge=1, le=MAX_DIMENSIONS)] = None
    """So many of the first numbers; absent: all."""
    pooling: PoolingName | None = None
    """The last token's hidden state, or the mean of all; absent: as the server is set."""
    normalize: bool = True
    """To a length of 1, as OpenAI's are."""
    add_special_tokens: bool = True
    """Read a text as the tokenizer begins and ends texts, with BOS or EOS if it does."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """A lower one runs first."""
    user: str | None = None
    """Is checked; no answer depends on it."""
    metadata: FreeObject = {}
    """Is checked; X-Ignored-Fields names it."""
