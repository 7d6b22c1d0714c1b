"""Mixed traffic for minutes, and whether anything grows: memory, descriptors, greenlets, blocks.

Judged is a straight line through each figure's samples after the first third: how much it rises
from that third's end to the last sample. Knows no fault.
"""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from breaks.clients import Open, ask, body_of
from breaks.server import Server, wait_until

SAMPLE_S = 5.0
_THREADS = 4
_A_SECOND = 8  # requests, of all threads
_HERE = Path(__file__).resolve().parent
_MIB = 1 << 20


class Growth(NamedTuple):
    """rise: of the line; limit: of the rise, in the figure's unit; mean: of what is judged."""

    figure: str
    mean: float
    rise: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.rise <= self.limit


# What may rise: a figure's own part, and so much beside it.
LIMITS = {
    "master MiB": (0.02, 2.0),
    "workers MiB": (0.02, 4.0),
    "host MiB": (0.02, 8.0),
    "master descriptors": (0.0, 2.0),
    "worker descriptors": (0.0, 4.0),
    "host descriptors": (0.0, 2.0),
    "greenlets": (0.0, 8.0),
    "blocks held": (0.0, 16.0),
}


Sample = dict[str, float]


def soak(server: Server, counts: Path, minutes: float, seen: Counter[str]) -> list[Sample]:
    """Samples, each with its `seconds`. counts: of greenlets. seen: how often what was answered."""
    ends = threading.Event()
    threads = [
        threading.Thread(target=_traffic, args=(server.port, ends, seen, number), daemon=True)
        for number in range(_THREADS)
    ]
    for thread in threads:
        thread.start()
    began_s, samples = time.monotonic(), []
    while (now_s := time.monotonic() - began_s) < 60 * minutes:
        samples.append({"seconds": now_s, **_sample(server, counts)})
        ends.wait(SAMPLE_S)
    ends.set()
    for thread in threads:
        thread.join()
    wait_until(server.is_idle, "all blocks are back")
    return samples


def _traffic(port: int, ends: threading.Event, seen: Counter[str], number: int) -> None:
    choose = random.Random(number)
    while not ends.wait(choose.uniform(0.5, 1.5) * _THREADS / _A_SECOND):
        kind = choose.choices(("plain", "stream", "vanish", "bad", "grammar"), (4, 3, 1, 1, 1))[0]
        prompt = f"{choose.randint(0, 10**9)} " * choose.randint(1, 20)
        if kind == "vanish":
            client = Open(port, body_of(400, prompt=prompt, stream=True))
            ends.wait(choose.uniform(0, 0.3))
            client.vanish()
            seen["vanish"] += 1
            continue
        fields = {
            "plain": {},
            "stream": {"stream": True},
            "bad": choose.choice(({"temperature": 9}, {"n": -1}, {"guided_regex": "(a"})),
            "grammar": {"guided_regex": f"[ab]{{3}}-{choose.randint(0, 50)}", "ignore_eos": False},
        }[kind]
        answer = ask(port, choose.randint(1, 60), prompt=prompt, **fields)
        seen[f"{kind}: {answer.what}"] += 1


def _sample(server: Server, counts: Path) -> Sample:
    master, host, workers = psutil.Process(server.process.pid), server.host(), server.workers()
    found = server.metrics()
    blocks = (found.get(f"enginehouse_kv_cache_blocks{of}", 0) for of in ("", "_free"))
    return {
        "master MiB": master.memory_info().rss / _MIB,
        "workers MiB": sum(each.memory_info().rss for each in workers) / _MIB,
        "host MiB": host.memory_info().rss / _MIB if host else 0,
        "master descriptors": master.num_fds(),
        "worker descriptors": sum(each.num_fds() for each in workers),
        "host descriptors": host.num_fds() if host else 0,
        "greenlets": sum(int(path.read_text()) for path in counts.glob("*[0-9]")),
        "blocks held": next(blocks) - next(blocks),
    }


def judge(samples: Sequence[Sample]) -> list[Growth]:
    judged = samples[len(samples) // 3 :]
    found = []
    for figure, (part, beside) in LIMITS.items():
        values = [sample[figure] for sample in judged]
        mean = sum(values) / len(values)
        rise = _slope([s["seconds"] for s in judged], values)
        rise *= judged[-1]["seconds"] - judged[0]["seconds"]
        found.append(Growth(figure, mean, rise, part * mean + beside))
    return found


def _slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the least squares' line."""
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((time - middle) ** 2 for time in times)
    pairs = zip(times, values, strict=True)
    return sum((t - middle) * (v - mean) for t, v in pairs) / spread if spread else 0.0


def rows_of(growths: Sequence[Growth]) -> list[dict[str, str]]:
    return [
        {
            "figure": each.figure,
            "mean": f"{each.mean:.1f}",
            "rise": f"{each.rise:+.2f}",
            "limit": f"{each.limit:.2f}",
            "verdict": "held" if each.holds else "FAILED: it grows",
        }
        for each in growths
    ]


def plot(samples: Sequence[Sample], image: Path, python: Path) -> None:
    """python: an interpreter that has matplotlib."""
    command = [str(python), str(_HERE / "run_plot.py"), str(image)]
    subprocess.run(command, input=json.dumps(samples), text=True, check=True, timeout=120)
