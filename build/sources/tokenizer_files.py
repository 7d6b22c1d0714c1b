"""The tokenizer that goes with the weights: its files, its special tokens, its way into an engine.

Copied as they are, from beside the weights or, for sources that have none, from another directory.
This file knows no tensor.
Source: transformers' tokenizer_config.json and generation_config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer

from enginehouse.build.hf_keys.config_values import read_json, refuse_pointers
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import CheckpointError
from enginehouse.runtime.template import compile_template

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",  # of a processor: {"chat_template": ...}
)
TEMPLATE_FOLDER = "additional_chat_templates"  # of files NAME.jinja
# What a tokenizer was before it had a tokenizer.json: not read, but converted by transformers.
SLOW_TOKENIZER_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "added_tokens.json",
)
# Tokens that chat templates put after an assistant's turn: a model that was taught one of them
# stops with it, whether or not the files call it an end of sequence.
END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
)


def tokenizer_files(directory: Path) -> list[Path]:
    """Of TOKENIZER_FILES and additional templates those that a directory has."""
    named = [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
    return named + sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))


def with_tokenizer(source: SourceCheckpoint, directory: Path) -> SourceCheckpoint:
    """`source` with the tokenizer, template and special tokens of a Hugging Face directory.

    Raises CheckpointError when that has no tokenizer.json.
    """
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{directory} has no tokenizer.json; give the Hugging Face directory of the model as "
            "tokenizer"
        )
    beside = directory / "config.json"
    eos, bos = special_token_ids(directory, read_json(beside) if beside.exists() else source.config)
    replaced = tokenizer_files(source.path)
    others = [path for path in source.files if path not in replaced]
    return replace(
        source,
        eos_token_ids=eos,
        bos_token_id=bos,
        files=(*others, *tokenizer_files(directory)),
        tokenizer_writer=lambda dest: copy_tokenizer(directory, dest),
    )


def check_tokenizer(source: SourceCheckpoint, note: Callable[[str], None]) -> None:
    """What the engine's server could not use, before a weight is read or fetched: CheckpointError
    where there is no tokenizer or none that can be read, and for a template that does not compile.

    That there is no template is noted.
    """
    if source.kind != "gguf" and all(path.name != "tokenizer.json" for path in source.files):
        raise _no_tokenizer(source.path, source.kind)
    with TemporaryDirectory() as name:
        directory = Path(name)
        source.write_tokenizer(directory)
        try:
            Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"tokenizer.json of {source.path} is no tokenizer: {reason}; download it again"
            ) from None
        templates = _chat_templates(directory)
    for name, template in templates.items():
        try:
            compile_template(template)
        except TemplateSyntaxError as error:
            which = "" if name == "default" else f" {name}"
            raise CheckpointError(
                f"the chat template{which} is not valid: {error.message} (line {error.lineno}); "
                "mend chat_template.jinja or tokenizer_config.json of the checkpoint"
            ) from None
    if not templates:
        note(
            "no chat template, as base models have none: /v1/chat/completions will be refused, "
            "/v1/completions not"
        )


def _no_tokenizer(path: Path, kind: str) -> CheckpointError:
    if kind == "tensorrt_llm":
        return CheckpointError(
            f"{path} is a TensorRT-LLM checkpoint, which holds no tokenizer; give the model's "
            "Hugging Face directory with --tokenizer, or stop with --until convert"
        )
    slow = [name for name in SLOW_TOKENIZER_FILES if (path / name).exists()]
    if not slow:
        return CheckpointError(
            f"{path} has no tokenizer.json; give the directory of the model's tokenizer with "
            "--tokenizer"
        )
    return CheckpointError(
        f"{path} has no tokenizer.json, only {', '.join(slow)}: make one where transformers (and "
        "sentencepiece, for a .model) is installed, python -c "
        '"from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{path}').save_pretrained('tokenizer')\", and give it with "
        "--tokenizer tokenizer"
    )


def check_token_ids(source: SourceCheckpoint, vocab_size: int, note: Callable[[str], None]) -> None:
    """Every token that a text can become is one that the model knows: CheckpointError, with both
    numbers, before a weight is read.

    Added tokens that only their own name gives (a padding token, one for images) are noted: such a
    model works without them. A tokenizer.json that cannot be read is `check_tokenizer`'s to judge.
    """
    path = next((path for path in source.files if path.name == "tokenizer.json"), None)
    if path is None:
        return
    ordinary, special = _tokens_by_id(path)
    beyond = {i: text for i, text in (ordinary | special).items() if i >= vocab_size}
    if not beyond:
        return
    largest = max(beyond)
    found = (
        f"the model has vocab_size={vocab_size}, but {path} has {len(beyond)} token(s) beyond it, "
        f"up to id {largest} ({beyond[largest]!r})"
    )
    if beyond.keys() <= special.keys() and source.bos_token_id not in beyond:
        note(f"{found}: a prompt with one of them cannot be answered")
        return
    raise CheckpointError(
        f"{found}: they were added without resizing the model; resize it where they were learnt, "
        f"model.resize_token_embeddings({largest + 1}), and save both again, or give the "
        "directory of the tokenizer that the model was trained with: --tokenizer"
    )


def with_known_ends(
    source: SourceCheckpoint, vocab_size: int, note: Callable[[str], None]
) -> SourceCheckpoint:
    """`source` without the ends and the beginning of a sequence that the model cannot give or read,
    each of which is noted; CheckpointError when no end is left of those it names.
    """
    known = tuple(i for i in source.eos_token_ids if 0 <= i < vocab_size)
    for token_id in source.eos_token_ids:
        if token_id in known:
            continue
        found = (
            f"{_named_in(source, 'eos_token_id', token_id)} names {token_id} as an end of "
            f"sequence, and the model has vocab_size={vocab_size}"
        )
        if not known:
            raise CheckpointError(
                f"{found}: no answer would end; write the eos_token_id there that it was trained "
                "with"
            )
        note(f"{found}: it is left out, and {', '.join(map(str, known))} end an answer")
    bos = source.bos_token_id
    if bos is not None and not 0 <= bos < vocab_size:
        note(
            f"{_named_in(source, 'bos_token_id', bos)} names {bos} as the beginning of a sequence, "
            f"and the model has vocab_size={vocab_size}: it is left out"
        )
        bos = None
    return replace(source, eos_token_ids=known, bos_token_id=bos)


def _named_in(source: SourceCheckpoint, key: str, token_id: int) -> str:
    """The file that names a special token's id."""
    if source.kind == "gguf":
        return str(source.path)
    for path in source.files:
        if path.name == "generation_config.json" and token_id in token_ids(
            read_json(path).get(key)
        ):
            return str(path)
    if token_id in token_ids(source.config.get(key)):
        return str(source.path / "config.json")
    return "the tokenizer"


