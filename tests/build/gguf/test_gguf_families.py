"""A .gguf file of each family gives back its checkpoint; transformers reads the same from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from enginehouse.build.families.shapes import check_tensors
from enginehouse.build.gguf.checkpoint import open_gguf
from enginehouse.build.gguf.families import FAMILIES, NAMES
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import CheckpointError
from makers.family_models import save_family
from makers.gguf_writer import write_gguf

WINDOWED = ["sliding_attention"] * 5 + ["full_attention"]
# general.architecture: a tiny model of makers.family_models, and what of it a file can say.
MADE_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", {}),
    "qwen2": ("qwen2-tied", {}),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3-moe", {}),
    "llama": ("mixtral", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", dict(query_pre_attn_scalar=32)),
    "gemma3": (
        "gemma3",
        dict(query_pre_attn_scalar=32, num_hidden_layers=6, layer_types=WINDOWED),
    ),
    "phi3": ("phi3", {}),
    "gpt-oss": ("gpt-oss", dict(swiglu_limit=7.0)),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=4, num_hidden_layers=4)),
    "olmo2": ("olmo2", {}),
    "exaone4": ("exaone4", {}),
    "starcoder2": ("starcoder2", dict(sliding_window=None)),
    "stablelm": ("stablelm", {}),
    "command-r": ("cohere", {}),
    "cohere2": (
        "cohere2",
        dict(num_hidden_layers=4, layer_types=WINDOWED[2:]),
    ),
}
LONGROPES = [("phi3", "phi3-longrope"), ("phi3", "phi4-mini")]
READ_BY_TRANSFORMERS = ("qwen2", "qwen3", "gemma2", "gemma3", "qwen3moe")


@pytest.fixture(scope="session")
def original_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SourceCheckpoint]:
    @cache
    def make(family: str) -> SourceCheckpoint:
        name, sizes = MADE_OF.get(family, (family, {}))
        path = tmp_path_factory.mktemp("original") / name
        save_family(name, path, **sizes)
        return resolve_source(str(path), path)

    return make


def as_stored(family: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What float32 keeps of a norm that is stored plus one."""
    is_norm = family.startswith("gemma") and name.endswith("norm.weight")
    return (tensor + 1) - 1 if is_norm else tensor


@pytest.mark.parametrize(("family", "made_of"), [*((name, name) for name in MADE_OF), *LONGROPES])
def test_a_familys_file_gives_back_its_checkpoint(
    family: str,
    made_of: str,
    original_of: Callable[[str], SourceCheckpoint],
    tmp_path: Path,
) -> None:
    original = original_of(made_of)
    found = open_gguf(write_gguf(tmp_path / "x.gguf", original, family=family))
    wanted = model_config(original.config, "auto")
    assert model_config(found.config, "auto") == wanted
    check_tensors(found.tensors, wanted)
    assert set(found.tensors.infos) == set(original.tensors.infos)
    for name, info in found.tensors.infos.items():
        tensor = as_stored(family, name, original.tensors.read(name).float())
        assert torch.equal(found.tensors.read(name), tensor), name
        assert info.shape == tuple(tensor.shape)
        assert torch.equal(found.tensors.read(name, slice(3, 9)), tensor[3:9]), name


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same(
    family: str, original_of: Callable[[str], SourceCheckpoint], tmp_path: Path
) -> None:
    original = original_of(family)
    path = write_gguf(tmp_path / "x.gguf", original, family=family)
    found = open_gguf(path)
    config = AutoConfig.from_pretrained(original.path)  # of the file it reads no head size
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config, dtype=torch.float32
    )
    state = model.state_dict()
    for name in found.tensors.infos:
        assert torch.equal(found.tensors.read(name), its_own(state, name)), name


