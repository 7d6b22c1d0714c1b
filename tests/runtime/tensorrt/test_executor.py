"""TensorRT's runner on doubles of its runtime and of CUDA: the torch backend's tokens, and no slot
touched that must not be.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
import msgspec
import pytest
import torch
import zmq

from doubles.tensorrt_double import TensorRTDouble
from doubles.tensorrt_machine import (
    FLOAT32,
    PROMPTS,
    doubled_engine,
    doubled_machine,
    greedy,
    requests,
    torch_answers,
)
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.engine import read_engine, write_manifest
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import Executor, ExecutorOptions, generate
from enginehouse.runtime.host.client import EngineClient
from enginehouse.runtime.host.process import EngineHost
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.engines import SourceMaker

pytestmark = pytest.mark.usefixtures("one_thread")


CASES = [
    ("llama", "none", 1),
    ("llama", "int4", 2),
    ("qwen2", "fp8", 1),
    ("qwen3", "fp8_rowwise", 1),
    ("gemma2", "int8", 1),
    ("gemma3", "none", 1),
    ("phi3-longrope", "none", 1),
    ("biased", "none", 2),
    ("mixtral", "none", 2),
]


@pytest.mark.parametrize(("family", "quant", "tp"), CASES)
def test_greedy_tokens_equal_the_torch_backends(
    family_source: SourceMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    quant: str,
    tp: int,
) -> None:
    """Ragged prompts in chunks, in flight together; one crosses longrope's threshold of 32."""
    settings = dict(quant=quant, tp=tp, max_seq_len=256)
    engine = doubled_engine(family_source(family), tmp_path / "e", **settings)
    work = requests([*PROMPTS, list(range(100, 128))], greedy())
    wanted = torch_answers(engine, work)
    with doubled_machine(monkeypatch, tp):
        executor = open_executor(engine)
        found = generate(executor, work)
        executor.close()
    assert found == wanted


