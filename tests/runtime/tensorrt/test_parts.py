"""Engines whose plans are cut into parts, or hold the weights, on the doubles: the torch backend's
tokens, each file loaded once, one scratch memory for all that runs one after another.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from doubles import recording_network
from doubles.tensorrt_double import Context
from doubles.tensorrt_machine import (
    PROMPTS,
    RUNTIME,
    doubled_engine,
    doubled_machine,
    greedy,
    requests,
    torch_answers,
)
from enginehouse.build.plan.footprint import kv_bytes_per_token
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.config import Mapping
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import generate
from enginehouse.runtime.tensorrt.manifest import rank_files, read_built
from enginehouse.runtime.torch import linear
from makers.family_models import save_family

pytestmark = pytest.mark.usefixtures("one_thread")
LOCAL = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
# family, layers, what differs from the family, and how the engine is built
CUT: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("llama", 5, {}, dict(quant="none", plan_layers=2)),
    ("llama", 3, {}, dict(quant="int4", plan_layers=1, tp=2)),
    ("gemma2", 3, {}, dict(quant="fp8", plan_layers=2)),
    ("gemma3", 3, LOCAL, dict(quant="none", plan_layers=1, tp=2)),
    ("qwen2", 3, {}, dict(quant="int4", plan_layers=2, tp=2)),
    ("phi3", 3, {}, dict(quant="none", plan_layers=1)),
    ("smollm3", 3, {}, dict(quant="none", plan_layers=1)),
    ("llama4", 2, {}, dict(quant="fp8", plan_layers=1, tp=2)),
    ("deepseek-v3", 2, {}, dict(quant="none", plan_layers=1, tp=2)),
    # A layer without attention, one without an MLP, and one with neither, of three caches less.
    ("nemotron-nas", 4, {}, dict(quant="int4", plan_layers=1, tp=2)),
]
BAKED: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("llama", 2, {}, dict(quant="int4", bake_weights=True, tp=2)),
    ("gemma3", 3, LOCAL, dict(quant="none", bake_weights=True, tp=2, plan_layers=2)),
    ("olmoe", 2, {}, dict(quant="none", bake_weights=True, tp=2)),
]


def cut_engine(
    path: Path, family: str, layers: int, sizes: dict[str, Any], settings: dict[str, Any]
) -> Path:
    """An engine for contexts of 64, 128 and 192, of so many layers."""
    source = save_family(family, path / "source", num_hidden_layers=layers, **sizes)
    return doubled_engine(open_checkpoint(source), path / "e", max_seq_len=192, **settings)


@pytest.mark.parametrize(("family", "layers", "sizes", "settings"), [*CUT, *BAKED])
def test_greedy_tokens_equal_the_torch_backends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    layers: int,
    sizes: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Ragged prompts in chunks, in flight together, in three classes of contexts. Weights that
    are in the plans are not read. A token's caches are what the plan's page counts.
    """
    path = cut_engine(tmp_path, family, layers, sizes, settings)
    work = requests(PROMPTS, greedy(8))
    wanted = torch_answers(path, work)
    if "bake_weights" in settings:
        monkeypatch.setattr(f"{RUNTIME}.tensorrt.inputs.safe_open", None)
    with doubled_machine(monkeypatch, settings.get("tp", 1)):
        executor = open_executor(path)
        found = generate(executor, work)
        rank = executor.runner._rank  # type: ignore[attr-defined]
        kept = sum(cache[0, :, 0].nbytes for cache in rank.plans[0].caches.values())
        executor.close()
    assert found == wanted
    assert kept == rank.row_bytes() == kv_bytes_per_token(read_engine(path).config, 1)


@pytest.mark.parametrize("quant", ["fp8", "fp8_rowwise"])
def test_fp8_tokens_differ_only_where_a_value_is_on_an_edge_of_e4m3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    """Of fp8 in the second prompt an input of the first layer's attention.dense is 1.937503 in one
    and 1.937496 in the other, where e4m3 has 1.875 and 2: one cast, after which all differs. With
    every edge a 30000th further down, on both sides, the tokens are equal.
    """
    settings = dict(quant=quant, plan_layers=1)
    path = cut_engine(tmp_path, "phi3", 3, {}, settings)
    work = requests(PROMPTS, greedy(8))
    for module in (linear, recording_network):
        name = "to_fp8" if module is linear else "to_e4m3"
        rounded = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, to=rounded: to(x * (1 + 1 / 30000)))
    wanted = torch_answers(path, work)
    with doubled_machine(monkeypatch):
        executor = open_executor(path)
        found = generate(executor, work)
        executor.close()
    assert found == wanted


