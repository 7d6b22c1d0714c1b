"""The tokenizer that goes with the weights: its files, its special tokens, its way into an engine.

Copied as they are, from beside the weights or, for sources that have none, from another directory.
This file knows no tensor.
Source: transformers' tokenizer_config.json and generation_config.json.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer

from enginehouse.build.families.config_values import read_json
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import CheckpointError
from enginehouse.runtime.template import compile_template

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
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
    eos, bos = special_token_ids(directory, read_json(beside) if beside.exists() else {})
    others = [path for path in source.files if path.name not in TOKENIZER_FILES]
    own = [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
    return replace(
        source,
        eos_token_ids=eos,
        bos_token_id=bos,
        files=(*others, *own),
        tokenizer_writer=lambda dest: copy_tokenizer(directory, dest),
    )


def check_tokenizer(source: SourceCheckpoint) -> None:
    """CheckpointError, before a weight is read, for a checkpoint folder without a tokenizer."""
    if source.kind == "tensorrt_llm":
        if not any(path.name == "tokenizer.json" for path in source.files):
            raise CheckpointError(
                f"{source.path} is a TensorRT-LLM checkpoint, which holds no tokenizer; give the "
                "model's Hugging Face directory with --tokenizer, or stop with --until convert"
            )


def check_token_ids(source: SourceCheckpoint, vocab_size: int, note: Callable[[str], None]) -> None:
    """Every token that a text can become is one that the model knows: CheckpointError, with both
    numbers, before a weight is read.

    Added tokens that only their own name gives (a padding token, one for images) are noted: such a
    model works without them. A tokenizer.json that cannot be read is `write_tokenizer`'s to judge.
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


def write_tokenizer(source: SourceCheckpoint, directory: Path) -> None:
    """Put tokenizer and chat template into the engine; first of all, as it is soon refused.

    Raises CheckpointError when there is no tokenizer or none that can be read, and for a template
    that no server could use.
    """
    source.write_tokenizer(directory)
    path = directory / "tokenizer.json"
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"tokenizer.json of {source.path} is no tokenizer: {reason}; download it again"
        ) from None
    template = directory / "chat_template.jinja"
    if template.exists():
        try:
            compile_template(template.read_text("utf-8"))
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is not valid: {error.message} (line {error.lineno}); "
                "mend chat_template.jinja or tokenizer_config.json of the checkpoint"
            ) from None


def token_ids(value: Any) -> list[int]:
    """An `eos_token_id` as it stands in JSON (absent, a number or a list) as a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def end_of_turn_tokens(chat_template: str | None) -> list[str]:
    """The end-of-turn tokens that a chat template writes."""
    return [token for token in END_OF_TURN_TOKENS if chat_template and token in chat_template]


def default_chat_template(value: Any) -> str | None:
    """The template out of tokenizer_config.json's `chat_template`: a string or a named list."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) else None


def _chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    template = path / "chat_template.jinja"
    if template.exists():
        try:
            return template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{template} is not UTF-8 text: byte {error.start} is wrong"
            ) from None
    return default_chat_template(tokenizer_config.get("chat_template"))


def special_token_ids(path: Path, config: dict[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """All ids that end a sequence, in order of authority, and the id that begins one."""
    generation, tokenizer_config = (
        read_json(path / name) if (path / name).exists() else {}
        for name in ("generation_config.json", "tokenizer_config.json")
    )
    eos = token_ids(generation.get("eos_token_id")) + token_ids(config.get("eos_token_id"))
    bos = token_ids(config.get("bos_token_id")) + token_ids(generation.get("bos_token_id"))

    words = [_token_text(tokenizer_config.get("eos_token"))]
    words += end_of_turn_tokens(_chat_template(path, tokenizer_config))
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
    if not (path / "tokenizer.json").exists():
        raise CheckpointError(
            f"{path} has no tokenizer.json; make one with: python -c "
            '"from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{path}').save_pretrained('{path}')\""
        )
    names = [name for name in TOKENIZER_FILES if (path / name).exists()]
    for name in names:
        shutil.copyfile(path / name, dest / name)
    if "chat_template.jinja" not in names and "tokenizer_config.json" in names:
        template = _chat_template(path, read_json(path / "tokenizer_config.json"))
        if template is not None:
            (dest / "chat_template.jinja").write_text(template, encoding="utf-8")
            names.append("chat_template.jinja")
    return names
