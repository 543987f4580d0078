"""View models: what a screen shows of a run, read once from the report's shape and typed from there on.

A report from disk and the report so far of a running job have the same shape (`traceml.report/1`), so the card at the
end and the live view cannot disagree. Anything a report does not know is None here and a dash on the screen.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from traceml.formatting import count_text
from traceml.renderers.words import end_of_rank, headline, ranks_text, tracker_text

__all__ = [
    "LiveView",
    "PhaseRow",
    "RankRow",
    "RunFacts",
    "RunView",
    "StepFacts",
    "Telemetry",
    "Tracker",
    "Verdict",
    "live_view",
    "run_view",
    "visible_ranks",
]

# A rank whose own work is this much above the others' median is pointed at; below, ranks differ by noise.
_STANDS_OUT = 1.10


@dataclass(frozen=True, slots=True)
class Verdict:
    """A finding in words; `gain` is the speed-up if it were fixed, None when there is none to tell."""

    kind: str
    severity: str
    headline: str
    summary: str
    next: str
    ranks: tuple[int, ...]
    phase: str | None
    cost_share: float | None
    gain: float | None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What run it is and how far it has come."""

    id: str
    name: str
    state: str
    attempt: int
    world_size: int
    hosts: tuple[str, ...]
    duration_s: float | None
    command: str


