"""Linear attention: its rule over chunks against one token at a time, and states in their slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.batching.kv_room import count_blocks
from enginehouse.runtime.batching.model_runner import Capacity
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.config_parts import Delta
from enginehouse.runtime.engine import read_config, read_engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.torch.executor import TorchExecutor
from enginehouse.runtime.torch.linear_attention import DeltaRule, Past
from makers.delta_rule import by_loops
from makers.engines import build_engine
from makers.family_models import save_family

pytestmark = pytest.mark.usefixtures("one_thread")
DELTA = Delta(frozenset([0]), key_heads=2, value_heads=6, key_size=8, value_size=5, kernel=4)
GREEDY = SamplingParams(40, temperature=0.0, ignore_eos=True)
PROMPTS = [[(11 * i + 5 * j) % 500 + 3 for i in range(20 + 13 * j)] for j in range(4)]


def drawn(sequences: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the rule: mixed, decay and rate."""
    generator = torch.Generator().manual_seed(3)
    shape = (sequences, tokens, DELTA.key_heads)
    mixed = torch.randn(*shape, DELTA.mixed, generator=generator)
    decay = -torch.rand(*shape, DELTA.group, generator=generator) * 2
    return mixed, decay, torch.rand(*shape, DELTA.group, generator=generator)


@pytest.mark.parametrize("cuts", [[150], [1] * 9 + [141], [2, 63, 64, 21], [64, 1, 1, 84]])
def test_the_rule_over_chunks_is_the_rule_token_by_token(cuts: list[int]) -> None:
    weight = torch.randn(DELTA.key_heads * DELTA.mixed, DELTA.kernel) * 0.5
    rule, (mixed, decay, rate) = DeltaRule(DELTA, weight), drawn(2, sum(cuts))
    past, found, start = Past.none(DELTA, 2, torch.float32, torch.device("cpu")), [], 0
    for count in cuts:
        part = slice(start, start + count)
        out, past = rule(mixed[:, part], decay[:, part], rate[:, part], past)
        found.append(out)
        start += count
    for i in range(2):
        truth, states = by_loops(DELTA, weight, mixed[i], decay[i], rate[i])
        torch.testing.assert_close(torch.cat(found, 1)[i].double(), truth, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(past.states[i].double(), states, atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    source = open_checkpoint(save_family("qwen3.5", folder / "hf"))
    return build_engine(source, folder / "engine", dtype="float32", until="compile")


def test_what_reads_the_hidden_state_is_a_linear_in_every_form(engine: Path) -> None:
    """Loaders quantise it to INT8, and a folder of INT4 is dequantised under the source's names."""
    source = open_checkpoint(engine.with_name("hf"))
    found = {
        quant: build_engine(
            source, engine.with_name(quant), quant=quant, group_size=size, until="compile"
        )
        for quant, size in (("int8", None), ("int4", 64))
    }
    weights = CheckpointWeights(found["int8"], read_config(found["int8"]))
    own = weights("transformer.layers.0.linear_attention.")
    kinds = {name: own[f"{name}.weight"].dtype for name in ("in_qkvz", "dense", "in_ba", "conv1d")}
    assert kinds == {
        **dict.fromkeys(("in_qkvz", "dense"), torch.int8),
        **dict.fromkeys(("in_ba", "conv1d"), torch.bfloat16),
    }
    folder = resolve_source(str(found["int4"]), found["int4"]).tensors
    for word in ("in_proj_qkv", "in_proj_z", "in_proj_b", "out_proj"):
        name = f"model.layers.0.linear_attn.{word}.weight"
        truth = source.tensors.read(name)
        assert (folder.read(name).float() - truth).norm() < 0.15 * truth.norm(), word


def opened(engine: Path, **options: object) -> TorchExecutor:
    executor = open_executor(engine, ExecutorOptions(compute_dtype="float32", **options))  # type: ignore[arg-type]
    assert isinstance(executor, TorchExecutor)
    return executor


def answers(executor: TorchExecutor) -> list[list[int]]:
    found = generate(executor, [Request(i, prompt, GREEDY) for i, prompt in enumerate(PROMPTS)])
    return [found[i] for i in range(len(PROMPTS))]


def test_sequences_that_wait_and_are_preempted_answer_as_alone(engine: Path) -> None:
    """Two slots for four sequences, and blocks for hardly two: slots change hands."""
    alone = [generate(opened(engine), [Request(0, p, GREEDY)])[0] for p in PROMPTS]
    limits = dict(max_batch_size=2, max_num_tokens=16, max_seq_len=112)
    tight = opened(engine, **limits, kv_cache_gib=7 * 8192 / 2**30)
    assert tight.scheduler.memory.num_blocks < sum(len(p) + 40 for p in PROMPTS[:2]) // 16
    assert answers(tight) == alone
    assert tight.stats().num_preemptions > 0


def test_no_prefix_is_shared_as_no_state_is_there_behind_it(engine: Path) -> None:
    executor = opened(engine)
    first = generate(executor, [Request(0, PROMPTS[3], GREEDY)])[0]
    assert generate(executor, [Request(1, PROMPTS[3], GREEDY)])[1] == first
    stats = executor.stats()
    assert (stats.num_cached_tokens, stats.num_remembered_kv_blocks) == (0, 0)


def test_states_are_counted_with_the_cache(engine: Path) -> None:
    few, many = (opened(engine, max_batch_size=n, kv_cache_gib=0.01) for n in (2, 6))
    delta = few.engine.config.delta
    assert delta is not None
    states = 4 * (delta.value_heads * 32 * 32 + 3 * 2 * delta.mixed)  # float32, one layer
    assert many.runner.kv_cache_bytes - few.runner.kv_cache_bytes == 4 * states
    assert states == delta.state_bytes(4)


def test_more_states_than_there_is_memory_for_are_refused(engine: Path) -> None:
    capacity = Capacity(128, 64, 512)
    with pytest.raises(EngineError, match="keeps 2.00 GiB of max_batch_size=64.* lower"):
        count_blocks(read_engine(engine), ExecutorOptions(), capacity, 4096, "cpu", 2**30, 2**31)


@pytest.mark.parametrize(
    "found", [3, [1], {"layers": "all"}, {"layers": [0]}, {**DELTA._asdict(), "layers": [0]}]
)
def test_a_damaged_config_is_refused_by_name(engine: Path, found: object) -> None:
    data = {**read_config(engine).to_dict(), "linear_attention": found}
    with pytest.raises(EngineError, match="config.json has linear_attention="):
        ModelConfig.from_dict(data)
