"""A load by guidellm, another project's generator, in an environment of its own.

Its prompts are synthetic, of words of the engine's tokenizer, and each is new; its times begin when
it sends a request. Source: `guidellm run --help`, release 0.8.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 60
_LONGER_S = 300.0  # to start, to end what is open, and to sum up


def measured(
    python: Path, url: str, engine: Path, model: str, rate: float, tokens: int, seconds: float
) -> dict[str, float]:
    """Requests by Poisson arrivals, `rate` a second; times in seconds. CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [str(python.with_name("guidellm")), "run", "--disable-console"]
        command += ["--backend", f"kind=openai_http,target={url},model={model}"]
        command += ["--profile", f"kind=poisson,rate={rate:.4f}"]
        command += ["--constraint", f"kind=max_duration,seconds={seconds:g}"]
        command += ["--tokenizer", f"kind=hf_auto,model={engine}"]
        data = f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={tokens}"
        command += ["--data", data, "--output", f"kind=json,path={found}"]
        ours = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        # Ten processes, its default, take both cores of a small machine for seconds as they start.
        one = {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        environment = {**ours, **one, "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            command, check=True, env=environment, timeout=seconds + _LONGER_S, capture_output=True
        )
        [benchmark] = json.loads(found.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    return {
        "answered": metrics["request_totals"]["successful"],
        "tokens_per_s": metrics["output_tokens_per_second"]["successful"]["mean"],
        **_percentiles("first", metrics["time_to_first_token_ms"]),
        **_percentiles("between", metrics["inter_token_latency_ms"]),
    }


def _percentiles(name: str, metric: dict[str, Any]) -> dict[str, float]:
    found = metric["successful"]["percentiles"]
    return {f"{name}_p50": found["p50"] / 1000, f"{name}_p99": found["p99"] / 1000}