def test_ranks_are_processes_and_one_that_dies_ends_the_engine(
    family_source: SourceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank's own program, on doubles as this process is, and each computes its own part."""
    settings = dict(quant="int4", tp=2, max_seq_len=128)
    engine = doubled_engine(family_source("qwen2"), tmp_path / "e", **settings)
    stem = list(range(40, 70))
    work = requests([stem, [5, 6], [11], [*stem, 3]], greedy(8))
    wanted = torch_answers(engine, work)
    with doubled_machine(monkeypatch, 2, processes=True):
        executor = open_executor(engine)
        assert generate(executor, work) == wanted
        assert generate(executor, work) == wanted and executor.stats().num_cached_tokens > 0
        executor.submit(Request(9, [5, 6, 7], greedy(50)))
        executor.poll()
        runner = executor.runner  # type: ignore[attr-defined]
        (process,) = runner._followers._processes
        process.send_signal(signal.SIGTERM)  # the group's, which is the leader's to answer
        executor.poll()
        process.kill()
        deadline_s = time.monotonic() + 20
        while not runner._rank.communicator.aborted:
            assert time.monotonic() < deadline_s, "nobody noticed"
            time.sleep(0.01)
        with pytest.raises(EngineError, match=r"^rank 1 of 2 ended \(exit status -9\), without"):
            executor.poll()
        executor.close()


@pytest.mark.parametrize(("family", "tp"), [("llama", 1), ("gemma2", 2)])
def test_prompts_are_scored_one_token_an_iteration_as_the_torch_backend_scores_them(
    family_source: SourceMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    tp: int,
) -> None:
    """Beside sequences that are not, with a prefix that was kept, over both ranks."""
    path = doubled_engine(
        family_source(family), tmp_path / "e", quant="none", tp=tp, max_seq_len=128
    )
    params = SamplingParams(3, 0.0, ignore_eos=True, num_prompt_logprobs=2)
    stem = list(range(40, 70))
    prompts = [stem, [5, 6, 7], [11], [*stem, 3]]
    work = [Request(i, prompt, params) for i, prompt in enumerate(prompts)]
    work += [Request(7, [*stem, 9], greedy(20)), Request(8, stem, replace(params, max_tokens=0))]

    def scores(executor: Executor) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {request.request_id: [] for request in work}
        for request in work:
            executor.submit(request)
        while executor.busy:
            for output in executor.poll():
                found[output.request_id] += output.prompt_logprobs or []
        return found

    cpu = TorchExecutor(read_engine(path), FLOAT32)
    wanted = scores(cpu)
    cpu.close()
    with doubled_machine(monkeypatch, tp) as trt:
        executor = open_executor(path)
        generate(executor, [Request(9, stem, greedy(2))])
        trt.executions.clear()
        found = scores(executor)
        executor.close()
    assert [len(found[i]) for i in (0, 1, 2, 3, 7, 8)] == [29, 2, 0, 30, 0, 29]
    for number, theirs in wanted.items():
        for one, other in zip(found[number], theirs, strict=True):
            assert abs(one.logprob - other.logprob) < 1e-4 and one.rank == other.rank
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    prefills = [said for said in trt.executions if said.tokens > 1 and said.rank == 0]
    assert len(prefills) <= 1, "of what is not scored"


@pytest.fixture(scope="module")
def engine(family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tensorrt") / "e"
    return doubled_engine(family_source("llama"), path, quant="none", max_seq_len=256)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[TensorRTDouble]:
    with doubled_machine(monkeypatch) as trt:
        yield trt


def mixed() -> list[Request]:
    """Every kind of sampling, side by side, and a constraint."""
    regex = Constraint(ConstraintKind.REGEX, "[ab]{3,9}")
    params: list[dict[str, Any]] = [
        {"temperature": 0.0, "num_logprobs": 3, "repetition_penalty": 1.2, "min_tokens": 4},
        {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2, "num_logprobs": 0},
        {"top_k": 7, "min_p": 0.01, "logit_bias": ((9, 2.0), (11, -3.0)), "ignore_eos": False},
        {"temperature": 1.3},
        {"temperature": 0.0, "constraint": regex, "ignore_eos": False},
    ]
    return [
        Request(i, prompt, SamplingParams(10, **{"seed": 4, "ignore_eos": True, **chosen}))
        for i, (prompt, chosen) in enumerate(zip([*PROMPTS, [3, 4]], params, strict=True))
    ]


def told(executor: Executor, work: list[Request], at: dict[int, int]) -> dict[int, list[Any]]:
    """Everything that each sequence is told but of its cache; at: the poll it arrives before."""
    outputs: dict[int, list[Any]] = {}
    waiting, turn = sorted(work, key=lambda r: at.get(r.request_id, 0)), 0
    while waiting or executor.busy:
        while waiting and at.get(waiting[0].request_id, 0) <= turn:
            executor.submit(waiting.pop(0))
        for output in executor.poll(1.0):
            facts = (output.token_ids, output.finish_reason, output.stop_token_id)
            outputs.setdefault(output.request_id, []).append((facts, output.logprobs))
        turn += 1
    return outputs


def test_sampling_constraints_and_arrivals_in_flight_as_the_torch_backend(
    engine: Path, machine: TensorRTDouble
) -> None:
    with torch._C.DisableTorchFunction():
        cpu = TorchExecutor(read_engine(engine), FLOAT32)
        wanted = told(cpu, mixed(), {})
        cpu.close()
    executor = open_executor(engine)
    found = told(executor, mixed(), {1: 2, 2: 3, 3: 5, 4: 1})
    executor.close()
    assert found.keys() == wanted.keys()
    for number, outputs in wanted.items():
        assert [facts for facts, _ in found[number]] == [facts for facts, _ in outputs]
        for (_, ours), (_, theirs) in zip(found[number], outputs, strict=True):
            assert (ours is None) == (theirs is None)
            for one, other in zip(ours or [], theirs or [], strict=True):
                assert abs(one.logprob - other.logprob) < 1e-4
                assert [t for t, _ in one.top] == [t for t, _ in other.top]


def test_a_prefix_is_copied_and_sequences_move_together(
    engine: Path, machine: TensorRTDouble
) -> None:
    """Cancels and ends leave holes in a batch; what comes later finds what they kept."""
    stem = list(range(50, 90))
    work = [Request(i, [*stem, 100 + i], greedy(4 + 3 * i)) for i in range(6)]
    later = [Request(10 + i, [*stem, 100 + i, 7], greedy(5)) for i in range(3)]
    with torch._C.DisableTorchFunction():
        wanted = torch_answers(engine, [*work, *later])
    executor = open_executor(engine)
    found: dict[int, list[int]] = {r.request_id: [] for r in (*work, *later)}
    cached: dict[int, int] = {}
    cancelled = 4
    for request in work:
        executor.submit(request)
    machine.executions.clear()
    while executor.busy:
        for output in executor.poll():
            found[output.request_id] += output.token_ids
            cached[output.request_id] = output.num_cached_tokens
        if len(found[cancelled]) == 3:
            executor.cancel(cancelled)
            for request in later:
                executor.submit(request)
            found[cancelled] += [-1]
    executor.close()
    assert found.pop(cancelled) == [*wanted.pop(cancelled)[:3], -1]
    assert found == wanted
    assert all(cached[request.request_id] == 41 for request in later)
    batches = [said.batch for said in machine.executions if said.profile == 0]
    assert max(batches) == 8 and batches[-1] == 1, batches
    assert executor.stats().num_free_kv_blocks == executor.stats().num_kv_blocks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_neighbour_changes_a_step_when_deterministic(
    family_source: SourceMaker, machine: TensorRTDouble, tmp_path: Path, dtype: str
) -> None:
    """Whatever slot a sequence has, it is alone in its steps; the first tokens are torch's."""
    settings = dict(quant="int4", dtype=dtype, max_seq_len=256)
    with torch._C.DisableTorchFunction():
        path = doubled_engine(family_source("llama"), tmp_path / "e", **settings)
        wanted = torch_answers(path, requests(PROMPTS, greedy(1)))
    executor = open_executor(path, ExecutorOptions(deterministic=True))
    machine.executions.clear()
    together = generate(executor, requests(PROMPTS, greedy(6)))
    assert {said.batch for said in machine.executions} == {1}
    alone = {i: generate(executor, [Request(i, p, greedy(6))])[i] for i, p in enumerate(PROMPTS)}
    assert together == alone
    assert {i: tokens[:1] for i, tokens in together.items()} == wanted
    assert executor.stats().num_cached_tokens == 0
    executor.close()


def test_short_prompts_are_prefilled_together(
    family_source: SourceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lengths and ends of their own, over both ranks."""
    settings = dict(quant="none", tp=2, max_seq_len=64, max_num_tokens=256)
    path = doubled_engine(family_source("gemma2"), tmp_path / "e", **settings)
    lengths = (9, 16, 3, 5, 30, 25, 18)
    prompts = [list(range(40 + n, 40 + n + length)) for n, length in enumerate(lengths)]
    work = requests(prompts, greedy(6))
    wanted = torch_answers(path, work)
    with doubled_machine(monkeypatch, 2) as trt:
        executor = open_executor(path)
        trt.executions.clear()
        assert generate(executor, work) == wanted
        executor.close()
    mine = [said for said in trt.executions if said.profile == 1 and said.rank == 0]
    assert [(said.batch, said.tokens) for said in mine] == [(4, 16), (2, 32), (1, 32)]


def test_a_step_looks_at_no_more_rows_than_it_needs(engine: Path, machine: TensorRTDouble) -> None:
    executor = open_executor(engine)
    machine.executions.clear()
    generate(executor, [Request(1, list(range(40, 70)), greedy(12))])
    looked_at = [said.looked_at for said in machine.executions]
    assert looked_at == [32, 32, 32, *[64] * 9]
    assert [said.tokens for said in machine.executions] == [32, *[1] * 11]
    executor.close()


def test_the_tokens_come_back_once_an_iteration(engine: Path, machine: TensorRTDouble) -> None:
    executor = open_executor(engine)
    for request in requests(PROMPTS, greedy(20)):
        executor.submit(request)
    for _ in range(4):
        executor.poll()
    for _ in range(4):
        machine.cuda.waits.clear()
        assert len(executor.poll()) == len(PROMPTS)
        assert machine.cuda.waits == ["tolist"]
    executor.close()


def test_what_is_not_finite_spoils_one_sequence_and_no_later_one(
    engine: Path, machine: TensorRTDouble
) -> None:
    """A masked row is multiplied by 0, and 0 times NaN is NaN: the slot is cleared."""
    executor = open_executor(engine, ExecutorOptions(max_seq_len=60, max_batch_size=1))
    wanted = generate(executor, [Request(1, [5, 6, 7], greedy(4))])
    executor.submit(Request(2, list(range(40, 60)), greedy(4)))
    executor.poll()
    (plan,) = executor.runner._rank.plans  # type: ignore[attr-defined]
    plan.caches["past_value_0"][0, :, 18] = float("nan")
    (output,) = executor.poll()
    assert output.finish_reason is FinishReason.ERROR and "not finite" in (output.error or "")
    assert generate(executor, [Request(1, [5, 6, 7], greedy(4))]) == wanted
    executor.close()


def test_plans_beyond_the_context_asked_for_are_left_out(
    engine: Path, machine: TensorRTDouble
) -> None:
    executor = open_executor(engine, ExecutorOptions(max_seq_len=100, max_batch_size=3))
    assert len(machine.contexts) == 2 * 2, "64 and 128, each for decoding and for prefill"
    assert executor.info.max_seq_len == 100 and executor.info.num_kv_blocks == 2 * 3
    executor.close()


def test_the_context_and_its_last_row_can_be_used(engine: Path, machine: TensorRTDouble) -> None:
    """A prompt that leaves no room for padding, and a sequence that fills its slot."""
    prompt = list(range(3, 250))
    work = [Request(1, prompt, greedy(50))]
    with torch._C.DisableTorchFunction():
        wanted = torch_answers(engine, work)
    executor = open_executor(engine)
    assert generate(executor, work) == wanted and len(wanted[1]) == 256 - 247
    executor.close()


def test_long_contexts_take_fewer_at_once(
    family_source: SourceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of 64, 128 and 192 tokens, for batches of 5, 2 and 1; all four requests are done."""
    monkeypatch.setattr("enginehouse.build.tensorrt.plans.cached_tokens", lambda *_: 320)
    path = doubled_engine(family_source("llama"), tmp_path / "e", quant="none", max_seq_len=192)
    work = requests(PROMPTS, greedy(30))
    wanted = torch_answers(path, work)
    with doubled_machine(monkeypatch):
        executor = open_executor(path)
        memory = executor.runner.memory
        assert [memory.num_slots(plan) for plan in range(3)] == [5, 2, 1]
        assert generate(executor, work) == wanted
        executor.close()


def test_what_decodes_is_captured_and_kernels_are_kept_beside_the_engine(
    engine: Path, machine: TensorRTDouble, caplog: pytest.LogCaptureFixture
) -> None:
    executor = open_executor(engine)
    captured = {c.profile: c.config.cuda_graph_strategy.name for c in machine.contexts}
    assert captured == {0: "WHOLE_GRAPH_CAPTURE", 1: "DISABLED"}
    executor.close()
    folder = engine.with_name(engine.name + ".kernels")
    files = sorted(folder.iterdir())
    assert len(files) == 3 and all(
        file.name.endswith(f"-sm89-tensorrt_rtx-{machine.__version__}.cache") for file in files
    )
    before = [file.read_bytes() for file in files]
    machine.contexts.clear()
    executor = open_executor(engine)
    assert all(context.config.cache.kernels for context in machine.contexts)
    executor.close()
    assert [file.read_bytes() for file in files] == before
    machine.takes_cache = False
    open_executor(engine).close()
    assert "is not for this machine and is written anew" in caplog.text
    assert sorted(folder.iterdir()) == files, "nothing half-written is left"


def test_the_data_centre_package_has_neither_cache_nor_graphs(
    engine: Path, machine: TensorRTDouble, tmp_path: Path
) -> None:
    path = tmp_path / "e"
    shutil.copytree(engine, path)
    manifest = read_engine(path).manifest
    built = {**(manifest.tensorrt or {}), "package": "tensorrt"}
    write_manifest(path, msgspec.structs.replace(manifest, tensorrt=built))
    work = requests(PROMPTS, greedy(5))
    with torch._C.DisableTorchFunction():
        wanted = torch_answers(engine, work)
    executor = open_executor(path)
    assert generate(executor, work) == wanted
    assert {c.config.cuda_graph_strategy.name for c in machine.contexts} == {"DISABLED"}
    executor.close()
    assert not path.with_name("e.kernels").exists()


def test_a_host_serves_it(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The host's loop over a socket, as its process runs it: ids in, ids out."""
    work = requests(PROMPTS[:2], greedy(5))
    wanted = torch_answers(engine, work)
    address, stopping = f"ipc://{tmp_path}/engine", threading.Event()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def run() -> None:
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        with doubled_machine(monkeypatch):
            executor = open_executor(engine)
            EngineHost(executor, socket).run(lambda: not stopping.is_set())
            executor.close()
        socket.close()

    thread = threading.Thread(target=run)
    thread.start()
    client = EngineClient(address)
    try:
        with gevent.Timeout(30, AssertionError("the host is not ready")):
            while not client.ready:
                gevent.sleep(0.01)
        assert client.info is not None and client.info.backend == "tensorrt"
        generations = [client.submit(r.prompt_ids, [r.sampling]) for r in work]
        found: list[list[int]] = [[] for _ in work]
        for tokens, generation in zip(found, generations, strict=True):
            while not generation.finished:
                event = generation.get(10)
                assert event is not None
                tokens += event[1].token_ids
    finally:
        stopping.set()
        client.close()
        thread.join(20)
        context.term()
    assert dict(enumerate(found)) == wanted
