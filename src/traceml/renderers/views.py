"""View models: what a screen shows in addition to the report itself.

The report at the end and the report so far have the same type, so the card and the live view cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter

import msgspec

from traceml.database.states import RunStatus
from traceml.diagnosis.deaths.end_wording import end_summary
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import (
    bytes_text,
    capitalized,
    count_text,
    duration_text,
    ms_text,
    overhead_text,
    plural,
    ranks_text,
    rate_text,
    sample_text,
    summed_text,
)
from traceml.renderers.printable import printable_copy
from traceml.renderers.wording import goodput_text, restarts_text
from traceml.runs.report.report_types import (
    PhaseSection,
    Report,
    TimePart,
    TimeSection,
    rate_of,
)

__all__ = ["SMALL_SHARE", "RankRow", "RunView", "run_view", "verdict_look", "visible_parts", "visible_ranks"]

SMALL_SHARE = 0.005
"""Share of a step, or of the run's time, below which a phase or part is only in the report."""


class RankRow(msgspec.Struct, frozen=True):
    """One rank: its step by phase in the report's order, memory, state."""

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
        """Step time without communication: the rank's own work."""
        return sum(ms for phase, ms in self.phases if phase != "comm")

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """The phases as shares of this rank's step."""
        total = self.step_ms
        return tuple((phase, ms / total) for phase, ms in self.phases) if total > 0 else ()

    @property
    def memory(self) -> str:
        """The peak of device memory, or else of resident memory, in words."""
        return bytes_text(self.cuda_bytes or self.rss_bytes)

    def times(self, phases: Iterable[str] = ()) -> list[str]:
        """Return the times of the step and of phases, in words."""
        known = dict(self.phases)
        return [ms_text(self.step_ms) if known else "-", *(ms_text(known.get(phase)) for phase in phases)]


class RunView(msgspec.Struct, frozen=True):
    """A report, its ranks as rows, and for a live view the steps per second over time, oldest first."""

    report: Report
    ranks: tuple[RankRow, ...]
    rates: tuple[float, ...] = ()

    @property
    def others(self) -> tuple[Finding, ...]:
        """The other findings, largest cost first."""
        return tuple(finding for finding in self.report.findings if finding != self.report.verdict)

    @property
    def shown_phases(self) -> list[PhaseSection]:
        """Phases over all ranks, without those that take next to nothing of a step."""
        return [phase for phase in self.report.phases if phase.share >= SMALL_SHARE]

    @property
    def memory_peaks(self) -> list[tuple[str, int, int]]:
        """The largest peaks of resident and of device memory: name, bytes and rank of each."""
        known = {
            "resident peak": [(row.rss_bytes, row.rank) for row in self.ranks if row.rss_bytes],
            "device peak": [(row.cuda_bytes, row.rank) for row in self.ranks if row.cuda_bytes],
        }
        return [(name, *max(sizes, key=itemgetter(0))) for name, sizes in known.items() if sizes]

    @property
    def steps_per_second(self) -> float | None:
        """Steps per second: live, the speed now; of an ended run, of the time in steps, as the mean step is."""
        return self.report.steps.speed(running=self.report.run.state == RunStatus.RUNNING)

    @property
    def data_rates(self) -> list[tuple[str, str]]:
        """Tokens and samples of the whole job per second, as (unit, number); empty if unknown."""
        per_step = (("tokens", self.report.steps.tokens_per_step), ("samples", self.report.steps.samples_per_step))
        rates = [(unit, rate_of(number, self.steps_per_second)) for unit, number in per_step]
        return [(unit, rate_text(rate)) for unit, rate in rates if rate is not None]

    @property
    def shared_data(self) -> str | None:
        """Number of ranks with batches of their own, in words, where others have the same ones or none; else None."""
        counted = self.report.steps.data_ranks
        known = self.data_rates and counted < len(self.ranks)
        return f"own batches on {counted:,} of {plural(len(self.ranks), 'rank')}" if known else None

    @property
    def percentiles(self) -> list[tuple[str, str]]:
        """Percentiles of the step times: name and time of each."""
        steps = self.report.steps
        times = (("p50", steps.p50_ms), ("p95", steps.p95_ms), ("p99", steps.p99_ms))
        return [(name, ms_text(ms)) for name, ms in times]

    @property
    def overhead(self) -> str:
        """The cost of tracing, in words."""
        return overhead_text(self.report.telemetry.overhead_us_per_step, self.report.telemetry.overhead_share)

    @property
    def time_parts(self) -> list[TimePart]:
        """Parts of the run's wall time that can be seen."""
        return visible_parts(self.report.time)

    @property
    def sample(self) -> str | None:
        """Steps that a long run's verdict rests on, and ranks whose steps hosts have summed, in words; None for all."""
        summed = self.report.steps.summed_ranks
        texts = [sample_text(self.report.steps.diagnosed, self.report.steps.count)] if self.report.steps.cut else []
        texts += [summed_text(summed)] if summed else []
        return "; ".join(texts) or None

    @property
    def untimed(self) -> str | None:
        """The accelerator whose time is not known, in words; None if there is none."""
        device = self.report.steps.untimed_device
        return f"device times: not measured on {device}; phases show CPU time" if device else None

    @property
    def basis(self) -> list[str]:
        """Sentences on what verdict, step times and rates rest on; none if they rest on all of the run."""
        return [capitalized(text) for text in (self.sample, self.untimed, self.shared_data) if text]

    @property
    def outcome(self) -> str:
        """The run's state, and its duration where it is known: `finished after 12 s`."""
        took = self.report.run.duration_s
        return self.report.run.state if took is None else f"{self.report.run.state} after {duration_text(took)}"

    @property
    def ended_before_training(self) -> str | None:
        """End of a run that failed or was stopped before its first step, in a sentence; None if a card says more.

        After a signal the card has advice; what was logged for trackers is on it.
        """
        is_cut = self.report.run.state in (RunStatus.FAILED, RunStatus.STOPPED)
        if not is_cut or self.report.steps.count or self.report.run.restarts or self.report.trackers:
            return None

        if self.report.verdict.kind is Kind.HANG:
            return None

        if self.report.run.state == RunStatus.STOPPED and self.report.verdict.kind is not Kind.RANK_LOST:
            return "Stopped before the first step."

        if any(rank.exit.signal for rank in self.report.ranks):
            return None

        if self.report.verdict.kind is Kind.RANK_LOST:
            return self.report.verdict.summary

        unknown = self.report.verdict.kind is Kind.INSUFFICIENT_DATA
        return "The job failed before its first step: read its output, if it has any." if unknown else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the whole run: its restarts, and the steps that are not stored."""
        found = []
        if self.report.run.restarts:
            found.append(restarts_text(self.report.run.restarts))

        if self.report.run.steps_waiting:
            waiting = self.report.run.steps_waiting
            are = "is not stored: it waits" if waiting == 1 else "are not stored: they wait"
            stores = "it" if waiting == 1 else "them"
            found.append(f"{plural(waiting, 'step')} {are} in this host's memory; `traceml sync` stores {stores}")

        return tuple(found)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and the goodput of a job that was restarted."""
        time = self.report.time
        return (*self.notes, capitalized(goodput_text(time))) if self.report.run.restarts and time else self.notes

    @property
    def absent(self) -> str | None:
        """The ranks that never reported, in words; None if all did."""
        seen = {row.rank for row in self.ranks}
        absent = [rank for rank in range(self.report.run.world_size) if rank not in seen] if seen else []
        if not absent:
            return None

        yet = " yet" if self.report.run.state == RunStatus.RUNNING else ""
        return f"no data{yet} from {ranks_text(absent)} (of {count_text(self.report.run.world_size)})"


