"""What keeps an engine of TensorRT plans from running: one sentence, before anything is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from doubles.tensorrt_double import HEADER, STREAM, TensorRTDouble
from doubles.tensorrt_machine import RUNTIME, doubled_engine, doubled_machine, gpus
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.engine import read_engine, write_manifest
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.tensorrt import package
from enginehouse.runtime.tensorrt.followers import Followers
from enginehouse.runtime.tensorrt.machine import check_plan, find_matching
from enginehouse.runtime.tensorrt.manifest import read_built
from enginehouse.runtime.tensorrt.package import Words, find_package
from makers.engines import SourceMaker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For two GPUs of SM89, in float32."""
    path = tmp_path_factory.mktemp("tensorrt") / "e"
    return doubled_engine(family_source("llama"), path, quant="none", tp=2, max_seq_len=64)


def refused(engine: Path, monkeypatch: pytest.MonkeyPatch, **machine: Any) -> str:
    """The sentence; nothing was read of the weights and no plan was loaded."""
    loaded: list[str] = []
    for name in ("TensorRTRank", "Followers"):
        monkeypatch.setattr(
            f"{RUNTIME}.tensorrt.executor.{name}", lambda *_, name=name: loaded.append(name)
        )
    with doubled_machine(monkeypatch, **machine):
        with pytest.raises(EngineError) as caught:
            open_executor(engine)
    assert not loaded
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.count(str(engine)) <= 1
    return sentence.replace(str(engine), "E")


@pytest.mark.parametrize(
    ("count", "sm", "sentence"),
    [
        (
            0,
            89,
            "E holds TensorRT plans, which need a GPU with SM89 and NVIDIA's driver, and "
            "nvidia-smi shows none here; to run and verify the model on a CPU, build it with "
            "--backend torch",
        ),
        (
            1,
            89,
            "E was cut for 2 GPUs and 1 are visible; show it more (CUDA_VISIBLE_DEVICES), or build "
            "it with --tp 1",
        ),
        (
            2,
            86,
            "E holds plans for SM89 and GPU 0 is NVIDIA Double86 (SM86); build it with --sm 86, or "
            "show it another GPU",
        ),
        *(
            (
                2,
                sm,
                "E holds plans of TensorRT-RTX for SM89, and TensorRT-RTX has no target for NVIDIA "
                f"Double{sm} (SM{sm}); build it with --backend tensorrt_llm for this GPU",
            )
            for sm in (90, 100)
        ),
    ],
)
def test_gpus_that_do_not_fit(
    engine: Path, monkeypatch: pytest.MonkeyPatch, count: int, sm: int, sentence: str
) -> None:
    assert refused(engine, monkeypatch, count=count, sm=sm) == sentence


