"""A hub id -> the model's folder in the hub's cache: first what a plan is made of, then weights.

config.json, the index and the tokenizer are fetched when a model is opened. The headers of weight
files are read over the network alone, and the files come with `fetch`. When the network fails, one
sentence says so and names what works without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in __all__
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from enginehouse.build.progress import ticking
from enginehouse.build.sources.folder import DiskFolder, Folder
from enginehouse.build.sources.hf_checkpoint import INDEX, PICKLE_SUFFIXES
from enginehouse.build.sources.safetensors_file import DISK
from enginehouse.build.sources.tokenizer_files import (
    SLOW_TOKENIZER_FILES,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
)
from enginehouse.runtime.errors import CheckpointError

Progress = Callable[[str], None]  # one line of text at a time

_SMALL_FILES = (
    "config.json",
    INDEX,
    "hf_quant_config.json",
    "quantize_config.json",
    "adapter_config.json",  # what a folder is that cannot be read
    "README.md",
    *TOKENIZER_FILES,
    f"{TEMPLATE_FOLDER}/*.jinja",
)
_TIMEOUT_S = 30
_HEAD_BYTES = 1 << 16  # of a weight file: holds most headers
_WATCH_S = 0.5
INSTEAD = "give a Hugging Face directory or a .gguf file on this disk instead"
_HUB_LOCAL = (
    f"{INSTEAD}, set HF_ENDPOINT to a mirror you can reach, or HF_HUB_OFFLINE=1 for what is "
    "already in the hub's cache"
)
# The root of the HTTP client's errors: requests' or httpx's, by the version of huggingface_hub.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]


class HubFolder:
    """A model at one commit: its folder in the cache, and what is not in it yet."""

    def __init__(self, repo: str, commit: str, path: Path, sizes: Mapping[str, int]) -> None:
        self.path = path
        self.names = frozenset(name for name in sizes if "/" not in name)
        self.name = repo.rpartition("/")[2]
        self.label = repo
        self.origin = f"{repo}@{commit}"
        self._commit = commit
        self._sizes = sizes
        self._heads: dict[str, bytes] = {}

    def size(self, path: Path) -> int:
        return self._sizes[path.name]

    def fill(self, path: Path, view: memoryview, offset: int) -> None:
        if path.exists():
            return DISK.fill(path, view, offset)
        end = offset + len(view)
        if path.name not in self._heads:
            self._heads[path.name] = self._get(path.name, 0, _HEAD_BYTES)
        data = self._heads[path.name][offset:end]
        if len(data) < len(view):
            data = self._get(path.name, offset, len(view))
        if len(data) < len(view):
            raise CheckpointError(
                f"{self.label} gave {len(data):,} bytes of {path.name}; wanted {len(view):,}: try "
                "again"
            )
        view[:] = data

    def fetch(self, paths: Sequence[Path], advance: Callable[[int], None]) -> None:
        blobs = self.path.parent.parent / "blobs"
        with _in_one_sentence(self.label), _watched(blobs, advance):
            snapshot_download(self.label, self._commit, [path.name for path in paths])
        absent = [path.name for path in paths if not path.exists()]
        if absent:
            raise CheckpointError(f"{self.label} was fetched without {absent[0]}: try again")

    def _get(self, name: str, start: int, count: int) -> bytes:
        """Bytes of a file on the hub; as many as it has."""
        with _in_one_sentence(self.label):
            response = get_session().get(
                hf_hub_url(self.label, name, revision=self._commit),
                headers={
                    **build_hf_headers(),
                    "Range": f"bytes={start}-{start + count - 1}",
                    "Accept-Encoding": "identity",
                },
                timeout=_TIMEOUT_S,
            )
            hf_raise_for_status(response)
        data: bytes = response.content
        whole = response.status_code == 200  # from a server that knows no ranges
        return data[start : start + count] if whole else data


def open_hub(model: str, progress: Progress) -> Folder:
    """`owner/name` or `owner/name@revision`, with all but its weights in the cache.

    What is in the cache is taken where the hub cannot be reached. CheckpointError when the model
    cannot be had, and for one that is there as .gguf files only.
    """
    repo, _, revision = model.partition("@")
    progress(f"hub: {model}")
    with _in_one_sentence(model):
        try:
            commit, sizes = list_files(repo, revision or None)
        except (RevisionNotFoundError, HFValidationError):
            raise
        except (_HTTP_ERROR, OSError) as error:
            cached = try_to_load_from_cache(repo, "config.json", revision=revision or None)
            if not isinstance(cached, str):
                raise
            progress(
                f"taken from the hub's cache here, as the hub has not answered: {_first(error)}"
            )
            return DiskFolder(Path(cached).parent)
        _refuse_gguf(repo, sizes)
        path = snapshot_download(repo, revision or None, _small(sizes))
    if path.name != commit:
        raise CheckpointError(f"{model} changed on the hub while it was read: start again")
    return HubFolder(repo, commit, path, sizes)


def list_files(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit that a revision is, and its files with their bytes."""
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    unknown = [name for name, size in sizes.items() if size is None]
    if info.sha is None or unknown:
        raise CheckpointError(
            f"the hub tells of {repo} no {f'size of {unknown[0]}' if unknown else 'commit'}; "
            f"{_HUB_LOCAL}"
        )
    return info.sha, {name: size for name, size in sizes.items() if size is not None}