def run_view(report: Report, rates: Sequence[float] = ()) -> RunView:
    """Return the view of a report, with its texts printable; `rates` are those of a live view."""
    report = printable_copy(report)
    return RunView(report, _rank_rows(report), tuple(rates))


def verdict_look(kind: str | None, severity: str | None) -> str:
    """Return the severity that colors a verdict: none if it judges nothing, and is not to look like a healthy run."""
    return "" if kind == Kind.INSUFFICIENT_DATA else severity or ""


def visible_ranks(ranks: Sequence[RankRow], most: int) -> tuple[RankRow, ...]:
    """Return at most `most` ranks in order: those that ended badly, the slowest and the fastest."""
    if len(ranks) <= most:
        return tuple(ranks)

    by_work = sorted(ranks, key=lambda row: (row.end is None, not row.slowest, -row.work_ms))
    fastest = 1 if most < 8 else 3
    chosen = {row.rank for row in (*by_work[: max(most - fastest, 1)], *by_work[len(by_work) - fastest :])}
    return tuple(row for row in ranks if row.rank in chosen)[:most]


def visible_parts(time: TimeSection | None) -> list[TimePart]:
    """Return the parts of a wall time that can be seen; none where nothing of it is known, as of a run that logs.

    Time without progress before the end is a part of its own: it is not after the last step, but in one that hung.
    """
    parts = [] if time is None else [part for part in _with_hang(time) if part.share >= SMALL_SHARE]
    return [] if {part.part for part in parts} == {"unexplained"} else parts


def _with_hang(time: TimeSection) -> list[TimePart]:
    """Return the parts with the time of a hang apart from the `idle` that it is in, if no attempt followed it."""
    idle = next((part for part in time.parts if part.part == "idle"), None)
    if idle is None or not 0 < time.hang_s <= idle.seconds:
        return time.parts

    hung = TimePart(part="hang", seconds=time.hang_s, share=time.hang_s / time.wall_s)
    rest = TimePart(part="idle", seconds=idle.seconds - hung.seconds, share=idle.share - hung.share)
    return [each for part in time.parts for each in ((hung, rest) if part is idle else (part,))]


def _rank_rows(report: Report) -> tuple[RankRow, ...]:
    phases = _phases_by_rank(report)
    memory = {entry.rank: entry for entry in report.memory.by_rank}
    slowest = report.slowest_ranks()
    return tuple(
        RankRow(
            rank=section.rank,
            host=section.host,
            state=section.state,
            steps=section.steps,
            phases=phases.get(section.rank, ()),
            rss_bytes=memory[section.rank].rss_peak_bytes if section.rank in memory else None,
            cuda_bytes=memory[section.rank].cuda_peak_bytes if section.rank in memory else None,
            slowest=section.rank in slowest,
            end=end_summary(section.ended),
        )
        for section in sorted(report.ranks, key=lambda section: section.rank)
    )


def _phases_by_rank(report: Report) -> dict[int, tuple[tuple[str, float], ...]]:
    by_rank: dict[int, list[tuple[str, float]]] = {}
    for phase in report.phases:
        for entry in phase.by_rank:
            by_rank.setdefault(entry.rank, []).append((phase.phase, entry.mean_ms))

    return {rank: tuple(phases) for rank, phases in by_rank.items()}
