"""Host, client and messages over real sockets, with a scripted executor instead of a model."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import msgspec
import pytest
import zmq
from gevent import monkey
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.runtime.errors import EngineError, HostUnavailable, RequestError
from enginehouse.runtime.executor import ExecutorOptions, RemoteRanks
from enginehouse.runtime.host import messages, process
from enginehouse.runtime.host.admission import QueueLimits
from enginehouse.runtime.host.client import EngineClient, Generation
from enginehouse.runtime.host.keys import HostKey
from enginehouse.runtime.host.log_lines import TRAFFIC
from enginehouse.runtime.host.process import EngineHost
from enginehouse.runtime.request import (
    Constraint,
    ConstraintKind,
    EngineInfo,
    ExecutorStats,
    FinishReason,
    Pooling,
    PoolingKind,
    Refusal,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)

INFO = EngineInfo(
    name="scripted",
    model="scripted",
    quantization="none",
    backend="torch",
    tp_size=1,
    pp_size=1,
    max_seq_len=64,
    max_batch_size=4,
    max_num_tokens=64,
    vocab_size=100,
    kv_block_size=16,
    num_kv_blocks=8,
    kv_cache_bytes=1 << 20,
    eos_token_ids=(2,),
    digest="sha256:0",
    created=0,
)


class ScriptedExecutor:
    """Answers each prompt with its tokens plus one, a token an iteration."""

    def __init__(self) -> None:
        self.info = INFO
        self.running: dict[int, Iterator[int]] = {}
        self.cancelled: list[int] = []
        self.num_iterations = 0
        self.preempted: tuple[int, ...] = ()
        self.priorities: list[int] = []
        self.pace = threading.Event()
        self.waiting = True
        self.on_planned: Callable[[], None] = lambda: None

    def submit(self, request: Request) -> None:
        if 99 in request.prompt_ids:
            raise RequestError("99 is an unlucky token", param="prompt", code="unlucky")
        if 98 in request.prompt_ids:
            raise ZeroDivisionError("nobody thought of 98")
        self.priorities.append(request.priority)
        count = request.sampling.max_tokens
        cycle = itertools.cycle(request.prompt_ids)
        self.running[request.request_id] = (token + 1 for token in itertools.islice(cycle, count))

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)
        self.running.pop(request_id, None)

    def waits(self, request_id: int) -> bool:
        return self.waiting

    def poll(self, timeout_s: float = 0.0) -> list[TokenOutput]:
        self.num_iterations += 1
        self.on_planned()
        self.pace.wait(0.0005)  # an iteration takes time: no client is meant to drink a flood
        outputs = []
        for request_id, tokens in list(self.running.items()):
            token = next(tokens, None)
            if token is None:
                del self.running[request_id]
                end = TokenOutput(request_id, [], FinishReason.LENGTH, stop_token_id=2)
                outputs.append(end)
            elif token == 97:
                outputs.append(TokenOutput(request_id, [object()]))  # type: ignore[list-item]
            else:
                logprobs = [TokenLogprobs(-0.5, ((token, -0.5),))]
                outputs.append(TokenOutput(request_id, [token], logprobs=logprobs))
        return outputs

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def stats(self) -> ExecutorStats:
        return ExecutorStats(
            num_running=len(self.running),
            num_iterations=self.num_iterations,
            preempted=self.preempted,
        )

    def close(self) -> None:
        self.running.clear()


class RunningHost:
    """An EngineHost on a native thread, as its process would run it."""

    def __init__(self, address: str, limits: QueueLimits = QueueLimits()) -> None:  # noqa: B008
        self.executor = ScriptedExecutor()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = socket = self.context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        self.stopping = threading.Event()
        host = EngineHost(self.executor, socket, limits)
        self.thread = threading.Thread(target=host.run, args=(lambda: not self.stopping.is_set(),))
        self.thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join(10)
        self.socket.close()
        self.context.term()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    with gevent.Timeout(10, AssertionError(f"never happened: {what}")):
        while not condition():
            gevent.sleep(0.005)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle host sees soon that it is to stop."""
    monkeypatch.setattr(process, "_IDLE_POLL_MS", 10)


