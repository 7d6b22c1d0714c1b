"""The TensorRT-LLM executor against the strict double: the same tokens, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from doubles.trtllm_double import compiled_engine, double_environment, install_double
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.executor import Executor, ExecutorOptions, generate, stream
from enginehouse.runtime.request import (
    GIVES_WAY,
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from enginehouse.runtime.tensorrt_llm.executor import TrtllmExecutor
from enginehouse.runtime.tensorrt_llm.output import token_output
from makers.engines import EngineMaker

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = ExecutorOptions(compute_dtype="float32", kv_cache_gib=0.03)
PROMPTS = [[5, 6, 7], list(range(40, 90)), [11], list(range(300, 417))]
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
SETTINGS: dict[str, Any] = {"quant": "none", "dtype": "float32", "until": "compile"}


def greedy(max_tokens: int = 24, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, **{"ignore_eos": True, **more})


def requests(sampling: SamplingParams) -> list[Request]:
    return [Request(i, prompt, sampling) for i, prompt in enumerate(PROMPTS, start=1)]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch)
        yield patch


@pytest.fixture(scope="module")
def engine(
    patch: pytest.MonkeyPatch, make_engine: EngineMaker, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return compiled_engine(make_engine(**SETTINGS), tmp_path_factory.mktemp("trtllm") / "engine")


@pytest.fixture(scope="module")
def executor(engine: Path) -> Iterator[Executor]:
    executor = open_executor(engine)
    yield executor
    executor.close()


def calls(method: str) -> list[Any]:
    from tensorrt_llm._tensorrt_engine import LLM

    return [arguments for name, arguments in LLM.calls if name == method]


def wait_for(condition: Callable[[], bool], executor: Executor | None = None) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in 30 s"
        if executor is not None:
            executor.poll(0.01)


def test_greedy_tokens_equal_the_torch_executors(
    make_engine: EngineMaker, executor: Executor
) -> None:
    torch_executor = open_executor(make_engine(**SETTINGS), FLOAT32)
    work = requests(greedy())
    assert generate(executor, work) == generate(torch_executor, work)


def test_an_engine_of_four_ranks_is_opened_as_one(
    patch: pytest.MonkeyPatch, make_engine: EngineMaker, tmp_path: Path
) -> None:
    torch_engine = make_engine(quant="fp8", tp=4, dtype="float32", until="compile")
    executor = open_executor(compiled_engine(torch_engine, tmp_path / "e"))
    try:
        assert calls("LLM")[-1]["tensor_parallel_size"] == 4
        assert (executor.info.tp_size, executor.info.quantization) == (4, "FP8")
        wanted = generate(open_executor(torch_engine, FLOAT32), requests(greedy()))
        assert generate(executor, requests(greedy())) == wanted
    finally:
        executor.close()


def test_a_process_that_is_no_rank_forgets_the_launchers_variables(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PMI_RANK", "SLURM_PROCID", "TLLM_LOG_LEVEL"):
        monkeypatch.setenv(name, "0")
    open_executor(engine).close()
    assert "PMI_RANK" not in os.environ and "SLURM_PROCID" not in os.environ
    assert os.environ["TLLM_LOG_LEVEL"] == "0"
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("TLLM_SPAWN_PROXY_PROCESS", "1")  # trtllm-llmapi-launch: it is a rank
    open_executor(engine).close()
    assert os.environ["PMI_RANK"] == "0"


def test_the_llm_is_made_with_the_engines_limits(executor: Executor, engine: Path) -> None:
    arguments = calls("LLM")[0]
    cache = arguments["kv_cache_config"]
    assert arguments["model"] == arguments["tokenizer"] == str(engine)
    assert (arguments["max_batch_size"], arguments["max_num_tokens"]) == (8, 64)
    assert arguments["guided_decoding_backend"] == "xgrammar"
    assert arguments["gather_generation_logits"] and arguments["enable_chunked_prefill"]
    assert cache.enable_block_reuse and cache.max_attention_window is None
    assert 0 < cache.free_gpu_memory_fraction < 0.9
    assert executor.info.max_seq_len == 2048 and executor.info.kv_block_size == 16
    assert executor.info.num_kv_blocks > 0 and executor.info.backend == "tensorrt_llm"


def test_a_stream_gives_each_token_once_and_the_reason_last(executor: Executor) -> None:
    outputs = list(stream(executor, Request(21, [5, 6, 7], greedy(5))))
    assert sum(len(output.token_ids) for output in outputs) == 5
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert all(output.finish_reason is None for output in outputs[:-1])
    assert len(outputs) > 1, "tokens come as they are made"


def test_the_last_iterations_are_counted_though_nobody_polls(executor: Executor) -> None:
    before = executor.stats().num_iterations
    generate(executor, [Request(20, [5, 6, 7], greedy(6))])
    wait_for(lambda: executor.stats().num_iterations >= before + 6)


@pytest.mark.parametrize("position", [0, 3])
def test_a_stop_token_is_told_and_not_given_out(executor: Executor, position: int) -> None:
    free = generate(executor, [Request(22, [5, 6, 7], greedy())])[22]
    stop = free[position]
    params = greedy(stop_token_ids=(stop,))
    outputs = list(stream(executor, Request(23, [5, 6, 7], params)))
    assert [t for o in outputs for t in o.token_ids] == free[: free.index(stop)]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("shown", ["0", "1"])
def test_every_eos_id_ends_a_sequence_shown_or_not(
    make_engine: EngineMaker, patch: pytest.MonkeyPatch, tmp_path: Path, shown: str
) -> None:
    """The second id of generation_config too; whether end_id is among the tokens is unsure."""
    import msgspec

    from doubles.trtllm_double import rewrite_manifest
    from enginehouse.runtime.engine import read_engine

    patch.setenv("DOUBLE_SHOWS_END_ID", shown)
    torch_engine = make_engine(**SETTINGS)
    free = generate(open_executor(torch_engine, FLOAT32), [Request(1, [5, 6, 7], greedy())])[1]
    path = compiled_engine(torch_engine, tmp_path / "e")
    manifest = read_engine(path).manifest
    late, early = free[6], free[3]
    for ids, ending in (((late, early), early), ((early, late), early)):
        model = msgspec.structs.replace(manifest.model, eos_token_ids=ids)
        rewrite_manifest(path, manifest, model=model)
        executor = open_executor(path)
        try:
            outputs = list(
                stream(executor, Request(1, [5, 6, 7], SamplingParams(24, temperature=0.0)))
            )
        finally:
            executor.close()
        assert [t for o in outputs for t in o.token_ids] == free[: free.index(ending)]
        assert outputs[-1].stop_token_id == ending
        assert calls("generate_async")[-1]["stop_token_ids"] == list(ids)


def test_a_cancelled_sequence_gives_nothing_more_and_the_engine_lets_it_go(
    executor: Executor,
) -> None:
    executor.submit(Request(31, [5, 6, 7], greedy(1500)))
    first: list[TokenOutput] = []
    wait_for(lambda: bool(first) or first.extend(executor.poll(0.01)) is not None)
    num_aborts = len(calls("abort"))
    executor.cancel(31)
    assert executor.poll() == []
    wait_for(lambda: not executor.busy, executor)
    assert len(calls("abort")) == num_aborts + 1
    assert executor.stats().num_running == 0


def test_a_sequence_with_logprobs_is_never_aborted(executor: Executor) -> None:
    """The double dies of abort + streaming + logprobs, as TensorRT-LLM's worker does."""
    executor.submit(Request(32, [5, 6, 7], greedy(300, num_logprobs=2)))
    first: list[TokenOutput] = []
    wait_for(lambda: bool(first) or first.extend(executor.poll(0.01)) is not None)
    executor.cancel(32)
    assert executor.busy, "it runs on"
    wait_for(lambda: not executor.busy, executor)
    assert len(generate(executor, [Request(33, [5], greedy(3))])[33]) == 3


