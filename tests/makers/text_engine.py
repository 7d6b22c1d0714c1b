"""The text half of an engine directory, made on the spot: tiny tokenizers and a template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from enginehouse.runtime.request import EngineInfo

TEXTS = ["the quick brown fox says hello to the lazy dog", "Ça va? naïve café, 你好 世界 🙂"] * 4
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think> é", special=False)])
    return tokenizer


def tokenizer_with_marks() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in MARKS])
    tokenizer.add_special_tokens(["<think>", "</think>"])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: words begin with U+2581, bytes that are no token fall back to <0x..>."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581a", "he", "\u2581he", "ll"]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = [("\u2581", "a"), ("h", "e"), ("\u2581", "he"), ("l", "l")]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def write_text_engine(engine_dir: Path, template: str | None = CHATML) -> Tokenizer:
    engine_dir.mkdir(exist_ok=True)
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(engine_dir / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}}
    (engine_dir / "tokenizer_config.json").write_text(json.dumps(config))
    (engine_dir / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    (engine_dir / "manifest.json").write_text('{"model": {"name": "tiny/chat"}}')
    if template is not None:
        (engine_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
    return tokenizer


def engine_info(max_seq_len: int = 256) -> EngineInfo:
    return EngineInfo(
        name="tiny-int4",
        model="tiny/chat",
        quantization="W4A16_AWQ",
        backend="torch",
        tp_size=1,
        pp_size=1,
        max_seq_len=max_seq_len,
        max_batch_size=4,
        max_num_tokens=64,
        vocab_size=304,
        kv_block_size=16,
        num_kv_blocks=10,
        kv_cache_bytes=10_000,
        eos_token_ids=(1,),
        digest="0" * 64,
        created=1_700_000_000,
        embedding_size=4,
    )