@pytest.fixture
def address(tmp_path: Path) -> str:
    assert not monkey.is_module_patched("socket"), "the suite runs without patches"
    return f"ipc://{tmp_path}/engine"


@pytest.fixture
def host(address: str) -> Iterator[RunningHost]:
    running = RunningHost(address)
    yield running
    running.stop()


@pytest.fixture
def client(address: str, host: RunningHost) -> Iterator[EngineClient]:
    connected = EngineClient(address)
    wait_until(lambda: connected.ready, "the client is ready")
    yield connected
    connected.close()


def read(generation: Generation) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while not generation.finished:
        event = generation.get(10)
        assert event is not None, "nothing came within ten seconds"
        index, output = event
        tokens.setdefault(index, []).extend(output.token_ids)
    return tokens


def test_every_choice_gets_its_own_tokens(client: EngineClient) -> None:
    names = ("max_queue_requests", "max_queue_tokens", "max_queue_s")
    told = dict(zip(names, QueueLimits(), strict=True))
    assert client.info == dataclasses.replace(INFO, **told), "with how much may wait"
    generation = client.submit([1, 2, 3], [SamplingParams(4), SamplingParams(2)])
    assert read(generation) == {0: [2, 3, 4, 2], 1: [2, 3]}


def test_the_host_logs_its_throughput_while_sequences_run(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "_STATS_PERIOD_S", 0.001)
    monkeypatch.setattr("enginehouse.runtime.host.throughput.PERIOD_S", 0.001)
    caplog.set_level("INFO", TRAFFIC)
    generation = client.submit([1], [SamplingParams(1_000_000)])
    wait_until(lambda: "1 running, 0 waiting; prompt" in caplog.text, "a line of throughput")
    generation.cancel()


def test_many_requests_at_once_are_not_mixed_up(client: EngineClient) -> None:
    generations = {i: client.submit([i], [SamplingParams(5 + i % 7)]) for i in range(40)}
    for i, generation in generations.items():
        assert read(generation) == {0: [i + 1] * (5 + i % 7)}


def test_two_workers_with_the_same_request_ids_are_kept_apart(
    address: str, client: EngineClient
) -> None:
    other = EngineClient(address)
    wait_until(lambda: other.ready, "the second client is ready")
    mine, theirs = (c.submit([n], [SamplingParams(30)]) for c, n in ((client, 10), (other, 50)))
    assert read(mine) == {0: [11] * 30}
    assert read(theirs) == {0: [51] * 30}
    other.close()


def test_a_cancelled_generation_ends_in_the_executor_too(
    client: EngineClient, host: RunningHost
) -> None:
    generation = client.submit([1], [SamplingParams(10**9), SamplingParams(10**9)])
    assert generation.get(10) is not None
    generation.cancel(0)
    wait_until(lambda: len(host.executor.running) == 1, "one choice is left")
    assert not generation.finished
    generation.cancel()
    assert generation.finished and generation.get(1) is None
    wait_until(lambda: not host.executor.busy, "the executor is idle")


def test_a_worker_is_told_when_a_prompt_is_begun(client: EngineClient, host: RunningHost) -> None:
    generation = client.submit([1], [SamplingParams(10**9)])
    other = client.submit([1], [SamplingParams(10**9)])
    assert generation.get(10) is not None and not generation.begun, "the executor says it waits"
    other.cancel()
    host.executor.waiting = False
    wait_until(lambda: generation.begun, "it was told")
    generation.cancel()
    assert not other.begun


def test_cancel_wakes_a_greenlet_that_waits(client: EngineClient, host: RunningHost) -> None:
    host.executor.poll = lambda timeout_s=0.0: []  # type: ignore[method-assign]
    generation = client.submit([1], [SamplingParams(5)])
    waiting = gevent.spawn(generation.get, None)
    gevent.sleep(0)
    generation.cancel()
    assert waiting.get(timeout=60) is None


