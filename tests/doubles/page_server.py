"""The process of a server for the page's tests: `page_server.py [--model NAME] [--key KEY]`.

Its engine says what the last message names, token by token and not all at once, with made-up log
probabilities. It prints its port and serves until its standard input ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import gevent
from gevent.pywsgi import WSGIHandler, WSGIServer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from scripted.answers import Script, to_clients  # noqa: E402
from scripted.engine import Playing, ScriptedEngine, write_text  # noqa: E402

from enginehouse.runtime.request import (  # noqa: E402
    ExecutorStats,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from enginehouse.server.api_keys import read_keys  # noqa: E402
from enginehouse.server.app import create_app  # noqa: E402
from enginehouse.server.settings import ServerSettings  # noqa: E402

_USER = "<|im_start|>user\n"
_SLOW_S = 0.02
ATTACK = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\n\n"
    "[link](javascript:window.hacked=1) ![picture](https://example.com/x.png) "
    '<https://example.com/"onmouseover=alert(1)>\n\n```<b>\n</code></pre><script>1</script>\n```\n'
)
MARKDOWN = (
    "# Title\n\nSome **bold** and *slanted* words, `code`, and a [link](https://example.com/).\n\n"
    "1. one\n2. two\n   - inner\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> quoted\n\n"
    "```python\ndef wheels(n: int) -> int:\n    return 8 * n  # eight each\n```\n\nThe end.\n"
)
SAID = {
    "markdown": MARKDOWN,
    "attack": ATTACK,
    "think": "<think>First I *think* of it.</think>Then I say it.",
    "slow": "On and on it goes. " * 400,
    "evil tool": '{"name": "get_weather", "arguments": {"city": "<img src=x onerror=alert(1)>"}}',
}


def answers(prompt: str) -> Iterator[str]:
    last = prompt.rpartition(_USER)[2]
    said = [text for name, text in SAID.items() if name in last]
    return chain(said, to_clients(prompt))


class Paced(Playing):
    """Its outputs come one after the other, and are counted."""

    num_told = 0

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        gevent.sleep(_SLOW_S if len(self._left) > 100 else 0.001)
        Paced.num_told += bool(self._left)
        return super().get(timeout_s)

    @property
    def has_output(self) -> bool:
        return False

    @has_output.setter
    def has_output(self, _: bool) -> None: ...


class PageEngine(ScriptedEngine):
    """Its figures are made up of what runs."""

    def __init__(self, engine_dir: Path, script: Script) -> None:
        super().__init__(engine_dir, script)
        self._all: list[Paced] = []

    @property
    def stats(self) -> ExecutorStats:  # type: ignore[override]
        self._all = [playing for playing in self._all if not playing.finished]
        num_running = sum(len({index for index, _ in playing._left}) for playing in self._all)
        return ExecutorStats(
            num_running=num_running,
            num_kv_blocks=1024,
            num_free_kv_blocks=1024 - 60 * num_running,
            num_remembered_kv_blocks=200,
            num_iterations=Paced.num_told,
            num_generated_tokens=Paced.num_told,
            kv_blocks=bytes([3] * 20 + [2] * 20 * min(num_running, 10) + [1] * 100 + [0] * 160),
        )

    def submit(
        self,
        prompt_ids: list[int],
        samplings: list[SamplingParams],
        priority: int = 0,
        label: str = "",
    ) -> Paced:
        prompt = self._tokenizer.decode(prompt_ids, skip_special_tokens=False)
        playing = Paced([self._outputs(prompt, sampling) for sampling in samplings])
        if "give way" in prompt.rpartition(_USER)[2]:
            playing.preempted = frozenset({0})
        self._all.append(playing)
        return playing

    def _outputs(self, prompt: str, sampling: SamplingParams) -> list[TokenOutput]:
        outputs = super()._outputs(prompt, sampling)
        if "break" in prompt.rpartition(_USER)[2]:
            end = TokenOutput(1, finish_reason=FinishReason.ERROR, error="the engine has no steam")
            return [*outputs[:3], end]
        if sampling.num_logprobs is None:
            return outputs
        return [self._scored(output, sampling.num_logprobs) for output in outputs]

    def _scored(self, output: TokenOutput, num_top: int) -> TokenOutput:
        scores = [_score(token_id, num_top) for token_id in output.token_ids]
        return TokenOutput(
            output.request_id,
            output.token_ids,
            output.finish_reason,
            logprobs=scores or None,
            stop_token_id=output.stop_token_id,
        )


MANIFEST: dict[str, Any] = {
    "name": "<b>scripted</b>",
    "created": "2026-01-31T12:00:00+00:00",
    "choices": {"quant": "int4_awq", "group_size": 64},
    "verify": {"mean_kl": 0.1365, "max_kl": 2.5, "top1_agreement": 0.87, "num_positions": 537},
    "files": {"rank0.safetensors": {"bytes": 90 << 20, "sha256": "0"}},
    "build": {
        "source_bytes": 256 << 20,
        "weight_bytes": 90 << 20,
        "num_parameters": 134_000_000,
        "stages": [["plan", 0.01, 1 << 28], ["convert", 135.0, 1 << 30], ["verify", 4.5, 1 << 29]],
        "memory": {
            "gpu": "h100",
            "total": 79 << 30,
            "weights": 90 << 20,
            "activations": 1 << 28,
            "runtime": 2 << 30,
            "kv_cache": 68 << 30,
            "requests": [[2048, 64], [8192, 17]],
        },
        "errors_of": "what leaves the layer",
        "errors": [[layer, 0.01 * (layer + 1)] for layer in range(12)],
    },
}
_STAGE = ("name", "seconds", "peak_bytes")


def write_manifest(folder: Path) -> None:
    stages = [dict(zip(_STAGE, stage, strict=True)) for stage in MANIFEST["build"]["stages"]]
    told = {**MANIFEST, "build": {**MANIFEST["build"], "stages": stages}}
    (folder / "manifest.json").write_text(json.dumps(told), encoding="utf-8")


def _score(token_id: int, num_top: int) -> TokenLogprobs:
    top: Sequence[tuple[int, float]] = [(token_id + i, -0.3 - i) for i in range(num_top)]
    return TokenLogprobs(-(token_id % 7) / 3, tuple(top), 1)


class SocketHandler(WSGIHandler):
    """Tells the socket as gunicorn does."""

    def get_environ(self) -> dict[str, object]:
        return {**super().get_environ(), "gunicorn.socket": self.socket}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--key")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder)
        write_manifest(folder)
        engine = PageEngine(folder, answers)
        keys = read_keys({"ENGINEHOUSE_API_KEYS": options.key} if options.key else {})
        settings = ServerSettings(
            folder,
            "ipc://none",
            options.model,
            responses_path=folder / "responses.sqlite",
            api_keys=keys,
            reasoning_format="think",
        )
        app = create_app(settings, engine)
        server = WSGIServer(("127.0.0.1", 0), app, handler_class=SocketHandler, log=None)
        server.start()
        print(server.server_port, flush=True)
        gevent.get_hub().threadpool.apply(sys.stdin.read)
        server.stop(timeout=1)
        engine.close()


if __name__ == "__main__":
    main()
