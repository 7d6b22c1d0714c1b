"""The peer: FastAPI and uvicorn with the same endpoint, `uvicorn run_fastapi:app`, in its own env.

The body is our own pydantic model, ChatBody; the prompt is made by the engine's template and
tokenizer; tokens come from the same scripted engine through an asyncio.Queue for each sequence and
become text by tokenizers' DecodeStream; answers and chunks are pydantic models, written with
model_dump_json, as servers of this kind do. Environment: ENGINE, BENCH_PERIOD_S.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import jinja2.sandbox
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from enginehouse.server.wire.bodies import ChatBody

LONG = 1000
TEXT = " The engine answers at once, and says so in the plainest of words it has."

ENGINE = Path(os.environ["ENGINE"])
MODEL = json.loads((ENGINE / "manifest.json").read_text())["model"]["name"]
TOKENIZER = Tokenizer.from_file(str(ENGINE / "tokenizer.json"))
TEMPLATE = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True
).from_string((ENGINE / "chat_template.jinja").read_text())
TOKEN_IDS = TOKENIZER.encode(TEXT, add_special_tokens=False).ids


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    estimated_cost: float


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Chunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Message(BaseModel):
    role: str = "assistant"
    content: str | None
    refusal: str | None = None
    annotations: list[Any] = []


class Choice(BaseModel):
    index: int
    message: Message
    logprobs: None = None
    finish_reason: str | None
    stop_reason: str | int | None = None


class Answer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[Choice]
    usage: Usage


class Running:
    def __init__(self, num_tokens: int) -> None:
        self.queue: asyncio.Queue[tuple[int, bool]] = asyncio.Queue()
        self.num_tokens, self.done = num_tokens, 0

    def step(self) -> bool:
        token_id = TOKEN_IDS[self.done % len(TOKEN_IDS)]
        self.done += 1
        last = self.done == self.num_tokens
        self.queue.put_nowait((token_id, last))
        return last


class Engine:
    """As at_once.py's: a token of every sequence, a step at a time."""

    def __init__(self, period_s: float) -> None:
        self.fast: set[Running] = set()
        self.slow: set[Running] = set()
        self.period_s = period_s
        self.wake = asyncio.Event()

    def submit(self, num_tokens: int) -> Running:
        running = Running(num_tokens)
        is_long = num_tokens >= LONG
        if is_long:
            running.step()
        (self.slow if is_long else self.fast).add(running)
        self.wake.set()
        return running

    def cancel(self, running: Running) -> None:
        self.fast.discard(running)
        self.slow.discard(running)

    async def run_fast(self) -> None:
        while True:
            if not self.fast:
                self.wake.clear()
                await self.wake.wait()
            self.fast -= {each for each in list(self.fast) if each.step()}
            await asyncio.sleep(0)

    async def run_slow(self) -> None:
        while True:
            await asyncio.sleep(self.period_s)
            self.slow -= {each for each in list(self.slow) if each.step()}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.engine = engine = Engine(float(os.environ["BENCH_PERIOD_S"]))
    tasks = [asyncio.create_task(engine.run_fast()), asyncio.create_task(engine.run_slow())]
    yield
    for task in tasks:
        task.cancel()


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/v1/chat/completions")
async def chat_completions(body: ChatBody) -> Response:
    messages = [
        {"role": each.role, "content": "".join(part.text for part in each.content)}
        for each in body.messages
    ]
    text = TEMPLATE.render(messages=messages, add_generation_prompt=True)
    num_prompt = len(TOKENIZER.encode(text, add_special_tokens=False).ids)
    num_tokens = body.max_tokens or body.max_completion_tokens or 16
    engine: Engine = app.state.engine
    running = engine.submit(num_tokens)
    head = {"id": f"chatcmpl-{secrets.token_hex(16)}", "created": int(time.time()), "model": MODEL}

    def usage() -> Usage:
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=running.done,
            total_tokens=num_prompt + running.done,
            prompt_tokens_details={"cached_tokens": 0},
            estimated_cost=(num_prompt * 0.35 + running.done * 0.40) / 1e6,
        )

    if body.stream:
        options = body.stream_options
        include = bool(options and options.include_usage)
        events = _events(engine, running, head, usage, include)
        return StreamingResponse(events, media_type="text/event-stream")
    decoder, pieces, last = DecodeStream(skip_special_tokens=True), [], False
    while not last:
        token_id, last = await running.queue.get()
        pieces.append(decoder.step(TOKENIZER, token_id) or "")
    choice = Choice(index=0, message=Message(content="".join(pieces)), finish_reason="length")
    answer = Answer(**head, choices=[choice], usage=usage())
    return Response(answer.model_dump_json(), media_type="application/json")


async def _events(
    engine: Engine, running: Running, head: dict[str, Any], usage: Any, include_usage: bool
) -> AsyncIterator[str]:
    decoder, last, first = DecodeStream(skip_special_tokens=True), False, True

    def event(delta: Delta, reason: str | None = None) -> str:
        choice = ChunkChoice(index=0, delta=delta, finish_reason=reason)
        return f"data: {Chunk(**head, choices=[choice]).model_dump_json()}\n\n"

    try:
        while not last:
            token_id, last = await running.queue.get()
            if first:
                yield event(Delta(role="assistant", content=""))
                first = False
            if text := decoder.step(TOKENIZER, token_id):
                yield event(Delta(content=text))
        yield event(Delta(), "length")
        if include_usage:
            yield f"data: {Chunk(**head, choices=[], usage=usage()).model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        engine.cancel(running)