def test_a_finished_generation_sends_no_cancel(client: EngineClient, host: RunningHost) -> None:
    generation = client.submit([1], [SamplingParams(3)])
    read(generation)
    generation.cancel()
    read(client.submit([1], [SamplingParams(1)]))  # a round trip later
    assert host.executor.cancelled == []


def test_priority_logprobs_and_stop_tokens_pass_through(
    client: EngineClient, host: RunningHost
) -> None:
    generation = client.submit([1], [SamplingParams(1)], priority=-3)
    first, last = generation.get(10), generation.get(10)
    assert first is not None and first[1].logprobs == [TokenLogprobs(-0.5, ((2, -0.5),))]
    assert last is not None and last[1].stop_token_id == 2
    assert host.executor.priorities == [-3]


def test_what_the_executor_refuses_is_an_error_of_that_request_only(client: EngineClient) -> None:
    good = client.submit([1], [SamplingParams(5)])
    bad = client.submit([99], [SamplingParams(5)])
    event = bad.get(10)
    assert event is not None and event[1].finish_reason is FinishReason.ERROR
    assert event[1].error == "99 is an unlucky token"
    assert event[1].refusal == Refusal("99 is an unlucky token", "prompt", "unlucky")
    assert read(good) == {0: [2] * 5}


@pytest.mark.parametrize(
    ("prompt", "before", "told"),
    [
        ([98], [], "(ZeroDivisionError: nobody thought of 98)"),  # while it is taken
        ([1, 2, 96], [2, 3], "(TypeError: Encoding objects of type object is unsupported)"),
    ],
)
def test_what_nobody_thought_of_ends_one_request_and_not_the_host(
    client: EngineClient, host: RunningHost, prompt: list[int], before: list[int], told: str
) -> None:
    host.executor.pace.set()
    good = client.submit([1], [SamplingParams(50)])
    bad = client.submit(prompt, [SamplingParams(50)])
    outputs = []
    while not bad.finished:
        event = bad.get(10)
        assert event is not None, "nothing came within ten seconds"
        outputs.append(event[1])
    assert [token for output in outputs for token in output.token_ids] == before
    assert outputs[-1].finish_reason is FinishReason.ERROR and outputs[-1].refusal is None
    assert outputs[-1].error == (
        f"the engine failed on this request alone {told}; its log says where"
    )
    assert read(good) == {0: [2] * 50}
    assert host.thread.is_alive() and len(host.executor.cancelled) == 1
    assert not host.executor.busy, "its sequence was stopped too"


def test_a_host_that_dies_fails_open_requests_at_once_and_may_come_back(
    address: str, client: EngineClient, host: RunningHost
) -> None:
    generation = client.submit([1], [SamplingParams(10**9)])
    assert generation.get(10) is not None
    host.stop()
    with pytest.raises(HostUnavailable, match="stopped"), gevent.Timeout(10):
        while True:
            generation.get(10)
    assert not client.ready and generation.finished
    with pytest.raises(HostUnavailable):
        client.submit([1], [SamplingParams(1)])
    again = RunningHost(address)
    wait_until(lambda: client.ready, "the client found the new host")
    assert read(client.submit([1], [SamplingParams(2)])) == {0: [2, 2]}
    again.stop()


def test_a_worker_that_vanishes_leaves_nothing_running(address: str, host: RunningHost) -> None:
    lost = EngineClient(address)
    wait_until(lambda: lost.ready, "the client is ready")
    lost.submit([1], [SamplingParams(10**9)])
    wait_until(lambda: host.executor.busy, "it runs")
    lost.close()  # says nothing to the host
    wait_until(lambda: not host.executor.busy, "the host noticed")