def test_an_abort_that_has_no_effect_is_told(
    executor: Executor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's active count stays above what it was given, for longer than an abort takes."""
    assert isinstance(executor, TrtllmExecutor) and not executor.busy
    clock = [100.0]
    monkeypatch.setattr(
        "enginehouse.runtime.tensorrt_llm.executor.time.monotonic", lambda: clock[0]
    )
    for seconds, active in ((0.0, 1), (9.0, 1), (1.0, 0), (0.0, 1), (9.0, 1)):
        clock[0] += seconds
        executor._verify_aborts(active)
    assert not caplog.records, "it went down once"
    clock[0] += 2.0
    executor._verify_aborts(1)
    assert "runs 1 sequences and was given 0: an abort had no effect" in caplog.text


def test_more_sequences_than_the_batch_run_by_priority(executor: Executor) -> None:
    places = executor.info.max_batch_size + 8
    crowd = [Request(100 + i, [5 + i], greedy(20)) for i in range(places)]
    for request in crowd:
        executor.submit(request)
    executor.submit(Request(200, [9, 9], greedy(2), priority=5))
    executor.submit(Request(201, [8, 8], greedy(2), priority=-5))
    assert executor.stats().num_waiting >= 2
    wait_for(lambda: not executor.busy, executor)
    order = [call["inputs"] for call in calls("generate_async")]
    assert order.index([8, 8]) < order.index([9, 9])


def test_what_gives_way_is_given_only_while_nothing_else_is(executor: Executor) -> None:
    executor.submit(Request(500, [7, 7, 7], greedy(40)))
    executor.submit(Request(501, [6, 6, 6], greedy(2), priority=GIVES_WAY))
    executor.submit(Request(502, [5, 5, 5], greedy(2), priority=GIVES_WAY + 1))
    executor.submit(Request(503, [4, 4, 4], greedy(2)))
    assert executor.stats().num_waiting >= 2
    wait_for(lambda: not executor.busy, executor)
    given = [call["inputs"] for call in calls("generate_async")][-4:]
    assert given == [[7, 7, 7], [4, 4, 4], [6, 6, 6], [5, 5, 5]]


def test_a_waiting_sequence_that_is_cancelled_is_never_submitted(executor: Executor) -> None:
    for i in range(executor.info.max_batch_size + 8):
        executor.submit(Request(300 + i, [5 + i], greedy(10)))
    executor.submit(Request(400, [77, 77, 77], greedy(2)))
    executor.cancel(400)
    wait_for(lambda: not executor.busy, executor)
    assert [77, 77, 77] not in [call["inputs"] for call in calls("generate_async")]


def test_counters_grow_and_blocks_come_from_the_engine(executor: Executor) -> None:
    before = executor.stats()
    list(stream(executor, Request(41, list(range(60, 100)), greedy(7))))
    wait_for(lambda: executor.stats().num_iterations > before.num_iterations, executor)
    after = executor.stats()
    assert after.num_prompt_tokens - before.num_prompt_tokens == 40
    assert after.num_generated_tokens - before.num_generated_tokens == 7
    assert after.num_kv_blocks == executor.info.num_kv_blocks
    assert 0 < after.num_free_kv_blocks <= after.num_kv_blocks


def test_a_prefix_that_is_reused_is_counted(engine: Path) -> None:
    executor = open_executor(engine)
    try:
        for request_id in (42, 43):
            list(stream(executor, Request(request_id, list(range(120, 200)), greedy(2))))
        wait_for(lambda: executor.stats().num_cached_tokens == 64, executor)
    finally:
        executor.close()


def told(executor: Executor, params: SamplingParams) -> tuple[list[int], list[Any]]:
    """The tokens of one prompt and their logprobs."""
    outputs = list(stream(executor, Request(81, [5, 6, 7], params)))
    assert outputs[-1].finish_reason is not FinishReason.ERROR, outputs[-1].error
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    return [token for output in outputs for token in output.token_ids], logprobs


@pytest.fixture(scope="module")
def torch_executor(make_engine: EngineMaker) -> Iterator[Executor]:
    executor = open_executor(make_engine(**SETTINGS), FLOAT32)
    yield executor
    executor.close()


@pytest.mark.parametrize(
    "more",
    [
        {"num_logprobs": 3},
        {"logit_bias": ((77, 100.0), (3, -5.0))},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"constraint": Constraint(ConstraintKind.REGEX, "[ab]{3,9}"), "ignore_eos": False},
        {"constraint": Constraint(ConstraintKind.JSON_SCHEMA, SCHEMA), "ignore_eos": False},
    ],
    ids=["logprobs", "logit_bias", "penalties", "repetition", "regex", "schema"],
)
def test_what_is_asked_changes_the_tokens_as_it_does_on_the_cpu(
    executor: Executor, torch_executor: Executor, more: dict[str, Any]
) -> None:
    wanted, plain = told(torch_executor, greedy(**more)), told(torch_executor, greedy())
    tokens, logprobs = told(executor, greedy(**more))
    assert tokens == wanted[0] and tokens
    if "num_logprobs" in more:
        assert len(logprobs) == len(tokens)
        for found, computed in zip(logprobs, wanted[1], strict=True):
            assert found.logprob == pytest.approx(computed.logprob, abs=1e-4)
            assert dict(found.top) == pytest.approx(dict(computed.top), abs=1e-4)
    else:
        assert tokens != plain[0], "the field made no difference"


