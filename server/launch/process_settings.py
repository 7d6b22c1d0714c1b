"""Environment -> what the engine host is told, and what every process logs.

Read by the verb that starts a server, before there is one, and by gunicorn's master. A worker's own
settings are `server/settings.py`'s.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.host.log_lines import FORMATS, LEVELS
from enginehouse.runtime.host.supervisor import DEFAULT_SILENCE_S

_COUNT = "[1-9][0-9]{0,8}"
# Variable, the host's flag, what its text must be, the same in words.
_HOST_SETTINGS = (
    ("ENGINEHOUSE_MAX_SEQ_LEN", "--max-seq-len", _COUNT, "a number of tokens"),
    ("ENGINEHOUSE_MAX_BATCH_SIZE", "--max-batch-size", _COUNT, "a number of sequences"),
    ("ENGINEHOUSE_MAX_NUM_TOKENS", "--max-num-tokens", _COUNT, "a number of tokens"),
    (
        *("ENGINEHOUSE_KV_CACHE_GIB", "--kv-cache-gib"),
        *(r"(?=.*[1-9])[0-9]{1,6}(\.[0-9]{1,6})?", "GiB, like 4 or 0.5"),
    ),
    (
        *("ENGINEHOUSE_PREFILL_MS", "--prefill-ms"),
        *(r"(?=.*[1-9])[0-9]{1,6}(\.[0-9]{1,6})?", "milliseconds, like 20"),
    ),
    ("ENGINEHOUSE_SPECULATIVE", "--speculative", "ngram|off", "ngram or off"),
    (
        *("ENGINEHOUSE_NUM_SPECULATIVE_TOKENS", "--num-speculative-tokens"),
        *("[1-9][0-9]?", "a number of tokens from 1 to 99"),
    ),
    (
        *("ENGINEHOUSE_MAX_MATCHING_NGRAM_SIZE", "--max-matching-ngram-size"),
        *("[1-9]", "a number of tokens from 1 to 9"),
    ),
    (
        *("ENGINEHOUSE_SPECULATIVE_BATCH_SIZE", "--speculative-batch-size"),
        *(_COUNT, "a number of sequences"),
    ),
    ("ENGINEHOUSE_MAX_QUEUE_REQUESTS", "--max-queue-requests", _COUNT, "a number of sequences"),
    (
        "ENGINEHOUSE_MAX_QUEUE_TOKENS",
        "--max-queue-tokens",
        "[1-9][0-9]{0,11}",
        "a number of tokens",
    ),
    (
        *("ENGINEHOUSE_MAX_QUEUE_S", "--max-queue-s"),
        *(r"(?=.*[1-9])[0-9]{1,6}(\.[0-9]{1,3})?", "a number of seconds"),
    ),
    ("ENGINEHOUSE_DEVICE", "--device", "auto|cpu|cuda", "auto, cpu or cuda"),
    ("ENGINEHOUSE_TP_SIZE", "--tp-size", "[1-9][0-9]{0,3}", "a number of GPUs"),
    ("ENGINEHOUSE_RANKS_ADDRESS", "--ranks-address", r"\S+:[1-9][0-9]{0,4}", "HOST:PORT"),
    ("ENGINEHOUSE_RANKS_KEY_FILE", "--ranks-key-file", ".+", "a file"),
    ("ENGINEHOUSE_LOCAL_RANKS", "--local-ranks", "[1-9][0-9]{0,3}", "a number of ranks"),
    ("ENGINEHOUSE_START_S", "--start-s", "[1-9][0-9]{0,5}", "a number of seconds"),
    (
        *("ENGINEHOUSE_GRAMMAR_TIMEOUT_S", "--grammar-timeout-s"),
        *("[1-9][0-9]{0,5}", "a number of seconds"),
    ),
)


def host_flags(env: Mapping[str, str]) -> list[str]:
    """What the environment asks of the host. Raises EnginehouseError, which names the variable."""
    flags = ["--deterministic"] if _switch(env, "ENGINEHOUSE_DETERMINISTIC") else []
    if _switch(env, "ENGINEHOUSE_SHARED_WEIGHTS"):
        flags += ["--shared-weights"]
    if _switch(env, "ENGINEHOUSE_GRAMMARS_AT_ONCE") is False:
        flags += ["--grammars-later"]
    for name, flag, pattern, wanted in _HOST_SETTINGS:
        text = env.get(name, "")
        if text and not re.fullmatch(pattern, text):
            raise EnginehouseError(f"{name}={text!r}; wanted {wanted}")
        flags += [flag, text] if text else []
    if env.get("ENGINEHOUSE_LOG_LEVEL"):
        flags += ["--log-level", log_level(env)]
    if log_format(env) != "text":
        flags += ["--log-format", log_format(env)]
    return flags + (["--log-traffic"] if logs_traffic(env) else [])


def watchdog_s(env: Mapping[str, str]) -> float:
    """Seconds without a heartbeat after which a host is ended."""
    text = env.get("ENGINEHOUSE_WATCHDOG_S", "")
    if text and not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise EnginehouseError(f"ENGINEHOUSE_WATCHDOG_S={text!r}; wanted a number of seconds")
    return float(text) if text else DEFAULT_SILENCE_S


def num_replicas(env: Mapping[str, str]) -> int:
    """Engine hosts that this server starts."""
    least, most = range_of_replicas(env.get("ENGINEHOUSE_REPLICAS") or "1")
    if least != most:
        raise EnginehouseError(
            f"ENGINEHOUSE_REPLICAS={least}-{most}: within a range Ray Serve scales; add --ray, or "
            "give a number"
        )
    return least


def range_of_replicas(text: str) -> tuple[int, int]:
    """`2` and `1-4` -> at least and at most so many; EnginehouseError for what is neither."""
    found = re.fullmatch("([1-9][0-9]?)(?:-([1-9][0-9]?))?", text, re.ASCII)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if least > most:
        raise EnginehouseError(
            f"ENGINEHOUSE_REPLICAS={text!r}; wanted a number from 1 to 99, or two such as 1-4"
        )
    return least, most


def log_level(env: Mapping[str, str]) -> str:
    """Of every process; info where the environment does not say."""
    text = env.get("ENGINEHOUSE_LOG_LEVEL") or "info"
    if text not in LEVELS:
        raise EnginehouseError(f"ENGINEHOUSE_LOG_LEVEL={text!r}; wanted {', '.join(LEVELS)}")
    return text


def log_format(env: Mapping[str, str]) -> str:
    """Of every line; text where the environment does not say."""
    text = env.get("ENGINEHOUSE_LOG_FORMAT") or "text"
    if text not in FORMATS:
        raise EnginehouseError(f"ENGINEHOUSE_LOG_FORMAT={text!r}; wanted {' or '.join(FORMATS)}")
    return text


def logs_traffic(env: Mapping[str, str]) -> bool:
    """Whether there is a line for each request; where the environment is silent, on a terminal."""
    asked = _switch(env, "ENGINEHOUSE_ACCESS_LOG")
    return sys.stderr.isatty() if asked is None else asked


def _switch(env: Mapping[str, str], name: str) -> bool | None:
    text = env.get(name, "")
    if text not in ("", "0", "1"):
        raise EnginehouseError(f"{name}={text!r}; wanted 0 or 1")
    return text == "1" if text else None
