"""JSON files of a checkpoint, and the values in them: each is refused by name when it is wrong."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from enginehouse.runtime.errors import CheckpointError

REMEDY = "is it the config.json of a complete checkpoint?"

# Names of activations: Hugging Face's (the first is the usual one), and TensorRT-LLM's.
# transformers has several names for a function: swish is SiLU, gelu_new the tanh form.
SILU_WORDS = ("silu", "swish")
TANH_WORDS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
SILU, SWIGLU = (SILU_WORDS, "silu"), (SILU_WORDS, "swiglu")
GELU = (TANH_WORDS, "gelu_pytorch_tanh")
GEGLU = (TANH_WORDS, "geglu")  # as swiglu: mlp.fc holds up and gate
# TensorRT-LLM's own "gelu" is the tanh form; it has no word for this one.
EXACT_GELU = (("gelu", "gelu_python"), "gelu_erf")
RELU2 = (("relu2",), "squared-relu")

# What no model reaches, and a damaged file must not make us count to.
_MANY = 10_000
LARGEST = {
    "num_hidden_layers": _MANY,
    "num_attention_heads": _MANY,
    "num_experts": _MANY,
    "num_local_experts": _MANY,
    "n_routed_experts": _MANY,
    "moe_num_experts": _MANY,
}


def number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; CheckpointError names the key."""
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json has no {key}; {REMEDY}")
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"config.json has {key}={value!r}; wanted a positive number")
    return float(value)


def boolean(hf: Mapping[str, Any], key: str) -> bool:
    """True or false, false when it is absent; CheckpointError names the key."""
    value = hf.get(key)
    if value not in (None, True, False):
        raise CheckpointError(f"config.json has {key}={value!r}; wanted true or false")
    return bool(value)


def json_object(hf: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of an object, empty when it is absent; CheckpointError names the key."""
    value = hf.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json has {key}={value!r}; wanted a JSON object")
    return dict(value)


def integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; CheckpointError names the key."""
    value = number(hf, key, default)
    if not value.is_integer() or value > LARGEST.get(key, 2**31):
        largest = LARGEST.get(key, 2**31)
        raise CheckpointError(
            f"config.json has {key}={value:g}; wanted a whole number from 1 to {largest}"
        )
    return int(value)


def whole_numbers(hf: Mapping[str, Any], key: str) -> list[int]:
    """A list of whole numbers, one alone as one; [] when absent; CheckpointError names the key."""
    value = hf.get(key)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in found):
        raise CheckpointError(f"config.json has {key}={value!r}; wanted whole numbers")
    return list(found)


def refuse(hf: Mapping[str, Any], key: str, known: tuple[Any, ...]) -> None:
    """CheckpointError unless the key is absent or has a value that the engine can run."""
    if key in hf and hf[key] not in known:
        wanted = f"{known[0]!r}" if known else "none"
        raise CheckpointError(
            f"config.json has {key}={hf[key]!r}; an engine of the family knows only {wanted}"
        )


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_POINTER = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointers(paths: Iterable[Path]) -> None:
    """CheckpointError for the first file that git-lfs left a pointer in the place of."""
    for path in paths:
        try:
            with path.open("rb") as file:
                head = file.read(len(_POINTER))
        except OSError:
            continue  # who reads the file will say so
        if head == _POINTER:
            raise CheckpointError(
                f"{path} is a git-lfs pointer, not the file: run `git lfs pull` in {path.parent}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file and the line at fault."""
    refuse_pointers([path])
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        if _SURROGATE.search(text):  # none is left where it is half of a pair
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{path} holds half a surrogate pair, which is no text; download the file again"
        ) from None
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; it is no complete Hugging Face checkpoint: "
            "download that file too"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise CheckpointError(
            f"{path} is not JSON that anyone wrote: it is nested too deep"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None
    except ValueError:  # what Python refuses to read as a number
        raise CheckpointError(
            f"{path} is not JSON that anyone wrote: it holds a number of thousands of digits"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}; wanted an object")
    return data