def test_a_constraint_that_cannot_be_followed_never_reaches_tensorrt_llm(
    executor: Executor,
) -> None:
    asked = len(calls("generate_async"))
    bad = Constraint(ConstraintKind.JSON_SCHEMA, "[1]", "response_format.json_schema")
    with pytest.raises(RequestError):
        executor.submit(Request(91, [5], greedy(constraint=bad)))
    unclosed = Constraint(ConstraintKind.EBNF, 'root ::= "a', "guided_grammar")
    outputs = list(stream(executor, Request(92, [5], greedy(constraint=unclosed))))
    assert outputs[-1].refusal is not None and outputs[-1].refusal.param == "guided_grammar"
    assert len(calls("generate_async")) == asked and not executor.busy


def test_unseeded_sequences_differ_and_seeded_ones_do_not(executor: Executor) -> None:
    free = SamplingParams(30, temperature=1.5, ignore_eos=True)
    seeded = SamplingParams(30, temperature=1.5, ignore_eos=True, seed=7)
    one, two = (generate(executor, [Request(i, [5, 6], free)])[i] for i in (51, 52))
    assert one != two
    one, two = (generate(executor, [Request(i, [5, 6], seeded)])[i] for i in (53, 54))
    assert one == two


def test_a_request_is_refused_before_it_is_sent(executor: Executor) -> None:
    asked = len(calls("generate_async"))
    with pytest.raises(RequestError, match="the prompt has 2048 tokens; wanted 1 to 2047"):
        executor.submit(Request(61, [5] * 2048, greedy()))
    executor.submit(Request(62, [5], greedy(50)))
    with pytest.raises(RequestError, match="request_id 62 is already running"):
        executor.submit(Request(62, [5], greedy()))
    wait_for(lambda: not executor.busy, executor)
    assert len(calls("generate_async")) == asked + 1