def test_parts_run_as_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights in them: each rank's process loads its own, and keeps its own kernels."""
    settings = dict(quant="none", plan_layers=1, bake_weights=True, tp=2, sm="89")
    path = cut_engine(tmp_path, "qwen2", 2, {}, settings)
    work = requests(PROMPTS[:3], greedy(6))
    wanted = torch_answers(path, work)
    with doubled_machine(monkeypatch, 2, processes=True):
        executor = open_executor(path)
        assert generate(executor, work) == wanted
        executor.close()
    files = {name for name in read_engine(path).manifest.files if name.endswith(".plan")}
    assert len(list(path.with_name("e.kernels").iterdir())) == len(files) == 2 * (2 + 3 * 2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers in parts of two: an embedding, two stretches alike, one layer, a head."""
    path = tmp_path_factory.mktemp("parts")
    return cut_engine(path, "llama", 5, {}, dict(quant="none", plan_layers=2))


def test_a_file_is_loaded_once_and_its_parts_run_in_turn(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class has embedding, 2 + 2 + 1 layers and head; the two twos are one file, and embedding
    and head those of every class whose chunk is the same.
    """
    read = read_engine(engine)
    plans = read_built(read).plans
    assert [len(plan.parts) for plan in plans] == [5, 5, 5]
    assert len(rank_files(plans, 0)) == 2 + 3 * 2
    with doubled_machine(monkeypatch) as trt:
        executor = open_executor(engine)
        engines = {id(context.engine): context.engine for context in trt.contexts}
        assert len(engines) == 2 + 3 * 2
        assert len(trt.contexts) == 3 * 5 * 2, "each part decodes and prefills"
        needed = max(engine.device_memory_size_v2 for engine in engines.values())
        scratch = {(c.scratch.address, c.scratch.size) for c in trt.contexts if c.scratch}
        assert [size for _, size in scratch] == [needed]
        trt.executions.clear()
        generate(executor, requests([[5, 6, 7]], greedy(2)))
        executor.close()
    layers = [(said.part.embeds, said.part.num_layers, said.part.heads) for said in trt.executions]
    step = [(True, 0, False), *((False, count, False) for count in (2, 2, 1)), (False, 0, True)]
    assert layers == 2 * step
    folder = engine.with_name("e.kernels")
    assert len(list(folder.iterdir())) == len(engines), "each file has kernels of its own"


def test_scratch_counts_as_memory_that_slots_cannot_have(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken before the rank says what is free."""
    order: list[str] = []
    real = torch.empty

    def empty(*sizes: Any, **options: Any) -> Any:
        if options.get("dtype") == torch.uint8:
            order.append("scratch")
        return real(*sizes, **options)

    with doubled_machine(monkeypatch):
        free = torch.cuda.mem_get_info
        asked = lambda device: order.append("free") or free(device)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
        monkeypatch.setattr(torch, "empty", empty)
        open_executor(engine).close()
    assert order == ["scratch", "free"]


@pytest.mark.parametrize("refuses", [False, True])
def test_a_part_that_is_refused_names_its_file_and_ends_what_ranks_do_together(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    """Nothing is told to the others then, and no kernels are kept: one might wait for another."""
    path = tmp_path / "e"
    shutil.copytree(engine, path)
    with doubled_machine(monkeypatch) as trt:
        executor = open_executor(path)
        if refuses:
            for context in trt.contexts:
                if context.engine.part.first_layer == 4:
                    monkeypatch.setattr(context, "execute_async_v3", lambda stream: False)
            executor.submit(requests([[5, 6, 7]], greedy(9))[0])
            with pytest.raises(EngineError, match="cannot run .*/layers-4-4-64.plan: it gave no"):
                executor.poll()
        executor.close()
    assert path.with_name("e.kernels").exists() == (not refuses)


def running(executor: Any, contexts: list[Context]) -> tuple[Context, SimpleNamespace]:
    """A decoding context of two layers after a step, and the rank that it is of."""
    generate(executor, requests([[5, 6, 7]], greedy(2)))
    found = next(c for c in contexts if c.profile == 0 and c.engine.part.num_layers and c.shapes)
    return found, executor.runner._rank


def test_the_double_refuses_what_parts_must_not_do(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with doubled_machine(monkeypatch) as trt:
        executor = open_executor(engine)
        context, rank = running(executor, trt.contexts)
        kept = dict(context.addresses)
        context.addresses["next_hidden_states"] = kept["hidden_states"]
        with pytest.raises(AssertionError, match="next_hidden_states lies over hidden_states"):
            context.execute_async_v3(context.stream)
        context.addresses = dict(kept, hidden_states=rank._scratch.data_ptr())
        with pytest.raises(AssertionError, match="lies over"):
            context.execute_async_v3(context.stream)
        context.addresses = {k: v for k, v in kept.items() if k != "hidden_states"}
        assert context.execute_async_v3(context.stream) is False
        context.addresses = kept
        trt.scratch[context.stream + 1] = context.scratch
        with pytest.raises(AssertionError, match="another stream uses the same scratch memory"):
            context.execute_async_v3(context.stream)
        trt.scratch.clear()
        with pytest.raises(AssertionError, match="too small"):
            context.set_device_memory(context.scratch.address, context.scratch.size // 9)
        assert context.execute_async_v3(context.stream)
        context.scratch = None
        assert context.execute_async_v3(context.stream) is False
        executor.close()


def test_parts_of_another_model_are_found_out_before_they_run(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of the model: the second stretch begins with layer 2."""
    with doubled_machine(monkeypatch):
        executor = open_executor(engine)
        rank = executor.runner._rank  # type: ignore[attr-defined]
        plan, weights = rank.plans[0], dict(rank._weights)
        bound = (plan.caches, rank._fed, rank._hidden, rank.logits)
        name = "transformer.layers.2.mlp.fc.weight"
        taken = weights.pop(name)
        with pytest.raises(EngineError, match=f"do not fit: {name} is in one of them only"):
            plan.bind(weights, *bound)
        with pytest.raises(EngineError, match=f"^{name} is .* wants FLOAT .*; build the engine"):
            plan.bind({**weights, name: taken[:1]}, *bound)
        weights[name] = taken
        narrow = (*bound[:2], [one[..., :-1].contiguous() for one in rank._hidden], rank.logits)
        with pytest.raises(EngineError, match="^hidden_states is .* wants FLOAT .-1, -1, 128."):
            plan.bind(weights, *narrow)
        head, plan.parts = plan.parts[-1], plan.parts[:-1]
        with pytest.raises(EngineError, match="do not fit: logits is in one of them only"):
            plan.bind(weights, *bound)
        plan.parts = [head, *plan.parts]
        with pytest.raises(EngineError, match="do not fit: hidden_states, next_hidden_states is"):
            plan.bind(weights, *bound)
        executor.close()


def lose_the_head(parts: list[Any]) -> None:
    del parts[-1]


def lose_the_embedding(parts: list[Any]) -> None:
    del parts[0]


def lose_layers(parts: list[Any]) -> None:
    del parts[2]


def exchange_layers(parts: list[Any]) -> None:
    parts[1:3] = parts[2:0:-1]


def add_layers(parts: list[Any]) -> None:
    parts[-1]["first_layer"] = 6
    parts[-2]["num_layers"] = 2


def lose_everything(parts: list[Any]) -> None:
    parts.clear()


def join_too_few(parts: list[Any]) -> None:
    parts[:] = [{**parts[0], "num_layers": 4}]


def lose_a_file(parts: list[Any]) -> None:
    parts[0]["files"] = ["embedding.plan"]


def name_two_files(parts: list[Any]) -> None:
    parts[1]["files"] *= 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lose_the_head, r"parts of the layers 0\+0, 0\+2, 2\+2, 4\+1 \(first\+number\); wanted"),
        (lose_the_embedding, r"parts of the layers 0\+2, 2\+2, 4\+1, 5\+0 \(first"),
        (lose_layers, r"parts of the layers 0\+0, 0\+2, 4\+1, 5\+0 .* all of 5 layers in turn"),
        (exchange_layers, r"parts of the layers 0\+0, 2\+2, 0\+2, 4\+1, 5\+0 "),
        (add_layers, r"parts of the layers 0\+0, 0\+2, 2\+2, 4\+2, 6\+0 "),
        (lose_everything, r"plan for 64 tokens has parts of the layers none .*: build it again$"),
        (join_too_few, r"parts of the layers 0\+4 .* or 0\+5 alone: build it again$"),
        (lose_a_file, "3 plans, of whose files 1 are not in the engine; wanted"),
        (name_two_files, "weights as inputs and 2 files for a part of its plans; wanted 1 for 1"),
    ],
)
def test_parts_that_are_no_decoder_are_refused(
    engine: Path, change: Callable[[list[Any]], None], sentence: str
) -> None:
    read = read_engine(engine)
    said = json.loads(msgspec.json.encode(read.manifest.tensorrt))
    change(said["plans"][0]["parts"])
    manifest = msgspec.structs.replace(read.manifest, tensorrt=said)
    with pytest.raises(EngineError, match=sentence) as caught:
        read_built(replace(read, manifest=manifest))
    assert "\n" not in str(caught.value)


def test_baked_plans_are_one_for_each_rank(engine: Path) -> None:
    read = read_engine(engine)
    config = read.config.with_mapping(Mapping(tp_size=2))
    said = {**(read.manifest.tensorrt or {}), "weights": "constants"}
    for weights, sentence in (("constants", "and 1 files .* wanted 2 for 2 ranks"), ("x", "'x'")):
        said = {**said, "weights": weights}
        manifest = msgspec.structs.replace(read.manifest, tensorrt=said)
        with pytest.raises(EngineError, match=sentence):
            read_built(replace(read, manifest=manifest, config=config))