def _tokens_by_id(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """A tokenizer.json's tokens that ordinary text can become, and its special ones; of a file
    that is no tokenizer, what there is of them.
    """
    try:
        data = read_json(path)
        model = data.get("model") or {}
        vocab, added = model.get("vocab") or {}, data.get("added_tokens") or []
        if isinstance(vocab, list):  # of Unigram: [text, score], its id is its place
            ordinary = {i: str(item[0]) for i, item in enumerate(vocab)}
        else:
            ordinary = {int(i): str(text) for text, i in vocab.items()}
        named = [(int(token["id"]), str(token["content"]), token.get("special")) for token in added]
    except (CheckpointError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        return {}, {}
    ordinary |= {i: text for i, text, special in named if not special}
    special = {i: text for i, text, special in named if special}
    return {i: text for i, text in ordinary.items() if i not in special}, special


def token_ids(value: Any) -> list[int]:
    """An `eos_token_id` as it stands in JSON (absent, a number or a list) as a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def end_of_turn_tokens(chat_template: str | None) -> list[str]:
    """The end-of-turn tokens that a chat template writes."""
    return [token for token in END_OF_TURN_TOKENS if chat_template and token in chat_template]


def _chat_templates(path: Path) -> dict[str, str]:
    """A directory's templates by their names, of which `default` is for plain chat.

    As in transformers: chat_template.jinja and the folder beside it come before what
    tokenizer_config.json has; a processor's is taken where there is no other.
    """
    named = _named_templates(path / "tokenizer_config.json")
    named |= {file.stem: _text(file) for file in (path / TEMPLATE_FOLDER).glob("*.jinja")}
    if (path / "chat_template.jinja").exists():
        named["default"] = _text(path / "chat_template.jinja")
    named = named or _named_templates(path / "chat_template.json")
    return {"default": next(iter(named.values())), **named} if named else {}


def _named_templates(path: Path) -> dict[str, str]:
    """A JSON file's `chat_template`: a string, or a list of them with names."""
    found = read_json(path).get("chat_template") if path.exists() else None
    items = found if isinstance(found, list) else [{"name": "default", "template": found}]
    pairs = [(item.get("name"), item.get("template")) for item in items if isinstance(item, dict)]
    return {str(name): text for name, text in pairs if isinstance(text, str)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None


def special_token_ids(path: Path, config: dict[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """All ids that end a sequence, in order of authority, and the id that begins one."""
    refuse_pointers(path / name for name in TOKENIZER_FILES)
    generation, tokenizer_config = (
        read_json(path / name) if (path / name).exists() else {}
        for name in ("generation_config.json", "tokenizer_config.json")
    )
    eos = token_ids(generation.get("eos_token_id")) + token_ids(config.get("eos_token_id"))
    bos = token_ids(config.get("bos_token_id")) + token_ids(generation.get("bos_token_id"))

    words = [_token_text(tokenizer_config.get("eos_token"))]
    words += end_of_turn_tokens(_chat_templates(path).get("default"))
    bos_word = _token_text(tokenizer_config.get("bos_token"))
    ids = _added_token_ids(path, tokenizer_config)
    eos += [ids[word] for word in words if word in ids]
    bos += [ids[bos_word]] if bos_word in ids else []
    return tuple(dict.fromkeys(eos)), (bos[0] if bos else None)


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _added_token_ids(path: Path, tokenizer_config: dict[str, Any]) -> dict[str | None, int]:
    decoder = tokenizer_config.get("added_tokens_decoder")
    name, key = "tokenizer_config.json", "added_tokens_decoder"
    try:
        if isinstance(decoder, dict):
            return {_token_text(token): int(number) for number, token in decoder.items()}
        name, key = "tokenizer.json", "added_tokens"
        added = (read_json(path / name).get(key) or []) if (path / name).exists() else []
        return {str(token["content"]): int(token["id"]) for token in added}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path / name} has {key} that are no tokens with their ids; download the file again"
        ) from None


def copy_tokenizer(path: Path, dest: Path) -> list[str]:
    """Copy a directory's files, with every template where a server finds it: the default one in
    chat_template.jinja, those of a folder in tokenizer_config.json. Returns the names.
    """
    if not (path / "tokenizer.json").exists():
        raise _no_tokenizer(path, "safetensors")
    names = [name for name in TOKENIZER_FILES if (path / name).exists()]
    for name in names:
        shutil.copyfile(path / name, dest / name)
    templates, made = _chat_templates(path), {}
    if "default" in templates and "chat_template.jinja" not in names:
        made["chat_template.jinja"] = templates["default"]
    if any((path / TEMPLATE_FOLDER).glob("*.jinja")):
        config = path / "tokenizer_config.json"
        data = read_json(config) if config.exists() else {}
        data["chat_template"] = [{"name": k, "template": text} for k, text in templates.items()]
        made["tokenizer_config.json"] = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    for name, text in made.items():
        (dest / name).write_text(text, encoding="utf-8")
    return [*names, *(name for name in made if name not in names)]