def test_an_error_of_the_engine_ends_one_sequence_only(
    executor: Executor, patch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm._tensorrt_engine import LLM

    def refuse(self: Any, prompt: list[int], params: Any) -> None:
        if prompt == [13]:
            raise ValueError("no thirteens here")

    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(LLM, "_check_request", refuse)
        executor.submit(Request(71, [13], greedy(3)))
        executor.submit(Request(72, [14], greedy(3)))
        found: list[TokenOutput] = []
        wait_for(lambda: found.extend(executor.poll(0.01)) is not None or not executor.busy)
    errors = {o.request_id: o.error for o in found if o.finish_reason is FinishReason.ERROR}
    assert errors == {71: "TensorRT-LLM failed: no thirteens here"}
    assert sum(len(o.token_ids) for o in found if o.request_id == 72) == 3


def test_a_response_that_cannot_be_read_ends_its_sequence_and_stops_it(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from enginehouse.runtime.tensorrt_llm import executor as module

    def read(request: Request, result: Any, eos: Any) -> TokenOutput:
        if request.request_id == 81:
            raise KeyError("of no logprobs")
        return token_output(request, result, eos)

    monkeypatch.setattr(module, "token_output", read)
    aborted = len(calls("abort"))
    wanted = generate(executor, [Request(80, [14], greedy(40))])[80]
    executor.submit(Request(81, [13], greedy(10**6)))
    executor.submit(Request(82, [14], greedy(40)))
    found: list[TokenOutput] = []
    wait_for(lambda: found.extend(executor.poll(0.01)) is not None or not executor.busy)
    [error] = [o.error for o in found if o.request_id == 81]
    assert error == "TensorRT-LLM failed: 'of no logprobs'"
    assert len(calls("abort")) == aborted + 1
    assert [t for o in found if o.request_id == 82 for t in o.token_ids] == wanted


def test_a_dead_rank_ends_the_executor_with_a_sentence(engine: Path) -> None:
    executor = open_executor(engine)
    try:
        assert isinstance(executor, TrtllmExecutor)
        [worker] = executor._guard.workers
        worker.kill()
        with pytest.raises(EngineError, match=rf"process {worker.pid} died; rank 0 said last: .*"):
            wait_for(lambda: False, executor)
    finally:
        executor.close()


def test_workers_that_shutdown_leaves_behind_are_ended(
    engine: Path, patch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as inner:
        inner.setenv("DOUBLE_LEAVES_WORKERS", "1")
        executor = open_executor(engine)
        assert isinstance(executor, TrtllmExecutor)
        workers = executor._guard.workers.copy()
        assert workers and all(worker.is_running() for worker in workers)
        executor.close()
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]


def test_a_start_that_hangs_ends_with_each_ranks_last_line(
    engine: Path, patch: pytest.MonkeyPatch
) -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as inner:
        inner.setenv("DOUBLE_START_HANGS", "1")
        with pytest.raises(
            EngineError, match=r"did not start within 2 s; rank 0 said last: .*hangs"
        ):
            open_executor(engine, ExecutorOptions(start_s=2))
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_host_takes_its_workers_along(engine: Path, tmp_path: Path) -> None:
    from enginehouse.runtime.host.supervisor import host_command

    environment = {**double_environment(), "DOUBLE_LEAVES_WORKERS": "1"}
    process = subprocess.Popen(
        host_command(engine, f"ipc://{tmp_path}/socket"),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    workers: list[psutil.Process] = []

    def started() -> bool:
        assert process.poll() is None, "the host ended"
        workers[:] = [w for w in psutil.Process(process.pid).children(True) if is_rank(w)]
        return bool(workers) and (tmp_path / "socket").exists()

    wait_for(started)
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_rank(worker) for worker in workers))


def is_rank(process: psutil.Process) -> bool:
    """Whether this is a live worker of the double."""
    try:
        return "time.sleep(3600)" in " ".join(process.cmdline())
    except psutil.Error:  # gone, or a zombie
        return False


def test_tensorrt_llm_is_not_imported_with_the_executor() -> None:
    code = (
        "import sys, enginehouse.runtime.tensorrt_llm.executor\n"
        "print([n for n in sys.modules if n.partition('.')[0] == 'tensorrt_llm'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**double_environment(), "PYTHONSAFEPATH": "1"},
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.fixture(scope="module")
def scoring_executor(
    patch: pytest.MonkeyPatch, make_engine: EngineMaker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Executor]:
    """Of an engine that gives the logits of prompts."""
    path = tmp_path_factory.mktemp("scoring") / "engine"
    executor = open_executor(
        compiled_engine(make_engine(**SETTINGS), path, "--gather_context_logits")
    )
    yield executor
    executor.close()


def scores_of(executor: Executor, work: list[Request]) -> dict[int, list[TokenLogprobs]]:
    found: dict[int, list[TokenLogprobs]] = {request.request_id: [] for request in work}
    for request in work:
        executor.submit(request)
    while executor.busy:
        for output in executor.poll(0.1):
            assert output.error is None, output.error
            found[output.request_id] += output.prompt_logprobs or []
    return found


def test_prompts_are_scored_as_the_torch_backend_scores_them(
    make_engine: EngineMaker, scoring_executor: Executor
) -> None:
    """Of a prompt that is in the cache too, and of seven, of which four are given at a time."""
    executor, torch_executor = scoring_executor, open_executor(make_engine(**SETTINGS), FLOAT32)
    assert executor.info.scores_prompts
    generate(executor, [Request(90, PROMPTS[3], greedy(2))])
    work = [
        Request(i, prompt, greedy(1, num_prompt_logprobs=i % 3))
        for i, prompt in enumerate([*PROMPTS, *PROMPTS[1:]], start=60)
    ]
    found, wanted = scores_of(executor, work), scores_of(torch_executor, work)
    for number, theirs in wanted.items():
        for one, other in zip(found[number], theirs, strict=True):
            assert abs(one.logprob - other.logprob) < 1e-4 and one.rank == other.rank
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    asked = calls("generate_async")[-len(work) :]
    assert len({call["cache_salt"] for call in asked}) == len(work)
    assert not any(call["streaming"] for call in asked)


def test_prompts_that_wait_to_be_scored_hold_up_no_others(
    scoring_executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginehouse.runtime.tensorrt_llm.waiting.MOST_SCORED", 1)
    for number in range(80, 100):
        scoring_executor.submit(Request(number, [5, 6], greedy(9, num_prompt_logprobs=1)))
    scoring_executor.submit(Request(100, [7], greedy(1)))
    asked = [call["inputs"] for call in calls("generate_async")]
    wait_for(lambda: [7] in [call["inputs"] for call in calls("generate_async")])
    assert scoring_executor.stats().num_waiting > 0 and asked.count([5, 6]) < 20
    for number in range(80, 101):
        scoring_executor.cancel(number)
    wait_for(lambda: not scoring_executor.busy, scoring_executor)


def test_an_engine_without_logits_of_prompts_says_so(executor: Executor) -> None:
    assert not executor.info.scores_prompts
    with pytest.raises(RequestError, match="without gather_context_logits"):
        executor.submit(Request(70, [5, 6], greedy(1, num_prompt_logprobs=1)))
    assert not executor.busy
