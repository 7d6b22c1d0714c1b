"""A mixture's experts under every name they are met with, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.sources.expert_names import Part, table_parts
from makers.engines import build_engine
from makers.family_models import load_family, logits_of, save_family
from makers.quantized_writers import Written, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = list(range(40, 75))
WORDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
EXPERTS, LAYERS = 4, 2


def block(old: str, new: str) -> Callable[[Written], None]:
    def edit(tensors: Written) -> None:
        for name in [name for name in tensors if f".{old}." in name]:
            tensors[name.replace(f".{old}.", f".{new}.")] = tensors.pop(name)

    return edit


def words(there: dict[str, str]) -> Callable[[Written], None]:
    def edit(tensors: Written) -> None:
        for old, new in there.items():
            block(old, new)(tensors)

    return edit


def stack(own: str, gate: str, up: str, down: str, to: str = "mlp") -> Callable[[Written], None]:
    """As transformers 5 holds them in memory, and writes them when asked for its own format."""

    def edit(tensors: Written) -> None:
        for layer in range(LAYERS):
            home = f"model.layers.{layer}.{own}"

            def taken(word: str, expert: int, home: str = home) -> torch.Tensor:
                return tensors.pop(f"{home}.experts.{expert}.{word}.weight")

            both = [torch.cat([taken(gate, e), taken(up, e)]) for e in range(EXPERTS)]
            tensors[f"{home}.experts.gate_up_proj"] = torch.stack(both)
            tensors[f"{home}.experts.down_proj"] = torch.stack(
                [taken(down, e) for e in range(EXPERTS)]
            )
        block(own, to)(tensors)

    return edit


MIXTRAL, QWEN = "block_sparse_moe", "mlp"
# The names, and whether transformers loads them.
SPELLINGS: dict[str, tuple[str, list[Callable[[Written], None]], bool]] = {
    "mixtral, stacked": ("mixtral", [stack(MIXTRAL, "w1", "w3", "w2")], True),
    "mixtral, stacked at home": ("mixtral", [stack(MIXTRAL, "w1", "w3", "w2", MIXTRAL)], True),
    "mixtral, moved": ("mixtral", [block(MIXTRAL, QWEN)], True),
    "mixtral, llm-compressor's": ("mixtral", [words(WORDS)], False),
    "mixtral, llm-compressor's, moved": ("mixtral", [words(WORDS), block(MIXTRAL, QWEN)], False),
    "phimoe, stacked": ("phimoe-tied", [stack(MIXTRAL, "w1", "w3", "w2")], True),
    "qwen3-moe, stacked": ("qwen3-moe", [stack(QWEN, *WORDS.values())], True),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_family(family, tmp_path_factory.mktemp("experts") / family)
        return made[family]

    return make


@pytest.mark.parametrize("case", SPELLINGS)
def test_logits_are_transformers_whatever_the_experts_are_called(
    case: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    family, edits, loads = SPELLINGS[case]
    path = saved(family)
    tensors = load_file(path / "model.safetensors")
    names = set(tensors)
    for edit in edits:
        edit(tensors)
    assert set(tensors) != names
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = resolve_source(str(tmp_path), tmp_path)
    assert set(source.tensors.infos) == names
    reference = ReferenceModel(model_config(source.config, "float32"), source)
    found = reference.logits(reference.hidden_states([torch.tensor(IDS)]))[0]
    truth = logits_of(load_family(tmp_path if loads else path), IDS)
    torch.testing.assert_close(found, truth, atol=2e-4, rtol=2e-4)


def test_rows_of_a_stacks_expert_are_its_own(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """In bfloat16, whose elements are of two bytes."""
    path = saved("mixtral")
    tensors = {k: t.bfloat16() for k, t in load_file(path / "model.safetensors").items()}
    wanted = dict(tensors)
    stack(MIXTRAL, "w1", "w3", "w2")(tensors)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    source = resolve_source(str(tmp_path), tmp_path).tensors
    for name, tensor in wanted.items():
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, slice(3, 9)), tensor[3:9])


def test_quantised_experts_are_found_under_llm_compressors_names(tmp_path: Path) -> None:
    engines = []
    for number, edits in enumerate(([], [words(WORDS), block(MIXTRAL, QWEN)])):

        def edit(tensors: Written, edits: list[Callable[[Written], None]] = edits) -> None:
            for one in edits:
                one(tensors)

        kind, folder = "compressed-tensors fp8 static", tmp_path / str(number)
        path = write_quantized(kind, folder / "in", edit, family="mixtral").quantized
        source = resolve_source(str(path), path)
        engines.append(build_engine(source, folder / "e", until="convert"))
    first, second = (json.loads((path / "config.json").read_text()) for path in engines)
    assert first == second
    first, second = (load_file(path / "rank0.safetensors") for path in engines)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k].view(torch.uint8), second[k].view(torch.uint8)) for k in first)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("LlamaForCausalLM", "model.layers.0.mlp.gate_proj.weight", (4, 4)),
        ("MixtralForCausalLM", "model.embed_tokens.weight", (4, 4)),
        ("Qwen3MoeForCausalLM", "model.layers.0.mlp.experts.gate_up_proj", (4, 3, 4)),
        ("Qwen3MoeForCausalLM", "model.layers.0.mlp.experts.gate_up_proj", (4, 4)),
    ],
)
def test_other_tensors_keep_their_names(family: str, name: str, shape: tuple[int, ...]) -> None:
    assert table_parts(family, name, shape) == [Part(name, 0, shape)]
