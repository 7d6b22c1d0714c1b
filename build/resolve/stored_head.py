"""A head of its own beside `tie_word_embeddings: true`: it is kept where it differs.

Who trains a tied model without tying stores a head that config.json says is the embedding. It is
another model's without it. Knows no family and no file.
Source: transformers 5, `tie_weights` (stored weights that differ are not tied); vLLM.
"""

from __future__ import annotations

from dataclasses import replace

from enginehouse.build.families.rows import EMBEDDING, LM_HEAD
from enginehouse.build.hf_keys.config_values import boolean
from enginehouse.build.hf_keys.family_keys import DEFAULTS
from enginehouse.build.source import SourceCheckpoint, TensorSource

_ROWS_AT_ONCE = 4096
_SAMPLES, _SAMPLE_ROWS = 8, 4  # of tensors that are on a hub yet


def with_stored_head(source: SourceCheckpoint) -> SourceCheckpoint:
    """`source`, untied and saying so where its head is not its embedding; else itself.

    Both are read where both are stored and config.json ties them, up to where they differ: a few
    rows of them where the files are not here yet.
    """
    families = source.config.get("architectures") or [None]
    defaults = DEFAULTS.get(str(families[0]), {}) if isinstance(families, list) else {}
    if not source.has_weights or not boolean({**defaults, **source.config}, "tie_word_embeddings"):
        return source
    if not _differs(source.tensors, whole=all(path.exists() for path in source.files)):
        return source
    remark = (
        f"config.json ties the head to the embedding, but {LM_HEAD} is stored and differs from it: "
        "the stored head is kept"
    )
    config = {**source.config, "tie_word_embeddings": False}
    return replace(source, config=config, remarks=(*source.remarks, remark))


def _differs(tensors: TensorSource, *, whole: bool) -> bool:
    infos = tensors.infos
    if LM_HEAD not in infos:
        return any(name.startswith("lm_head.") for name in infos)  # quantised by itself
    if EMBEDDING not in infos or infos[LM_HEAD].shape != infos[EMBEDDING].shape:
        return True
    count = infos[LM_HEAD].shape[0]
    step, size = _ROWS_AT_ONCE, _ROWS_AT_ONCE
    if not whole:
        step, size = -(-count // _SAMPLES), _SAMPLE_ROWS
    for start in range(0, count, step):
        rows = slice(start, min(start + size, count))
        if not tensors.read(LM_HEAD, rows).equal(tensors.read(EMBEDDING, rows)):
            return True
    return False
