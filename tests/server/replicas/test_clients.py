"""Several hosts behind one client: lost, exchanged, full and gone, over real sockets."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest

from doubles.replica_hosts import ReplicaHost, name_hosts
from enginehouse.runtime.errors import EnginehouseError, HostUnavailable, RequestError
from enginehouse.runtime.host import process
from enginehouse.runtime.host.admission import QueueLimits
from enginehouse.runtime.request import SamplingParams
from enginehouse.server.replicas import clients
from enginehouse.server.replicas.clients import ReplicaClients
from enginehouse.server.replicas.generation import ReplicaGeneration
from enginehouse.server.replicas.prefix_router import RoundRobin
from enginehouse.server.replicas.replicas_file import Replica, read_replicas, write_replicas

Start = Callable[..., ReplicaHost]
OLD, NEW = "sha256:old", "sha256:new"


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_IDLE_POLL_MS", 5)
    monkeypatch.setattr(process, "_STATS_PERIOD_S", 0.05)
    monkeypatch.setattr(clients, "_LOOK_S", 0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[ReplicaHost] = []

    def begin(name: str, digest: str = OLD, limits: QueueLimits | None = None) -> ReplicaHost:
        started.append(ReplicaHost(tmp_path, name, digest, limits or QueueLimits()))
        return started[-1]

    yield begin
    for host in started:
        host.stop()


@pytest.fixture
def open_clients(tmp_path: Path) -> Iterator[Callable[..., ReplicaClients]]:
    opened: list[ReplicaClients] = []

    def begin(digest: str | None = OLD, **more: object) -> ReplicaClients:
        opened.append(ReplicaClients(tmp_path / "replicas.json", digest, **more))  # type: ignore[arg-type]
        return opened[-1]

    yield begin
    for each in opened:
        each.close()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    with gevent.Timeout(10, AssertionError(f"never happened: {what}")):
        while not condition():
            gevent.sleep(0.005)


def all_ready(client: ReplicaClients, count: int) -> bool:
    found = client.replicas().values()
    return len(found) == count and all(each.ready for each in found)


def read(generation: ReplicaGeneration) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while not generation.finished:
        event = generation.get(10)
        assert event is not None, "nothing came within ten seconds"
        tokens.setdefault(event[0], []).extend(event[1].token_ids)
    return tokens


def test_requests_are_spread_and_each_choice_gets_its_own_tokens(
    tmp_path: Path, start: Start, open_clients: Callable[..., ReplicaClients]
) -> None:
    client = open_clients(router=RoundRobin())
    with pytest.raises(HostUnavailable, match="no replica"):
        _ = client.info
    assert not client.ready
    hosts = start("a"), start("b")
    name_hosts(tmp_path / "replicas.json", *hosts)
    wait_until(lambda: all_ready(client, 2), "both are found")
    for _ in range(4):
        generation = client.submit([1, 2, 3], [SamplingParams(4), SamplingParams(2)])
        assert read(generation) == {0: [2, 3, 4, 2], 1: [2, 3]}
    assert [host.executor.num_taken for host in hosts] == [4, 4]
    wait_until(lambda: client.stats.num_generated_tokens == 24, "their figures are summed")
    assert client.info.digest == OLD and not client.stands_still


def test_a_replica_lost_before_the_first_token_is_nobodys_error(
    tmp_path: Path, start: Start, open_clients: Callable[..., ReplicaClients]
) -> None:
    """And one lost after it is told."""
    hosts = {name: start(name) for name in "ab"}
    name_hosts(tmp_path / "replicas.json", *hosts.values())
    client = open_clients(router=RoundRobin())
    wait_until(lambda: all_ready(client, 2), "both are found")
    hosts["a"].executor.held.set()
    waiting = client.submit([5, 6], [SamplingParams(3)] * 3)
    waiting.cancel(1)
    begun = client.submit([7], [SamplingParams(9)])
    hosts["b"].executor.held.set()  # after one output at least, or before any
    other = gevent.spawn(read, waiting)
    wait_until(lambda: hosts["a"].executor.num_taken == 3, "they are there")
    hosts["b"].executor.held.clear()
    hosts["a"].stop()
    assert other.get(timeout=10) == {0: [6, 7, 6], 2: [6, 7, 6]}
    assert read(begun) == {0: [8] * 9} and waiting.name == "b"
    last = client.submit([7], [SamplingParams(1000)])
    assert last.get(10) is not None
    hosts["b"].stop()
    with pytest.raises(HostUnavailable):
        read(last)
    wait_until(lambda: not client.ready, "nobody is left")
    with pytest.raises(HostUnavailable, match="no replica"):
        client.submit([7], [SamplingParams(1)])


def test_an_update_under_load_is_nobodys_error(
    tmp_path: Path, start: Start, open_clients: Callable[..., ReplicaClients]
) -> None:
    """Workers of the old engine and of the new one, while replicas come and go one by one."""
    path = tmp_path / "replicas.json"
    old, new = [start("a"), start("b")], []
    name_hosts(path, *old)
    workers = {OLD: open_clients(OLD)}
    wait_until(lambda: all_ready(workers[OLD], 2), "both are found")
    ended, answers = threading.Event(), list[int]()
    rng = random.Random(6)

    def ask(digest: str) -> None:
        while not ended.is_set():
            prompt = [rng.randrange(3, 90) for _ in range(9)]
            found = read(workers[digest].submit(prompt, [SamplingParams(5)]))
            assert found == {0: [token + 1 for token in prompt[:5]]}
            answers.append(digest == NEW)

    asking = [gevent.spawn(ask, OLD) for _ in range(4)]
    for number, host in enumerate(old):
        new.append(start(f"n{number}", NEW))
        name_hosts(path, *new, *old[number:])
        gevent.sleep(0.1)
        if number == 0:  # whoever updates starts workers anew once one of the new engine is ready
            workers[NEW] = open_clients(NEW)
            wait_until(lambda: all_ready(workers[NEW], 1), "the new one is found, and it alone")
            asking += [gevent.spawn(ask, NEW) for _ in range(4)]
        elif number == 1:
            ended.set()
            gevent.joinall(asking[:4], timeout=10, raise_error=True)
            ended.clear()
        name_hosts(path, *new, *old[number + 1 :])
        wait_until(lambda h=host: not h.executor.busy, "it has drained")  # type: ignore[misc]
        gevent.sleep(0.05)
        host.stop()
    gevent.sleep(0.1)
    ended.set()
    gevent.joinall(asking, timeout=10, raise_error=True)
    assert answers.count(True) > 20 and answers.count(False) > 20
    wait_until(lambda: workers[OLD].info.digest == NEW, "a worker of the old engine sees it")


def test_what_a_replica_that_leaves_runs_is_read_to_its_end(
    tmp_path: Path, start: Start, open_clients: Callable[..., ReplicaClients]
) -> None:
    hosts = start("a"), start("b")
    path = tmp_path / "replicas.json"
    name_hosts(path, hosts[0])
    client = open_clients()
    wait_until(lambda: all_ready(client, 1), "it is found")
    hosts[0].executor.held.set()
    generation = client.submit([5], [SamplingParams(6)])
    name_hosts(path, hosts[1])
    wait_until(lambda: all_ready(client, 2), "the other is found, and the first is there still")
    assert read(client.submit([8], [SamplingParams(1)])) == {0: [9]}
    assert [host.executor.num_taken for host in hosts] == [1, 1]
    hosts[0].executor.held.clear()
    assert read(generation) == {0: [6] * 6}
    wait_until(lambda: set(client.replicas()) == {"b"}, "it is let go")


def test_one_that_is_full_is_passed_over_and_all_that_are_say_so(
    tmp_path: Path, start: Start, open_clients: Callable[..., ReplicaClients]
) -> None:
    limits = QueueLimits(1, 1000, 60.0)
    hosts = [start("a", OLD, limits), start("b", OLD, limits)]
    name_hosts(tmp_path / "replicas.json", *hosts)
    client = open_clients(router=RoundRobin())
    wait_until(lambda: all_ready(client, 2), "both are found")
    full = len(hosts) * 5  # a batch of 4 and one that waits, each
    for host in hosts:
        host.executor.held.set()
    kept = []
    for _ in range(full):
        kept.append(client.submit([5], [SamplingParams(2)]))
        gevent.sleep(0.02)
    wait_until(lambda: _is_full(client), "neither has room")
    assert [host.executor.num_taken for host in hosts] == [5, 5]
    for host in hosts:
        host.executor.held.clear()
    assert [read(each) for each in kept] == [{0: [6, 6]}] * full
    wait_until(lambda: not _is_full(client), "there is room again")


def _is_full(client: ReplicaClients) -> bool:
    try:
        client.check_room()
    except RequestError:
        return True
    return False


def test_the_file_is_read_whole_and_a_bad_one_changes_nothing(
    tmp_path: Path,
    start: Start,
    open_clients: Callable[..., ReplicaClients],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "replicas.json"
    replicas = [Replica("b", "ipc:///b", None), Replica("a", "tcp://10.0.0.1:1", OLD)]
    write_replicas(path, replicas)
    assert read_replicas(path) == tuple(reversed(replicas)) and len(list(tmp_path.iterdir())) == 1
    client = open_clients()
    assert set(client.replicas()) == {"b"}, "a host on the network is asked for a key"
    assert "ENGINEHOUSE_HOST_KEY_FILE" in caplog.text
    for text in ("", "[]", '{"replicas": [{"name": "c"}]}', '{"replicas": 1}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(EnginehouseError, match="wanted"):
            read_replicas(path)
        gevent.sleep(0.03)
        assert set(client.replicas()) == {"b"}
    with pytest.raises(EnginehouseError, match="twice"):
        write_replicas(path, [replicas[0]] * 2)
        read_replicas(path)
    assert set(open_clients(is_open=True).replicas()) == set()
