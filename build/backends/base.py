"""What a backend is to a build, and what the stages of one build hand on to each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from enginehouse.build.convert.journal import Journal
from enginehouse.build.convert.shares import Share
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.build.progress import BuildProgress
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.engine import Manifest, StageRecord


class BuildResult(NamedTuple):
    """path: what was made, or was there already. finish_commands: what the GPU machine must run,
    ours or trtllm-build's own.
    """

    path: Path | None
    manifest: Manifest | None = None
    reused: bool = False
    finish_commands: tuple[str, str] | None = None


@dataclass
class Build:
    """One build under way. A stage fills in what later ones need; `result` ends the build."""

    settings: BuildSettings
    source: SourceCheckpoint
    progress: BuildProgress
    backend: Backend
    plan: BuildPlan = field(init=False)
    output: Path = field(init=False)  # where the finished folder will stand
    record: dict[str, Any] = field(default_factory=dict)  # of the source: names and digests
    directory: Path = field(init=False)  # the hidden folder that is being filled
    journal: Journal = field(init=False)
    reference: ReferenceModel = field(init=False)
    manifest: Manifest | None = None
    share: Share | None = None  # only this is converted, and nothing else made
    joins: bool = False  # shares that lie beside the output are taken
    costs: list[StageRecord] = field(default_factory=list)  # of the stages that have run
    result: BuildResult | None = None
    folders: ExitStack = field(default_factory=ExitStack)  # what is undone when the build ends

    @property
    def is_bare(self) -> bool:
        """Whether only the checkpoint's files are asked for: no tokenizer, no manifest."""
        return self.settings.until == "convert" and self.settings.format != "hf"


class Stage(NamedTuple):
    """run: does the stage, with its line of progress. resume: its rule, whether an earlier build
    has left all that it makes; what is left in part is `run`'s own business.
    """

    name: str
    run: Callable[[Build], None]
    resume: Callable[[Build], bool] = lambda work: False


class Backend(Protocol):
    """One way to turn a plan into something that serves. Holds no state."""

    def stages(self, until: str) -> tuple[Stage, ...]:
        """What follows the plan, up to the stage that `until` names."""

    def check(self, work: Build) -> None:
        """Refuse what cannot work on this machine, before a weight is read: an EnginehouseError."""

    def still_fits(self, manifest: Manifest, plan: BuildPlan) -> bool:
        """Whether an engine of these very choices would come out the same here, today."""