def test_one_gpu_of_another_kind_among_them(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with doubled_machine(monkeypatch, 2):
        unlike = [*gpus(1), gpus(2)[1]._replace(sm=120)]
        monkeypatch.setattr(f"{RUNTIME}.tensorrt.machine.visible_gpus", lambda: unlike)
        with pytest.raises(EngineError, match="GPU 1 is NVIDIA Double89 .SM120.; build it with"):
            open_executor(engine)


def test_no_package_and_another_version(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_engine(engine)
    built = read_built(read)
    monkeypatch.setattr(f"{RUNTIME}.tensorrt.machine.find_package", lambda name: None)
    wanted = "TensorRT-RTX .* which is not installed; pip install 'enginehouse.tensorrt.'$"
    with pytest.raises(EngineError, match=wanted):
        find_matching(read, built)
    trt = TensorRTDouble()
    trt.__version__ = "1.6.0"
    monkeypatch.setattr(f"{RUNTIME}.tensorrt.machine.find_package", lambda name: trt)
    wanted = f"{built.version} and 1.6.0 is installed, .* install {built.version} or build the"
    with pytest.raises(EngineError, match=wanted):
        find_matching(read, built)


def test_the_package_is_found_under_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_package("tensorrt_rtx") is not None, "the tests' environment has it"
    missing = package.Package("None", ("no_such_tensorrt",), "")
    monkeypatch.setitem(package.PACKAGES, "tensorrt", missing)
    assert find_package("tensorrt") is None


def test_a_gpu_that_torch_does_not_see(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with doubled_machine(monkeypatch, 2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(EngineError, match="torch .* finds no GPU; install a CUDA build"):
            open_executor(engine)


def damage_rank(path: Path) -> None:
    data = bytearray((path / "rank1.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "rank1.safetensors").write_bytes(data)


def cut_plan(path: Path) -> None:
    (path / "decoder-64.plan").write_bytes((path / "decoder-64.plan").read_bytes()[:-1])


def forget_plans(path: Path) -> None:
    manifest = read_engine(path).manifest
    write_manifest(path, msgspec.structs.replace(manifest, tensorrt={"package": "tensorrt_rtx"}))


def name_no_plan(path: Path) -> None:
    manifest = read_engine(path).manifest
    built = {**(manifest.tensorrt or {}), "plans": []}
    write_manifest(path, msgspec.structs.replace(manifest, tensorrt=built))


def test_a_host_says_why_and_ends(engine: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "enginehouse.runtime.host.process",
        str(engine),
        "--address",
        f"ipc://{tmp_path}/engine",
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PATH": str(tmp_path)}
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"enginehouse-host: {engine} holds TensorRT plans, which need a GPU with SM89 and NVIDIA's "
        "driver, and nvidia-smi shows none here; to run and verify the model on a CPU, build it "
        "with --backend torch"
    ]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_rank, "rank1.safetensors: its SHA-256 is not the manifest's; .* build the engine"),
        (cut_plan, "decoder-64.plan: .* bytes; the manifest says .* bytes: build the engine again"),
        (forget_plans, "does not describe its TensorRT plans: .*missing.*; build it again"),
        (name_no_plan, "0 plans, .* wanted tensorrt_rtx or tensorrt and one plan or more"),
    ],
)
def test_a_damaged_engine(
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    sentence: str,
) -> None:
    path = tmp_path / "e"
    shutil.copytree(engine, path)
    damage(path)
    with doubled_machine(monkeypatch, 2), pytest.raises(EngineError, match=sentence):
        open_executor(path)


def test_what_tensorrt_says_of_a_plan_is_told(engine: Path, tmp_path: Path) -> None:
    plan, trt = engine / "decoder-64.plan", TensorRTDouble()
    runtime = trt.Runtime(Words(trt).logger)
    check_plan(trt, runtime, plan)
    broken = tmp_path / "decoder-64.plan"
    broken.write_bytes(b"x" * HEADER)
    with pytest.raises(EngineError, match="decoder-64.plan is no plan, or a damaged one; build"):
        check_plan(trt, runtime, broken)
    for change, sentence in (
        (dict(sm=120), "was not compiled for this GPU; build it with --sm"),
        (dict(__version__="2.0"), "was compiled by another version of it; build the engine again"),
    ):
        other = TensorRTDouble()
        vars(other).update(change)
        with pytest.raises(EngineError, match=sentence):
            check_plan(other, other.Runtime(None), plan)


def test_the_real_runtime_knows_its_plans_from_others(tmp_path: Path) -> None:
    """Without a driver it says INVALID of both, and only of one that it is malformed."""
    trt: Any = find_package("tensorrt_rtx")
    runtime = trt.Runtime(Words(trt).logger)
    (tmp_path / "x.plan").write_bytes(b"x" * runtime.engine_header_size)
    with pytest.raises(EngineError, match="x.plan is no plan, or a damaged one; build the engine"):
        check_plan(trt, runtime, tmp_path / "x.plan")


def test_a_plan_of_another_model_is_found_out_before_it_runs(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of another size, one that is missing, and caches that are not written in place."""
    with doubled_machine(monkeypatch, 2):
        executor = open_executor(engine)
        rank = executor.runner._rank  # type: ignore[attr-defined]
        (plan,), weights = rank.plans, rank._weights
        bound = (plan.caches, rank._fed, rank._hidden, rank.logits)
        head = {**weights, "lm_head.weight": weights["lm_head.weight"][:1]}
        with pytest.raises(EngineError, match=r"lm_head.weight is .* wants FLOAT \[.*; build the"):
            plan.bind(head, *bound)
        del head["lm_head.weight"]
        with pytest.raises(EngineError, match="do not fit: lm_head.weight is in one of them only"):
            plan.bind(head, *bound)
        monkeypatch.setattr(plan.parts[0].file.engine, "get_aliased_input_tensor", lambda name: "")
        with pytest.raises(EngineError, match="does not write its caches in place"):
            plan.bind(weights, *bound)
        executor.close()


def test_a_cache_too_small_for_one_sequence(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with doubled_machine(monkeypatch, 2):
        with pytest.raises(EngineError, match="one sequence of 64 tokens needs .* GiB: raise kv_"):
            open_executor(engine, ExecutorOptions(kv_cache_gib=1e-6))


def test_words_of_the_compiler_reach_the_error_once() -> None:
    trt = TensorRTDouble()
    words = Words(trt)
    words.logger.log(trt.ILogger.Severity.INFO, "all is well")
    words.logger.log(trt.ILogger.Severity.ERROR, "no\n kernel")
    assert str(words.refused("cannot run x")) == "TensorRT cannot run x: no kernel"
    assert str(words.refused("cannot run x")) == "TensorRT cannot run x: it gave no reason"


def follower(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Followers are processes of this code, as if each were a rank."""
    real = Followers.__init__.__globals__["subprocess"].Popen

    def start(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "enginehouse.runtime.tensorrt.rank"]
        fd = command[command.index("--pipe") + 1]
        return real([sys.executable, "-S", "-c", code, fd], **options)

    monkeypatch.setattr(f"{RUNTIME}.tensorrt.followers.subprocess.Popen", start)


def test_a_rank_that_ends_ends_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    follower(monkeypatch, "raise SystemExit(7)")
    died: list[float] = []
    followers = Followers(tmp_path, 3, 64, lambda: died.append(time.monotonic()))
    sentence = r"rank [12] of 3 ended \(.*\), without which the engine cannot go on; .*: start it"
    with pytest.raises(EngineError, match=sentence):
        followers.answers()
    deadline_s = time.monotonic() + 20
    while not died:
        assert time.monotonic() < deadline_s, "nobody noticed"
    with pytest.raises(EngineError, match=sentence):
        followers.tell(b"")
    followers.close()


def test_ranks_end_with_the_leader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real pipe of a real process: words both ways, and the end of it."""
    code = (
        "import sys; from multiprocessing.connection import Connection as C\n"
        "pipe = C(int(sys.argv[1])); pipe.send_bytes(b'{\"free_bytes\": 5}')\n"
        "while True:\n"
        "    try: pipe.send_bytes(b'{\"told\": %d}' % len(pipe.recv_bytes()))\n"
        "    except EOFError: sys.exit(0)"
    )
    follower(monkeypatch, code)
    died: list[int] = []
    followers = Followers(tmp_path, 2, 64, lambda: died.append(1))
    assert followers.answers() == [{"free_bytes": 5}]
    followers.tell(b"abc")
    assert followers.answers() == [{"told": 3}]
    followers.close()
    assert not died and [p.returncode for p in followers._processes] == [0]


def test_a_rank_process_says_why_it_cannot_run(engine: Path) -> None:
    """The real process of a rank, on this machine without a GPU, with a plan that is a double's."""
    followers = Followers(engine, 2, 64, lambda: None)
    with pytest.raises(EngineError, match="^rank 1 of 2: .*; install a CUDA build of torch"):
        followers.answers()
    followers.close()


def test_a_rank_lost_in_the_middle_is_one_sentence(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with doubled_machine(monkeypatch, 2):
        executor = open_executor(engine)
        executor.submit(Request(1, [5, 6, 7], SamplingParams(9, 0.0, ignore_eos=True)))
        executor.poll()
        runner = executor.runner  # type: ignore[attr-defined]
        runner._followers._failure = runner._followers._sentence(1, "exit status -9")
        runner._abort()
        with pytest.raises(EngineError, match=r"^rank 1 of 2 ended \(exit status -9\), without"):
            executor.poll()
        assert runner._rank.communicator.aborted
        executor.close()


def test_the_double_refuses_what_tensorrt_would(
    engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step with an address of nobody's, one past a cache's end, and shapes outside a profile."""
    with doubled_machine(monkeypatch, 2) as trt:
        executor = open_executor(engine)
        work = [Request(1, [5, 6, 7], SamplingParams(3, 0.0, ignore_eos=True))]
        assert len(generate(executor, work)[1]) == 3
        mine = [c for c in trt.contexts if c.stream == STREAM]
        decode = next(c for c in mine if c.profile == 0 and c.addresses)
        assert not decode.set_input_shape("input_ids", (9, 1)), "the profile ends at 8"
        assert not decode.set_input_shape("input_ids", (1, 2)), "decoding takes one token"
        with pytest.raises(AssertionError, match="another stream"):
            decode.execute_async_v3(STREAM + 1)
        kept = dict(decode.addresses)
        decode.addresses["logits"] = 4096
        with pytest.raises(AssertionError, match="are in no tensor"):
            decode.execute_async_v3(STREAM)
        decode.addresses = {**kept, "present_key_0": kept["past_key_1"]}
        with pytest.raises(AssertionError, match="present_key_0 is not over past_key_0"):
            decode.execute_async_v3(STREAM)
        decode.addresses = {**kept, "logits": kept["past_key_0"]}
        with pytest.raises(AssertionError, match="lies over"):
            decode.execute_async_v3(STREAM)
        del decode.addresses["input_ids"]
        assert decode.execute_async_v3(STREAM) is False
        decode.addresses = kept
        executor.close()
