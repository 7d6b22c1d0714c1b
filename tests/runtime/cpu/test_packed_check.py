"""Packed weights that say what the model beside them does not are refused before they are used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enginehouse.runtime.cpu.packed_check import check_packed
from enginehouse.runtime.cpu.packed_file import PACKED, Mixture, PackedFile
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.errors import EngineError
from makers.engines import EngineMaker, SourceMaker, build_engine

Header = dict[str, Any]
Network = dict[str, Any]
Folders = Callable[[str], Path]


@pytest.fixture
def folder(make_engine: EngineMaker, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_engine(quant="int8", backend="cpu"), tmp_path / "engine"))


@pytest.fixture(scope="module")
def with_latents(family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    choices = {"quant": "none", "backend": "cpu", "until": "compile"}
    return build_engine(family_source("youtu"), tmp_path_factory.mktemp("e") / "youtu", **choices)


@pytest.fixture(scope="module")
def with_own_layers(
    family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory
) -> Folders:
    """Of a family, by its name."""
    choices = {"quant": "none", "backend": "cpu", "until": "compile"}
    made = {
        name: build_engine(family_source(name), tmp_path_factory.mktemp("e") / name, **choices)
        for name in ("gemma4-small", "gemma4-moe", "gemma3n")
    }
    return made.__getitem__


@pytest.fixture
def latent_folder(with_latents: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_latents, tmp_path / "engine"))


def check(folder: Path) -> None:
    check_packed(PackedFile(folder / PACKED), read_config(folder))


def rewrite(folder: Path, change: Callable[[Header, Network], object]) -> None:
    """The header with a change, in the room that it has."""
    content = (folder / PACKED).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    network = json.loads(header["__metadata__"]["network"])
    change(header, network)
    header["__metadata__"]["network"] = json.dumps(network)
    text = json.dumps(header).encode()
    assert len(text) <= size, "the header has room"
    (folder / PACKED).write_bytes(content[:8] + text.ljust(size) + content[8 + size :])


def offsets(header: Header, name: str, begin: int, end: int) -> None:
    header[name]["data_offsets"] = [begin, end]


MIXTURE = (64, 4, 2, True, False, 1, 1, 1, 1.0, False, 0.0)
LIES: dict[str, tuple[Callable[[Header, Network], object], str]] = {
    "a larger vocabulary": (lambda h, n: n.update(vocab=n["vocab"] * 2), "vocab="),
    "more layers": (lambda h, n: n.update(layers=n["layers"] + 1), "layers="),
    "larger heads": (lambda h, n: n["of_layers"][1].update(head_size=64), "layer 1=LayerShape"),
    "more KV heads": (lambda h, n: n["of_layers"][0].update(kv_heads=8), "layer 0=LayerShape"),
    "another place": (lambda h, n: n["of_layers"][1].update(place=2), "layer 1=LayerShape"),
    "a layer less": (lambda h, n: n["of_layers"].pop(), "of_layers=1; wanted 2"),
    "fewer rules": (lambda h, n: n["rules"].pop(), "rules=1; wanted 2"),
    "a window below 0": (lambda h, n: n["rules"][0].update(window=-1), "kept and windows"),
    "another table of rope": (lambda h, n: n["rules"][0].update(rope=7), "ropes of layers"),
    "another activation": (lambda h, n: n.update(activation="relu2"), "activation='relu2'; wanted"),
    "another kind of norm": (lambda h, n: n.update(layer_norm=True), "layer_norm=True; wanted"),
    "a norm less": (lambda h, n: h.pop("1.input_norm"), "holds 0 bytes of 1.input_norm"),
    "fewer frequencies": (lambda h, n: n["ropes"][0]["inverse"].pop(), "frequencies="),
    "experts": (
        lambda h, n: n.update(mixture=dict(zip(Mixture.__struct_fields__, MIXTURE, strict=True))),
        "mixture=Mixture.*; wanted None",
    ),
    "no linear": (lambda h, n: n["linears"].pop("1.dense"), "holds no linear 1.dense"),
    "more outputs": (lambda h, n: n["linears"]["0.qkv"].update(out=4096), "0.qkv's outputs=4096"),
    "a group of nothing": (lambda h, n: n["linears"]["0.proj"].update(group=7), "no form of a lin"),
    "wider weights": (
        lambda h, n: n["linears"]["0.dense"].update(form="bf16", group=0, input="bf16"),
        "0.dense as bf16",
    ),
    "a form nobody knows": (lambda h, n: n["linears"]["0.qkv"].update(form="int2"), "no form of"),
    "a tensor cut": (lambda h, n: offsets(h, "0.qkv.weight", 0, 64), "holds 64 bytes of 0.qkv.w"),
    "no tensor": (lambda h, n: h.pop("final_norm"), "holds 0 bytes of final_norm"),
    "a tensor beyond the end": (lambda h, n: offsets(h, "embedding", 0, 2**60), "build it again"),
    "a tensor before the beginning": (
        lambda h, n: offsets(h, "embedding", -64, 64),
        "is no file of packed weights: a tensor ends before it begins",
    ),
}


LATENT_LIES: dict[str, tuple[Callable[[Header, Network], object], str]] = {
    "another rank": (lambda h, n: n.update(latent_rank=32), "latent_rank=32; wanted 48"),
    "none": (lambda h, n: n.update(latent_rank=0), "latent_rank=0; wanted 48"),
    "queries that are not compressed": (lambda h, n: n.update(query_rank=0), "query_rank=0; wan"),
    "wider values": (lambda h, n: n.update(value=64), "value=64; wanted 32"),
    "no norm of latents": (lambda h, n: h.pop("0.attention.kv_a_norm"), "0 bytes of 0.attention.k"),
    "no norm of queries": (lambda h, n: h.pop("1.attention.q_a_norm"), "0 bytes of 1.attention.q_"),
    "no latents": (lambda h, n: n["linears"].pop("0.kv_a"), "holds no linear 0.kv_a"),
    "no queries": (lambda h, n: n["linears"].pop("0.q_a"), "holds no linear 0.q_a"),
    "more outputs": (lambda h, n: n["linears"]["1.q"].update(out=4096), "1.q's outputs=4096"),
    "a head less": (lambda h, n: offsets(h, "0.of_keys.weight", 0, 64), "holds 64 bytes of 0.of_k"),
    "quantised values": (
        lambda h, n: n["linears"]["0.of_values"].update(form="e4m3", group=64, input="e4m3"),
        "0.of_values as e4m3",
    ),
}


@pytest.mark.parametrize("lie", LATENT_LIES)
def test_what_the_file_says_otherwise_of_latents_is_refused(latent_folder: Path, lie: str) -> None:
    check(latent_folder)
    change, wanted = LATENT_LIES[lie]
    rewrite(latent_folder, change)
    with pytest.raises(EngineError, match=wanted):
        check(latent_folder)


OWN_LIES: dict[str, tuple[str, Callable[[Header, Network], object], str]] = {
    "another source": ("gemma4-small", lambda h, n: n["of_layers"][3].update(place=2), "layer 3="),
    "no queries": ("gemma4-small", lambda h, n: n["linears"].pop("3.q"), "no linear 3.q"),
    "no multiplier": ("gemma4-small", lambda h, n: h.pop("4.multiplier"), "0 bytes of 4.multip"),
    "no table": ("gemma4-small", lambda h, n: h.pop("inputs_table"), "0 bytes of inputs_table"),
    "more tokens": ("gemma4-small", lambda h, n: n.update(inputs_vocab=9999), "inputs_vocab=9999"),
    "no gate": (
        "gemma4-small",
        lambda h, n: n["linears"].pop("1.input_gate"),
        "no linear 1.input_",
    ),
    "no norm of experts": (
        "gemma4-moe",
        lambda h, n: h.pop("1.pre_experts_norm"),
        "0 bytes of 1.pre_experts_norm",
    ),
    "another norm": ("gemma4-moe", lambda h, n: n.update(norm_experts=False), "norm_experts=False"),
    "fewer frequencies": ("gemma4-moe", lambda h, n: n["ropes"][1]["inverse"].pop(), "frequencie"),
    "more streams": ("gemma3n", lambda h, n: n.update(streams=5), "streams=5; wanted 4"),
    "no router": ("gemma3n", lambda h, n: h.pop("2.stream_router"), "0 bytes of 2.stream_router"),
    "no opening": (
        "gemma3n",
        lambda h, n: n["linears"].pop("stream_openings"),
        "linear stream_",
    ),
    "another cutoff": ("gemma3n", lambda h, n: n["of_layers"][0].update(cutoff=None), "layer 0="),
    "no gate apart": ("gemma3n", lambda h, n: n["linears"].pop("0.gate"), "0.fc_gate's outputs=2"),
    "a higher rank": ("gemma3n", lambda h, n: n.update(low_rank=64), "low_rank=64; wanted 16"),
}


@pytest.mark.parametrize("lie", OWN_LIES)
def test_what_the_file_says_otherwise_of_layers_is_refused(
    with_own_layers: Folders, tmp_path: Path, lie: str
) -> None:
    name, change, wanted = OWN_LIES[lie]
    folder = Path(shutil.copytree(with_own_layers(name), tmp_path / "engine"))
    check(folder)
    rewrite(folder, change)
    with pytest.raises(EngineError, match=wanted):
        check(folder)


@pytest.mark.parametrize(
    ("source", "wanted"), [(2, r"layer 3's heads=\(32, 2\); wanted \(64, 2\)"), (4, "3's source")]
)
def test_keys_are_read_of_an_earlier_layer_of_the_same_heads(
    with_own_layers: Folders, tmp_path: Path, source: int, wanted: str
) -> None:
    """As config.json itself names it: 1 of the fourth layer's kind, 2 of another."""
    folder = Path(shutil.copytree(with_own_layers("gemma4-small"), tmp_path / "engine"))
    text = (folder / "config.json").read_text()
    told = json.loads(text)
    assert told["kv_source_layers"] == [0, 1, 2, 1, 1, 2]
    told["kv_source_layers"][3] = source
    (folder / "config.json").write_text(json.dumps(told))
    rewrite(folder, lambda h, n: n["of_layers"][3].update(place=min(source, 3)))
    with pytest.raises(EngineError, match=wanted):
        check(folder)


def test_sizes_of_latents_that_do_not_fit_each_other_are_refused(latent_folder: Path) -> None:
    """As they stand in config.json itself."""
    config = latent_folder / "config.json"
    config.write_text(config.read_text().replace('"head_size": 64', '"head_size": 80'))
    rewrite(latent_folder, lambda h, n: [of.update(head_size=80) for of in n["of_layers"]])
    with pytest.raises(EngineError, match="head_size=80; wanted 64"):
        check(latent_folder)


@pytest.mark.parametrize("lie", LIES)
def test_what_the_file_says_otherwise_than_the_model_is_refused(folder: Path, lie: str) -> None:
    check(folder)
    change, wanted = LIES[lie]
    rewrite(folder, change)
    with pytest.raises(EngineError, match=wanted):
        check(folder)


def test_a_header_longer_than_its_file_is_not_read(folder: Path) -> None:
    content = (folder / PACKED).read_bytes()
    (folder / PACKED).write_bytes((2**60).to_bytes(8, "little") + content[8:])
    with pytest.raises(EngineError, match="a header of 1152921504606846976 bytes in a file of"):
        PackedFile(folder / PACKED)
