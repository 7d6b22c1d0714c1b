"""A .gguf file of each family gives back its checkpoint; transformers reads the same from it."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from enginehouse.build.families.hf_config import model_config
from enginehouse.build.families.shapes import check_tensors
from enginehouse.build.gguf.checkpoint import open_gguf
from enginehouse.build.gguf.families import FAMILIES, NAMES
from makers.engines import SourceMaker
from makers.gguf_writer import write_gguf

MADE_OF = {"granite": "granite", "qwen2": "qwen2-tied", "qwen3": "qwen3"}
READ_BY_TRANSFORMERS = ("qwen2", "qwen3")


@pytest.mark.parametrize(("family", "made_of"), MADE_OF.items())
def test_a_familys_file_gives_back_its_checkpoint(
    family: str, made_of: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    original = family_source(made_of)
    found = open_gguf(write_gguf(tmp_path / "x.gguf", original, family=family))
    wanted = model_config(original.config, "auto")
    assert model_config(found.config, "auto") == wanted
    check_tensors(found.tensors, wanted)
    assert set(found.tensors.infos) == set(original.tensors.infos)
    for name in found.tensors.infos:
        assert torch.equal(found.tensors.read(name), original.tensors.read(name).float()), name


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same(
    family: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    original = family_source(MADE_OF[family])
    path = write_gguf(tmp_path / "x.gguf", original, family=family)
    found = open_gguf(path)
    config = AutoConfig.from_pretrained(original.path)  # of the file it reads no head size
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config, dtype=torch.float32
    )
    state = model.state_dict()
    for name in found.tensors.infos:
        assert torch.equal(found.tensors.read(name), state[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_called_as_llama_cpp_calls_them(family: str) -> None:
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family]
    names = gguf.get_tensor_name_map(arch, 2)
    for short, module in {**NAMES, **FAMILIES[family].names}.items():
        is_of_layer = module.startswith(("self_attn", "mlp", "input", "post"))
        place = (f"blk.1.{short}", f"model.layers.1.{module}")
        wanted, full = place if is_of_layer else (short, module)
        assert names.get_name(full) == wanted
