"""The comparison of two runs as an object (`traceml.compare/1`), and of several (`traceml.compares/1`)."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any, Literal

import msgspec

from traceml.runs.json_document import JsonDocument
from traceml.runs.report.report_types import TimeSection

__all__ = [
    "Comparison", "Comparisons", "MemoryChange", "MemoryChanges", "MetricChange", "ParamChange", "PhaseChange",
    "RankChange", "RunSide", "StatisticChange", "StepTimeChanges", "TextChange", "VerdictChange", "run_letter",
]  # fmt: skip


class RunSide(msgspec.Struct, kw_only=True):
    """One of the two runs."""

    id: str
    name: str
    state: str
    started: float | None
    duration_s: float | None
    world_size: int
    hosts: list[str]
    command: str | list[str]
    steps: int
    compared_steps: int
    per_second: float | None
    samples_per_step: float | None = None
    model: dict[str, Any]
    core_wait_share: float | None
    verdict: str
    time: TimeSection | None = None


class StatisticChange(msgspec.Struct, kw_only=True):
    """A statistic of step time; `change`, `low` and `high` are shares of A's, the last two at 99 % confidence."""

    a_ms: float | None
    b_ms: float | None
    change: float | None
    low: float | None
    high: float | None
    p: float | None
    real: bool | None

    @property
    def significant(self) -> str:
        """Whether the change is significant: yes, no or unknown."""
        return {True: "yes", False: "no", None: "unknown"}[self.real]


class StepTimeChanges(msgspec.Struct, kw_only=True):
    """Step time by statistic."""

    mean: StatisticChange
    p50: StatisticChange
    p95: StatisticChange
    p99: StatisticChange

    def items(self) -> list[tuple[str, StatisticChange]]:
        """Return (name, statistic)."""
        return [(name, getattr(self, name)) for name in self.__struct_fields__]


class PhaseChange(msgspec.Struct, kw_only=True):
    """Mean time of a phase over all ranks."""

    phase: str
    a_ms: float
    b_ms: float
    delta_ms: float


class RankChange(msgspec.Struct, kw_only=True):
    """A rank's own work per step, and the phase that changed it most."""

    rank: int
    a_work_ms: float | None
    b_work_ms: float | None
    change: float | None
    phase: str | None
    phase_delta_ms: float | None

    @property
    def delta_ms(self) -> float:
        """B's work minus A's; 0 if one of them is unknown."""
        return 0.0 if self.a_work_ms is None or self.b_work_ms is None else self.b_work_ms - self.a_work_ms


class MemoryChange(msgspec.Struct, kw_only=True):
    """The highest peak over ranks."""

    a: int | None
    b: int | None
    change: float | None


class MemoryChanges(msgspec.Struct, kw_only=True):
    """Peaks of resident and of device memory."""

    rss_peak_bytes: MemoryChange
    cuda_peak_bytes: MemoryChange

    def items(self) -> list[tuple[str, MemoryChange]]:
        """Return (label, change)."""
        return [("resident peak", self.rss_peak_bytes), ("device peak", self.cuda_peak_bytes)]


class VerdictChange(msgspec.Struct, kw_only=True):
    """Verdicts of both runs, and the kinds of finding that only one of them has."""

    a: str
    b: str
    changed: bool
    appeared: list[str]
    gone: list[str]


class MetricChange(msgspec.Struct, kw_only=True):
    """Last values of a metric; `change` is None if one is negative or not a finite number."""

    name: str
    a: float | None
    b: float | None
    change: float | None


class ParamChange(msgspec.Struct, kw_only=True):
    """A logged parameter with another value in B; None if it was not logged."""

    name: str
    a: bool | int | float | str | None
    b: bool | int | float | str | None


class TextChange(msgspec.Struct, kw_only=True):
    """A version of a package or the value of a variable that differs in B; None if a run has none."""

    name: str
    a: str | None
    b: str | None


class Comparison(JsonDocument, msgspec.Struct, kw_only=True):
    """Differences from run A to run B.

    Attributes:
        outcome: of the mean step time, or of the mean time per sample: slower, faster, same, or unknown.
        comparable: whether the difference can be judged.
        obstacles: reasons why the two cannot be measured against each other.
        remarks: other differences.
        sample_time: the mean time per sample, if steps have other numbers of samples in B; then the outcome is of it.
        phases: those that changed most first.
        metrics: last values of metrics in both runs, losses first.
        params: parameters that differ.
        packages, variables: those that differ; none where those of a run are not known.
    """

    schema: Literal["traceml.compare/1"] = "traceml.compare/1"
    a: RunSide
    b: RunSide
    outcome: Literal["slower", "faster", "same", "unknown"]
    comparable: bool
    obstacles: list[str]
    remarks: list[str]
    step_time: StepTimeChanges
    sample_time: StatisticChange | None = None
    phases: list[PhaseChange]
    ranks: list[RankChange]
    memory: MemoryChanges
    verdict: VerdictChange
    metrics: list[MetricChange] = []
    params: list[ParamChange] = []
    packages: list[TextChange] = []
    variables: list[TextChange] = []

    @property
    def notes(self) -> list[str]:
        """The obstacles, then the remarks."""
        return [*self.obstacles, *self.remarks]

    @property
    def unit(self) -> Literal["sample", "step"]:
        """Unit whose mean time determines the outcome."""
        return "sample" if self.sample_time else "step"

    @property
    def units_per_step(self) -> tuple[float, float]:
        """Number of them in a step of each run."""
        return (self.a.samples_per_step or 1.0, self.b.samples_per_step or 1.0) if self.sample_time else (1.0, 1.0)

    @property
    def judged(self) -> StatisticChange:
        """The statistic that determines the outcome."""
        return self.sample_time or self.step_time.mean


class Comparisons(JsonDocument, msgspec.Struct, kw_only=True):
    """Several runs, each compared with the same baseline: A in all notes. The others are B, C and so on, in order."""

    schema: Literal["traceml.compares/1"] = "traceml.compares/1"
    baseline: str
    comparisons: list[Comparison]


def run_letter(number: int) -> str:
    """Return the name of a compared run in notes, tables and charts: A is the baseline, B the next; A1 follows Z."""
    again, place = divmod(number, len(ascii_uppercase))
    return f"{ascii_uppercase[place]}{again or ''}"