def its_own(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """transformers 5 holds the experts of a layer in one tensor, gate above up."""
    found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if found is None:
        return state[name]
    place, number, which = found[1], int(found[2]), found[3]
    if which == "down":
        return state[f"{place}.down_proj"][number]
    gate, up = state[f"{place}.gate_up_proj"][number].chunk(2)
    return gate if which == "gate" else up


def test_what_only_some_files_say_is_read(
    original_of: Callable[[str], SourceCheckpoint], tmp_path: Path
) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window_pattern(2)
        writer.add_float32("gemma3.rope.freq_base_swa", 5000.0)

    path = write_gguf(tmp_path / "x.gguf", original_of("gemma3"), family="gemma3", edit=edit)
    config = open_gguf(path).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 3
    assert config["rope_local_base_freq"] == 5000.0
    original = original_of("phi3-longrope")

    def louder(writer: gguf.GGUFWriter) -> None:
        key = "phi3.rope.scaling.attn_factor"
        writer.kv_data[0].pop(key)
        writer.add_rope_scaling_attn_factors(1.5)

    path = write_gguf(tmp_path / "y.gguf", original, family="phi3", edit=louder)
    assert open_gguf(path).config["rope_scaling"]["attention_factor"] == 1.5


def test_of_the_large_gemmas_queries_are_scaled_by_the_hidden_size(
    original_of: Callable[[str], SourceCheckpoint], tmp_path: Path
) -> None:
    """llama.cpp knows the 27B by its layers; here only the count is theirs."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("gemma2.block_count")
        writer.kv_data[0].pop("gemma2.embedding_length")
        writer.add_block_count(46)
        writer.add_embedding_length(256)

    path = write_gguf(tmp_path / "x.gguf", original_of("gemma2"), family="gemma2", edit=edit)
    config = open_gguf(path).config
    assert (config["head_dim"], config["query_pre_attn_scalar"]) == (32, 256 // 4)


def test_half_a_longrope_is_refused(
    original_of: Callable[[str], SourceCheckpoint], tmp_path: Path
) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.tensors[0].pop("rope_factors_short.weight")

    path = write_gguf(tmp_path / "x.gguf", original_of("phi4-mini"), family="phi3", edit=edit)
    with pytest.raises(CheckpointError, match="wanted rope_factors_long.weight and rope_factors_s"):
        open_gguf(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_called_as_llama_cpp_calls_them(family: str) -> None:
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family]
    names = gguf.get_tensor_name_map(arch, 2)
    own = {gguf.TENSOR_NAMES[kind].rpartition(".")[2] for kind in gguf.MODEL_TENSORS[arch]}
    known = {**NAMES, **FAMILIES[family].names}
    joined = {x.rpartition(".")[0] for each in FAMILIES[family].joined.values() for x in each.names}
    assert own - known.keys() - NOT_READ <= set(FAMILIES[family].experts) | joined
    for short, module in known.items():
        if short in own:
            is_of_layer = not module.startswith(("model.", "lm_head"))
            place = (f"blk.1.{short}", f"model.layers.1.{module}")
            wanted, full = place if is_of_layer else (short, module)
            assert names.get_name(full) == wanted


# Of rope, of llama's mixtures, and of Phi-3 and Command R+ as nobody released them here.
NOT_READ = {"rope_freqs", "attn_rot_embd", "rope_factors_long", "rope_factors_short"}
NOT_READ |= {"ffn_gate_inp", "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"}
NOT_READ |= {"attn_q_norm", "attn_k_norm", "ffn_exp_probs_b"}  # of StableLM 12B too


def test_what_the_converter_says_of_a_stablelm_that_says_nothing_is_passed_over(
    original_of: Callable[[str], SourceCheckpoint], tmp_path: Path
) -> None:
    """Sublayers are parallel where no norm stands before the MLP, whatever the key says."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("stablelm.use_parallel_residual")
        writer.add_parallel_residual(True)

    original = original_of("stablelm")
    found = open_gguf(write_gguf(tmp_path / "x.gguf", original, family="stablelm", edit=edit))
    assert set(found.tensors.infos) == set(original.tensors.infos)

    def parallel(writer: gguf.GGUFWriter) -> None:
        for name in [name for name in writer.tensors[0] if ".ffn_norm." in name]:
            writer.tensors[0].pop(name)

    found = open_gguf(write_gguf(tmp_path / "y.gguf", original, family="stablelm", edit=parallel))
    with pytest.raises(CheckpointError, match="post_attention_layernorm"):
        check_tensors(found.tensors, model_config(found.config, "auto"))
