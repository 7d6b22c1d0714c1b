"""A hub id -> the files of it that a build reads, in the hub's own cache on this disk.

When the network fails, one sentence says so and names what works without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from enginehouse.build.sources.tokenizer_files import TOKENIZER_FILES
from enginehouse.runtime.errors import CheckpointError

Progress = Callable[[str], None]  # one line of text at a time

HUB_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "rank*.safetensors",
    "hf_quant_config.json",
    "quantize_config.json",
    "adapter_config.json",  # what a folder is that cannot be read
    "params.json",
    *TOKENIZER_FILES,
    "README.md",
)
INSTEAD = "give a Hugging Face directory or a .gguf file on this disk instead"
_HUB_LOCAL = (
    f"{INSTEAD}, set HF_ENDPOINT to a mirror you can reach, or HF_HUB_OFFLINE=1 for what is "
    "already in the hub's cache"
)
# The root of the HTTP client's errors: requests' or httpx's, by the version of huggingface_hub.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]


def fetch(model: str, progress: Progress) -> Path:
    """The folder of the snapshot; CheckpointError when it cannot be had."""
    progress(f"hub: {model}")
    try:
        return snapshot_download(model)
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated on the hub: accept its terms there and set HF_TOKEN, or {INSTEAD}"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{model} is neither a path here nor found on the hub (a private one needs "
            f"HF_TOKEN); check the name, or {INSTEAD}"
        ) from None
    except HFValidationError:
        raise CheckpointError(f"{model} is neither a path here nor a hub id; {INSTEAD}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{model} is not a path here, and the hub cannot be reached; {_HUB_LOCAL}"
        ) from None
    except (_HTTP_ERROR, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{model} could not be fetched from the hub: {reason}; {_HUB_LOCAL}"
        ) from None


def snapshot_download(model: str) -> Path:
    """The hub's files for `model` in its cache, with its own progress. Tests replace this."""
    return Path(
        huggingface_hub.snapshot_download(
            model, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"], etag_timeout=5
        )
    )