def snapshot_download(repo: str, revision: str | None, names: Iterable[str]) -> Path:
    """The folder of a commit in the cache, with these files; those that are there are kept."""
    disable_progress_bars()  # a build has its own
    return Path(
        huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(names), etag_timeout=5
        )
    )


def _small(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that a plan is made of."""
    names = set(names)
    wanted = [*_SMALL_FILES, *(() if "tokenizer.json" in names else SLOW_TOKENIZER_FILES)]
    return [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]


def _refuse_gguf(repo: str, names: Iterable[str]) -> None:
    names = sorted(names)
    files = [name for name in names if name.lower().endswith(".gguf")]
    if files and not any(name.endswith((".safetensors", *PICKLE_SUFFIXES)) for name in names):
        raise CheckpointError(
            f"{repo} holds its weights as .gguf files only ({', '.join(files)}): fetch one of the "
            f"Llama family with `hf download {repo} {files[0]} --local-dir .`, and give its path"
        )


@contextmanager
def _in_one_sentence(model: str) -> Iterator[None]:
    """What the hub's client raises, as a CheckpointError."""
    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated on the hub: accept its terms there and set HF_TOKEN, or {INSTEAD}"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{model} is neither a path here nor found on the hub (a private one needs "
            f"HF_TOKEN); check the name, or {INSTEAD}"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{model} names a revision that the hub does not have; give a branch, a tag or a "
            "commit behind the @"
        ) from None
    except HFValidationError:
        raise CheckpointError(f"{model} is neither a path here nor a hub id; {INSTEAD}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{model} is not a path here, and the hub cannot be reached; {_HUB_LOCAL}"
        ) from None
    except (_HTTP_ERROR, OSError) as error:
        raise CheckpointError(
            f"{model} could not be fetched from the hub: {_first(error)}; {_HUB_LOCAL}"
        ) from None


def _first(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _watched(blobs: Path, advance: Callable[[int], None]) -> Iterator[None]:
    """Tell of what comes into a folder, while the body runs: its client has no one way to say."""
    seen = _bytes_in(blobs)

    def look() -> None:
        nonlocal seen
        now = max(seen, _bytes_in(blobs))
        advance(now - seen)
        seen = now

    with ticking(_WATCH_S, look):
        yield


def _bytes_in(folder: Path) -> int:
    """What a folder's files take on the disk, whatever length they were given beforehand."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # it was just given its final name
            continue
    return total