def test_a_worker_is_told_which_of_its_own_sequences_were_preempted(
    address: str, client: EngineClient, host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own numbers: the executor's are others, and another worker's are its own business."""
    monkeypatch.setattr(process, "_STATS_PERIOD_S", 0.02)
    other = EngineClient(address)
    wait_until(lambda: other.ready, "the second client is ready")
    theirs = other.submit([50], [SamplingParams(10**9)])
    wait_until(lambda: len(host.executor.running) == 1, "it runs")
    mine = client.submit([1], [SamplingParams(10**9), SamplingParams(10**9)])
    wait_until(lambda: len(host.executor.running) == 3, "all run")
    host.executor.preempted = (max(host.executor.running),)
    wait_until(lambda: mine.preempted == {1}, "the second choice gave way")
    assert theirs.preempted == frozenset()
    host.executor.preempted = ()
    wait_until(lambda: not mine.preempted, "it runs again")
    mine.cancel()
    theirs.cancel()
    other.close()


def test_statistics_arrive(client: EngineClient) -> None:
    generation = client.submit([1], [SamplingParams(10**9)])
    wait_until(lambda: client.stats.num_running == 1, "statistics of the running sequence")
    generation.cancel()


def test_a_host_whose_loop_stands_still_with_work_is_noticed(
    client: EngineClient, host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its iteration hangs, as on a GPU that is lost; by the clock an hour passes."""
    real, ahead_s = time.monotonic, 0.0
    monkeypatch.setattr("enginehouse.runtime.host.client.time.monotonic", lambda: real() + ahead_s)
    generation = client.submit([1], [SamplingParams(10**9)])
    wait_until(lambda: client.stats.num_running == 1, "it runs")
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(timeout_s: float) -> None:
        hangs.set()
        goes_on.wait(10)

    host.executor.pace.wait = hang  # type: ignore[method-assign,assignment]
    wait_until(hangs.is_set, "the loop hangs")
    gevent.sleep(0.05)  # what was on its way has come
    assert not client.stands_still
    ahead_s = 3600.0
    assert client.stands_still and client.ready
    goes_on.set()
    wait_until(lambda: not client.stands_still, "it moves")
    generation.cancel()
    wait_until(lambda: not host.executor.busy, "nothing runs")
    ahead_s = 7200.0
    wait_until(lambda: not client.stands_still, "an idle host does not stand still")


@pytest.fixture
def bounded(address: str) -> Iterator[EngineClient]:
    """A client of a host that runs four sequences at once and lets one wait, for half a second."""
    running = RunningHost(address, QueueLimits(max_requests=1, max_wait_s=0.5))
    connected = EngineClient(address)
    wait_until(lambda: connected.ready, "the client is ready")
    yield connected
    connected.close()
    running.stop()


def refusal_of(generation: Generation) -> Refusal:
    event = generation.get(10)
    assert event is not None and event[1].refusal is not None, event
    return event[1].refusal


def test_what_finds_no_room_is_refused_at_once_and_workers_hear_of_it(
    bounded: EngineClient,
) -> None:
    running = [bounded.submit([1], [SamplingParams(10**9)]) for _ in range(4)]
    pair = bounded.submit([1], [SamplingParams(1), SamplingParams(1)])
    assert refusal_of(pair).status == 429, "all of an answer's sequences, or none"
    bounded.check_room()
    running.append(bounded.submit([1], [SamplingParams(10**9)]))
    found = refusal_of(bounded.submit([1], [SamplingParams(1)]))
    assert (found.status, found.code, found.retry_after_s) == (429, "queue_full", 5)

    def is_full() -> bool:
        try:
            bounded.check_room()
        except RequestError as error:
            return (error.status, error.retry_after_s) == (429, 5)
        return False

    wait_until(is_full, "the worker heard of it")
    running.pop().cancel()
    wait_until(lambda: not is_full(), "there is room again")
    assert read(bounded.submit([1], [SamplingParams(2)])) == {0: [2, 2]}
    for generation in running:
        generation.cancel()


def test_who_gets_no_token_in_time_is_told_so(
    bounded: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedExecutor, "poll", lambda self, timeout_s: time.sleep(0.01) or [])
    found = refusal_of(bounded.submit([1], [SamplingParams(1)]))
    assert (found.status, found.code) == (503, "queue_timeout")


def test_nonsense_on_the_socket_harms_nobody(address: str, client: EngineClient) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    for data in (b"", b"\xc1", b"\x00" * 1000, msgspec.msgpack.encode({"type": "submit"})):
        socket.send(data)
    socket.send(messages.encode(messages.Hello(version=999)))
    refusal = messages.decode_to_worker(socket.recv())
    assert isinstance(refusal, messages.Refused) and "protocol version 999" in refusal.reason
    socket.close(linger=0)
    context.term()
    assert read(client.submit([1], [SamplingParams(2)])) == {0: [2, 2]}


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_message_error(data: bytes) -> None:
    for decode in (messages.decode_to_host, messages.decode_to_worker):
        try:
            decode(data)
        except messages.MessageError:
            pass


def test_messages_come_back_as_they_were_sent() -> None:
    params = SamplingParams(5, 0.5, 0.9, 40, 0.1, 1.0, -1.0, 1.1, 2**63 - 1, (1, 2), True)
    constraint = Constraint(ConstraintKind.CHOICE, '["a"]', "guided_choice")
    rest = SamplingParams(5, logit_bias=((3, -1.5),), num_logprobs=4, constraint=constraint)
    pooled = SamplingParams(0, pooling=Pooling(PoolingKind.MEAN, 7, normalize=False))
    requests = [Request(7, [1, 2, 3], params), Request(8, [1], rest, -2), Request(9, [1], pooled)]
    submit = messages.Submit(requests)
    assert messages.decode_to_host(messages.encode(submit)) == submit
    logprobs = [TokenLogprobs(-0.25, ((1, -0.25), (2, -3.0)))]
    refused = TokenOutput(8, finish_reason=FinishReason.ERROR, refusal=Refusal("no", "x", "y"))
    outputs = messages.Outputs(
        [TokenOutput(7, [1], FinishReason.STOP, 3, None, logprobs, 2), refused]
    )
    assert messages.decode_to_worker(messages.encode(outputs)) == outputs


def test_the_scores_of_long_prompts_go_in_several_messages() -> None:
    top = tuple((token, -1.5) for token in range(200_000, 200_020))
    scores = [TokenLogprobs(-0.5 - i, top, i) for i in range(10_000)]
    told = [
        TokenOutput(1, prompt_logprobs=scores[:3000]),
        TokenOutput(2, [5], FinishReason.LENGTH, prompt_logprobs=scores),
        TokenOutput(3, [6]),
    ]
    sent = [messages.encode(message) for message in messages.in_messages(told)]
    assert len(sent) == 4 and max(map(len, sent)) < messages.MAX_MESSAGE_BYTES // 4
    found = []
    for data in sent:
        message = messages.decode_to_worker(data)
        assert isinstance(message, messages.Outputs)
        found += message.outputs
    assert [output.request_id for output in found] == [1, 2, 2, 2, 2, 3]
    mine = [output for output in found if output.request_id == 2]
    assert [score for output in mine for score in output.prompt_logprobs or []] == scores
    assert [output.finish_reason for output in mine] == [None, None, None, FinishReason.LENGTH]
    assert (mine[-1].token_ids, found[-1].prompt_logprobs) == ([5], None)
    assert [m.outputs for m in messages.in_messages([told[2]])] == [[told[2]]]


def test_many_embeddings_go_in_several_messages() -> None:
    vector = bytes(4 * 8192)
    told = [TokenOutput(i, [], FinishReason.STOP, embedding=vector) for i in range(1024)]
    assert list(messages.in_messages(told[:60])) == [messages.Outputs(told[:60])]
    sent = [messages.encode(message) for message in messages.in_messages(told)]
    assert max(map(len, sent)) < messages.MAX_MESSAGE_BYTES // 4
    found = map(messages.decode_to_worker, sent)
    assert [output for message in found for output in message.outputs] == told  # type: ignore[union-attr]


def test_a_message_beyond_the_bound_is_refused_on_both_sides() -> None:
    huge = messages.Submit(
        [Request(1, [10**9] * (messages.MAX_MESSAGE_BYTES // 4), SamplingParams(1))]
    )
    with pytest.raises(messages.MessageError, match="at most"):
        messages.encode(huge)
    with pytest.raises(messages.MessageError, match="at most"):
        messages.decode_to_host(b"\x00" * (messages.MAX_MESSAGE_BYTES + 1))


def test_every_flag_of_the_host_reaches_the_executor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[ExecutorOptions, QueueLimits]] = []
    keys: list[HostKey | None] = []

    def serve(engine: Path, at: str, options: ExecutorOptions, *more: Any) -> None:
        asked.append((options, more[1]))
        keys.append(more[2])

    monkeypatch.setattr(process, "serve", serve)
    logged: list[tuple[str, bool, str]] = []
    monkeypatch.setattr(process, "log_to_stderr", lambda *how: logged.append(how))
    wanted = ExecutorOptions(
        max_seq_len=64,
        max_batch_size=2,
        max_num_tokens=32,
        kv_cache_gib=0.5,
        compute_dtype="bfloat16",
        num_threads=3,
        deterministic=True,
        grammar_timeout_s=4.5,
        tp_size=4,
        start_s=60.0,
        device="cuda",
        grammars_at_once=True,
        prefill_ms=12.5,
        speculative="ngram",
        num_speculative_tokens=7,
        max_matching_ngram_size=2,
        speculative_batch_size=3,
        shared_weights=True,
        remote_ranks=RemoteRanks("h:5", Path("k"), 2),
    )
    flags = ["--max-seq-len=64", "--max-batch-size=2", "--max-num-tokens=32", "--kv-cache-gib=0.5"]
    flags += ["--compute-dtype=bfloat16", "--num-threads=3", "--deterministic"]
    flags += ["--grammar-timeout-s=4.5", "--tp-size=4", "--start-s=60", "--device=cuda"]
    flags += ["--log-level=error", "--log-format=json", "--log-traffic", "--prefill-ms=12.5"]
    flags += ["--speculative=ngram", "--num-speculative-tokens=7", "--max-matching-ngram-size=2"]
    flags += [
        "--speculative-batch-size=3",
        "--shared-weights",
        "--max-queue-requests=5",
        "--max-queue-tokens=6",
    ]
    flags += ["--max-queue-s=7.5", "--ranks-address=h:5", "--ranks-key-file=k", "--local-ranks=2"]
    for refused in ("tcp://0.0.0.0:5555", "tcp://127.0.0.1:5555"):
        with pytest.raises(SystemExit):
            process.main([str(tmp_path), "--address", refused])
    assert not asked
    command = [str(tmp_path), "--address", "ipc://x"]
    assert process.main([*command, *flags]) == process.main(command) == 0
    opened = [str(tmp_path), "--address", "tcp://127.0.0.1:5555", "--open-host"]
    assert process.main(opened) == 0 and len(asked) == 3
    (tmp_path / "key").write_text("k" * 32)
    locked = [*opened[:-1], "--key-file", str(tmp_path / "key")]
    assert process.main(locked) == 0 and [key is not None for key in keys] == [False] * 3 + [True]
    del asked[2:], logged[2:]
    plain = ExecutorOptions(grammars_at_once=True)
    assert asked == [(wanted, QueueLimits(5, 6, 7.5)), (plain, QueueLimits())]
    assert logged == [("error", True, "json"), ("info", False, "text")]
    assert all(getattr(wanted, f) != getattr(ExecutorOptions(), f) for f in wanted._fields)


def test_a_host_makes_its_socket_again_and_ends_when_its_engine_is_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "open_executor", lambda *args: ScriptedExecutor())
    monkeypatch.setattr(process.signal, "signal", lambda *args: None)
    path, socket = tmp_path / "engine" / "packed.safetensors", tmp_path / "socket"
    path.parent.mkdir()
    path.write_bytes(b"w" * 4096)
    again: list[bool] = []

    def harm() -> None:
        try:
            for _ in range(2):
                wait_until(socket.exists, "it listens")
                socket.unlink()
                again.append(True)
        finally:
            with path.open("r+b") as file:
                file.write(b"x")

    thread = threading.Thread(target=harm)
    thread.start()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        with pytest.raises(EngineError, match="packed.safetensors was changed while it is served"):
            process.serve(path.parent, f"ipc://{socket}", ExecutorOptions(), None)
    thread.join()
    assert again == [True, True]