@dataclass(frozen=True, slots=True)
class StepFacts:
    """How many steps, and how long they take."""

    count: int
    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    per_second: float | None


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One phase over all ranks."""

    phase: str
    mean_ms: float
    share: float


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank: its step, divided into phases in the report's order, and how it is doing."""

    rank: int
    host: str
    state: str
    steps: int
    phases: tuple[tuple[str, float], ...]
    rss_bytes: int | None
    cuda_bytes: int | None
    slowest: bool
    end: str | None

    @property
    def step_ms(self) -> float:
        """Mean step time, the sum of the phases."""
        return sum(ms for _, ms in self.phases)

    @property
    def work_ms(self) -> float:
        """Step time without communication: what of the step was the rank's own doing."""
        return sum(ms for phase, ms in self.phases if phase != "comm")

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """The phases as shares of this rank's step."""
        total = self.step_ms
        return tuple((phase, ms / total) for phase, ms in self.phases) if total > 0 else ()


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What tracing stored, lost and cost."""

    rows_stored: int | None
    rows_lost: int | None
    overhead_us_per_step: float | None
    overhead_share: float | None


@dataclass(frozen=True, slots=True)
class Tracker:
    """One backend: how much it has, how much waits, and what is wrong with it, empty where nothing is."""

    backend: str
    state: str
    delivered: int
    pending: int | None
    failed: int
    error: str
    fallback: int = 0

    @property
    def is_well(self) -> bool:
        """Whether a person need not look after it."""
        return not self.error and not self.failed

    @property
    def text(self) -> str:
        """How it stands, in words."""
        return tracker_text(
            self.backend, self.state, self.delivered, self.pending, self.failed, self.error, self.fallback
        )


@dataclass(frozen=True, slots=True)
class RunView:
    """Everything that is shown of a run, ended or not."""

    run: RunFacts
    verdict: Verdict
    others: tuple[Verdict, ...]
    steps: StepFacts
    phases: tuple[PhaseRow, ...]
    ranks: tuple[RankRow, ...]
    telemetry: Telemetry
    trackers: tuple[Tracker, ...] = ()

    @property
    def absent(self) -> str | None:
        """Which ranks have never been heard of, in words; None where all have."""
        seen = {row.rank for row in self.ranks}
        absent = [rank for rank in range(self.run.world_size) if rank not in seen] if seen else []
        if not absent:
            return None

        ever = "nothing has come yet" if self.run.state == "running" else "nothing ever came"
        return f"{ever} of {ranks_text(absent)} of {count_text(self.run.world_size)}"


@dataclass(frozen=True, slots=True)
class LiveView:
    """A run while it goes on, and the trend of its speed, oldest first."""

    now: RunView
    rates: tuple[float, ...] = ()


def run_view(report: Mapping[str, Any]) -> RunView:
    """Return the view of a report."""
    findings = [_verdict(finding) for finding in report.get("findings") or ()]
    verdict = _verdict(report.get("verdict") or {})
    return RunView(
        run=_run_facts(report.get("run") or {}),
        verdict=verdict,
        others=tuple(finding for finding in findings if finding != verdict),
        steps=_step_facts(report.get("steps") or {}),
        phases=tuple(
            PhaseRow(phase["phase"], phase.get("mean_ms") or 0.0, phase.get("share") or 0.0)
            for phase in report.get("phases") or ()
        ),
        ranks=_rank_rows(report, verdict),
        telemetry=_telemetry(report.get("telemetry") or {}),
        trackers=tuple(_tracker(entry) for entry in report.get("trackers") or ()),
    )


def live_view(report: Mapping[str, Any], rates: Sequence[float] = ()) -> LiveView:
    """Return the live view of the report so far.

    Args:
        report: in the shape of the report.
        rates: steps per second over time, oldest first.
    """
    return LiveView(run_view(report), tuple(rates))


def visible_ranks(ranks: Sequence[RankRow], most: int) -> tuple[RankRow, ...]:
    """Return at most `most` ranks by number: those that ended badly, the slowest ones, and the fastest."""
    if len(ranks) <= most:
        return tuple(ranks)

    by_work = sorted(ranks, key=lambda row: (row.end is None, not row.slowest, -row.work_ms))
    fastest = 1 if most < 8 else 3
    chosen = {row.rank for row in (*by_work[: max(most - fastest, 1)], *by_work[len(by_work) - fastest :])}
    return tuple(row for row in ranks if row.rank in chosen)[:most]


def _verdict(finding: Mapping[str, Any]) -> Verdict:
    gain = finding.get("speedup_if_fixed")
    return Verdict(
        kind=str(finding.get("kind") or "INSUFFICIENT_DATA"),
        severity=str(finding.get("severity") or "info"),
        headline=headline(finding),
        summary=str(finding.get("summary") or ""),
        next=str(finding.get("next") or ""),
        ranks=tuple(finding.get("ranks") or ()),
        phase=finding.get("phase"),
        cost_share=finding.get("cost_share"),
        gain=gain if gain is not None and gain >= 1.005 else None,
    )


def _run_facts(run: Mapping[str, Any]) -> RunFacts:
    command = run.get("command") or ""
    return RunFacts(
        id=str(run.get("id") or ""),
        name=str(run.get("name") or run.get("id") or "run"),
        state=str(run.get("state") or "running"),
        attempt=int(run.get("attempt") or 0),
        world_size=int(run.get("world_size") or 1),
        hosts=tuple(str(host) for host in run.get("hosts") or ()),
        duration_s=run.get("duration_s"),
        command=command if isinstance(command, str) else " ".join(map(str, command)),
    )


def _step_facts(steps: Mapping[str, Any]) -> StepFacts:
    return StepFacts(
        count=int(steps.get("count") or 0),
        mean_ms=steps.get("mean_ms"),
        p50_ms=steps.get("p50_ms"),
        p95_ms=steps.get("p95_ms"),
        p99_ms=steps.get("p99_ms"),
        per_second=steps.get("per_second"),
    )


def _telemetry(telemetry: Mapping[str, Any]) -> Telemetry:
    return Telemetry(
        rows_stored=telemetry.get("rows_stored"),
        rows_lost=telemetry.get("rows_lost"),
        overhead_us_per_step=telemetry.get("overhead_us_per_step"),
        overhead_share=telemetry.get("overhead_share"),
    )


def _tracker(entry: Mapping[str, Any]) -> Tracker:
    return Tracker(
        backend=str(entry.get("backend") or ""),
        state=str(entry.get("state") or ""),
        delivered=int(entry.get("delivered") or 0),
        pending=entry.get("pending"),
        failed=int(entry.get("failed") or 0),
        error=str(entry.get("error") or ""),
        fallback=int(entry.get("fallback") or 0),
    )


def _rank_rows(report: Mapping[str, Any], verdict: Verdict) -> tuple[RankRow, ...]:
    phases = _phases_by_rank(report)
    memory = {entry["rank"]: entry for entry in (report.get("memory") or {}).get("by_rank") or ()}
    rows = [
        RankRow(
            rank=entry["rank"],
            host=str(entry.get("host") or ""),
            state=str(entry.get("state") or "running"),
            steps=int(entry.get("steps") or 0),
            phases=phases.get(entry["rank"], ()),
            rss_bytes=memory.get(entry["rank"], {}).get("rss_peak_bytes"),
            cuda_bytes=memory.get(entry["rank"], {}).get("cuda_peak_bytes"),
            slowest=False,
            end=end_of_rank(entry),
        )
        for entry in sorted(report.get("ranks") or (), key=lambda entry: int(entry["rank"]))
    ]
    slowest = _slowest(rows, verdict)
    return tuple(_marked(row) if row.rank in slowest else row for row in rows)


def _phases_by_rank(report: Mapping[str, Any]) -> dict[int, tuple[tuple[str, float], ...]]:
    by_rank: dict[int, list[tuple[str, float]]] = {}
    for phase in report.get("phases") or ():
        for entry in phase.get("by_rank") or ():
            by_rank.setdefault(entry["rank"], []).append((phase["phase"], entry.get("mean_ms") or 0.0))

    return {rank: tuple(phases) for rank, phases in by_rank.items()}


def _slowest(rows: Sequence[RankRow], verdict: Verdict) -> frozenset[int]:
    """Return the ranks to point at: those that the verdict calls slow, else one whose own work stands out."""
    if verdict.kind.endswith("STRAGGLER"):
        return frozenset(verdict.ranks)

    if len(rows) < 2:
        return frozenset()

    most = max(rows, key=lambda row: row.work_ms)
    others = statistics.median(row.work_ms for row in rows if row is not most)
    return frozenset({most.rank}) if others > 0 and most.work_ms > _STANDS_OUT * others else frozenset()


def _marked(row: RankRow) -> RankRow:
    return replace(row, slowest=True)
