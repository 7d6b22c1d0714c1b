"""The data-centre package, where it differs from TensorRT-RTX: against a strict double of those
parts of its API, over the recording network. Nothing here is TensorRT 11's compiler.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from doubles.recording_network import RecordingNetwork
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.tensorrt.compile import compile_plan, load_tensorrt
from enginehouse.build.tensorrt.compiler import check_compiler
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.machine.gpus import Gpu
from enginehouse.runtime.tensorrt.package import PACKAGES
from makers.engines import build_engine
from makers.tiny_network import TINY, tiny_config

H100 = Gpu(0, "GPU-0", "NVIDIA H100", 90, 81559, 81000, "580.1")
L40S = H100._replace(name="NVIDIA L40S", sm=89)


class StrictBuilderConfig:
    """IBuilderConfig of 11: a target is nothing that can be set."""

    __slots__ = ("profiles", "progress_monitor")

    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class Builder:
    """IBuilder of 11: every network is strongly typed, without a flag that says so."""

    built: list[tuple[RecordingNetwork, StrictBuilderConfig]] = []

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> RecordingNetwork:
        assert flags == 0, "there is no such flag"
        return RecordingNetwork()

    def create_builder_config(self) -> StrictBuilderConfig:
        return StrictBuilderConfig()

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, *sizes: shapes.setdefault(name, sizes)
        )

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        self.built.append((network, config))
        return b"plan"


def data_centre(version: str = "11.4.0.106") -> SimpleNamespace:
    names = dict(vars(load_tensorrt()))
    del names["ComputeCapability"]
    names |= dict(__name__="tensorrt", __version__=version, Builder=Builder)
    lacking = ("NetworkDefinitionCreationFlag", "BuilderFlag")  # what only TensorRT-RTX's have
    return SimpleNamespace(**names | {name: SimpleNamespace() for name in lacking})


@pytest.mark.parametrize("quant", ["none", "fp8", "int4"])
def test_the_same_network_is_built_without_naming_a_target(quant: str) -> None:
    config = tiny_config(quant, tp=2)
    assert compile_plan(data_centre(), config, [90], TINY).plan == b"plan"
    network, builder_config = Builder.built.pop()
    decode, prefill = builder_config.profiles
    dynamic = {name for name, (_, shape, _) in network.inputs.items() if -1 in shape}
    assert decode.keys() == prefill.keys() == dynamic
    assert decode["input_ids"] == ((1, 1), (8, 1), (8, 1))


MACHINES: list[tuple[list[Gpu], str | None, str]] = [
    ([], "11.4.0.106", "compiles for SM90 on a machine with such a GPU only, and none is here;"),
    ([L40S], "11.4.0.106", r"the first here is NVIDIA L40S \(SM89\); build there, or choose back"),
    ([H100], None, "TensorRT is not installed, which compiles for backend=tensorrt; pip install"),
    ([H100], "10.14.1.48", "TensorRT 10.14.1.48 is installed, and backend=tensorrt needs 11 or la"),
]


@pytest.mark.parametrize(("gpus", "version", "wanted"), MACHINES)
def test_what_keeps_it_from_compiling_is_one_sentence(
    gpus: list[Gpu],
    version: str | None,
    wanted: str,
    tiny_source: SourceCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a weight is read; a plan without GPU or package is still shown."""
    compiler = "enginehouse.build.tensorrt.compiler"
    package = None if version is None else data_centre(version)
    monkeypatch.setattr(f"{compiler}.visible_gpus", lambda: gpus)
    monkeypatch.setattr(f"{compiler}.find_package", lambda name: package)
    settings = dict(backend="tensorrt", quant="fp8", gpu="h100")
    plan = make_plan(load_settings({**settings, "until": "plan"}), tiny_source)
    assert (plan.package, plan.targets) == ("tensorrt", (90,))
    with pytest.raises(EngineError, match=wanted) as caught:
        build_engine(tiny_source, tmp_path / "e", **settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "e").exists()


def test_with_package_and_gpu_it_is_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, package = "enginehouse.build.tensorrt.compiler", data_centre()
    monkeypatch.setattr(f"{compiler}.visible_gpus", lambda: [H100, H100])
    monkeypatch.setattr(f"{compiler}.find_package", {"tensorrt": package}.get)
    assert check_compiler("tensorrt", (90,)) is package
    assert set(PACKAGES) == {"tensorrt", "tensorrt_rtx"}
