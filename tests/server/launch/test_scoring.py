"""What lm-evaluation-harness sends and reads, over gunicorn, against transformers in float32.

Source: lm-evaluation-harness 0.4.13, `local-completions`: its payload, and how it reads the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from makers.engines import EngineMaker
from makers.gunicorn_server import Server

CONTEXT = "The engine house stands at the end of the"
ENDINGS = [" yard", " platform with its doors open", "\n", " sea?"]


@pytest.fixture(scope="module")
def server(make_engine: EngineMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    engine = make_engine(quant="none", dtype="float32", compute_dtype="float32")
    running = Server(engine, tmp_path_factory.mktemp("gunicorn") / "log")
    yield running
    assert running.stop() == 0


def loglikelihoods(answer: dict[str, Any], context_lens: list[int]) -> list[tuple[float, bool]]:
    """As the harness reads an answer: what lies between the context and the one generated token."""
    found = []
    choices = sorted(answer["choices"], key=itemgetter("index"))
    for choice, context_len in zip(choices, context_lens, strict=True):
        scores = choice["logprobs"]["token_logprobs"][context_len:-1]
        tops = choice["logprobs"]["top_logprobs"][context_len:-1]
        greedy = all(own == max(top.values()) for own, top in zip(scores, tops, strict=True))
        found.append((sum(scores), greedy))
    return found


def computed(model: torch.nn.Module, ids: list[int], context_len: int) -> tuple[float, bool]:
    with torch.inference_mode():
        rows = model(torch.tensor([ids])).logits[0, context_len - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(ids[context_len:])
    own = rows.gather(1, wanted.unsqueeze(1)).sum()
    return float(own), bool((rows.argmax(-1) == wanted).all())


@pytest.mark.parametrize("as_ids", [True, False])
def test_the_harness_reads_what_transformers_computes(
    server: Server, tiny_checkpoint: Path, as_ids: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    context_len = len(tokenizer.encode(CONTEXT).ids)
    prompts = [tokenizer.encode(CONTEXT + ending).ids for ending in ENDINGS]
    with torch.inference_mode():  # and one that is greedy all through, with an end token behind it
        greedy = list(prompts[0][:context_len])
        for _ in range(3):
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    texts = [CONTEXT + ending for ending in ENDINGS]
    sent: list[Any] = [*prompts, greedy] if as_ids else texts
    wanted = [computed(model, ids, context_len) for ids in (prompts + [greedy])[: len(sent)]]
    payload = {"model": "tiny-llama", "temperature": 0, "max_tokens": 1, "logprobs": 1}
    with server.client() as client:
        for _ in range(2):  # the second time the prompts are in the cache
            answer = client.completions.create(prompt=sent, echo=True, seed=1234, **payload)
            found = loglikelihoods(answer.model_dump(), [context_len] * len(sent))
            for (own, is_greedy), (value, was_greedy) in zip(found, wanted, strict=True):
                assert abs(own - value) < 1e-3 and is_greedy == was_greedy
    assert not as_ids or [is_greedy for _, is_greedy in found][-1]


def test_an_end_token_takes_no_token_of_the_prompt_away(server: Server) -> None:
    """Whatever comes next ends the answer at once."""
    fields: dict[str, Any] = {"model": "tiny-llama", "max_tokens": 1, "logprobs": 1, "echo": True}
    with server.client() as client:
        plain = client.completions.create(prompt=[5, 6, 7], temperature=0, **fields)
        generated = client.completions.create(
            prompt=[5, 6, 7],
            temperature=0,
            extra_body={"stop_token_ids": list(range(512))},
            **fields,
        )
    [one], [other] = plain.choices, generated.choices
    assert (one.finish_reason, other.finish_reason) == ("length", "stop")
    assert one.logprobs is not None and other.logprobs is not None
    assert other.logprobs.token_logprobs == one.logprobs.token_logprobs
    assert len(other.logprobs.tokens or []) == 4


def test_prompt_logprobs_and_a_stream_say_the_same(server: Server) -> None:
    fields: dict[str, Any] = {"model": "tiny-llama", "prompt": CONTEXT, "temperature": 0}
    scored = {"echo": True, "logprobs": 2, "max_tokens": 4, "n": 2}
    with server.client() as client:
        whole = client.completions.create(extra_body={"prompt_logprobs": 2}, **fields, **scored)
        chunks = list(client.completions.create(stream=True, **fields, **scored))
    for choice in whole.model_dump()["choices"]:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice["index"]]
        told = [item.logprobs.token_logprobs for item in mine if item.logprobs is not None]
        assert sum(told, []) == choice["logprobs"]["token_logprobs"]
        assert "".join(item.text for item in mine) == choice["text"]
        for entry, own in zip(
            choice["prompt_logprobs"], choice["logprobs"]["token_logprobs"], strict=False
        ):
            assert (entry is None) == (own is None)
            assert entry is None or own in [item["logprob"] for item in entry.values()]


def test_a_token_beyond_the_vocabulary_is_the_senders_fault(server: Server) -> None:
    with server.client() as client, pytest.raises(openai.BadRequestError, match="below 512"):
        client.completions.create(model="tiny-llama", prompt=[5, 512])
