"""A run in progress, followed through its store, for the screens; cheap to update."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec

from traceml.clock import boot_id, monotonic_ns
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.insufficient_data import awaits_rows
from traceml.diagnosis.steps.kept_steps import slots_for
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME
from traceml.runs.about import About, about_run
from traceml.runs.report.report import make_report, report_window, run_wall_time
from traceml.runs.report.report_types import Report, TelemetrySection
from traceml.runs.rows.logged_media import LoggedItems, MediaGroup
from traceml.runs.rows.messages import RunEvents, RunMessage, RunMessages
from traceml.runs.rows.run_summary_reader import RunSummaryReader
from traceml.runs.rows.series import RunSeries, SeriesFollower

__all__ = ["LiveRun"]

_RATES = 120
# Window of the speed: a shorter one shows the flush of frames, a longer one hides changes.
_RATE_S = 2.0
# Steps that come far later than usual have stopped: as for an evaluation, a checkpoint or a hang.
_ARRIVALS, _LATE_FACTOR = 6, 2.0
_TELEMETRY_S = 2.0
_ABOUT_S = 5.0
_TIME_S = 0.5
_TIME_COST = 50  # the run's time is divided for at most 2 % of the time


class LiveRun:
    """Follows a run by cursor, also before its store exists; call `refresh` a few times per second.

    Attributes:
        events: the newest events of the run for people, oldest first.
        rates: steps per second over time, oldest first.
        findings: the findings so far, the verdict first; empty before there are any.

    Raises:
        StoreError: the store cannot be read. All methods may raise it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir)
        self.events = RunEvents()
        self.rates: deque[float] = deque(maxlen=_RATES)
        self.findings: list[Finding] = []
        self._is_judged = False  # by its aggregator, whose next diagnosis comes after the first steps
        self.summary = RunSummaryReader(slots_for(1))
        self._reader: StoreReader | None = None
        self._last_event = 0
        self._series: SeriesFollower | None = None
        self._messages = RunMessages()
        self._logged = LoggedItems()
        self._about: tuple[float, About] | None = None
        self._marks: deque[tuple[float, int, int]] = deque()
        self._arrivals_s: deque[float] = deque(maxlen=_ARRIVALS)
        self._first_age_s = 0.0  # of the newest step, when the first one was seen
        self._time_due = 0.0
        self._telemetry: tuple[float, TelemetrySection] | None = None

    def __repr__(self) -> str:
        return f"LiveRun({str(self.path)!r})"

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.summary.run.get("ended") is not None

    def refresh(self) -> bool:
        """Take what arrived since the last call; return whether there was anything.

        Raises:
            StoreError: the store is damaged, or of another version.
        """
        reader = self._opened()
        if reader is None:
            return False

        attempt = self.summary.attempt
        changed = self.summary.update(reader)
        if self.summary.attempt != attempt:
            self._forget_arrivals()

        if self._series is not None and changed:
            self._series.take(self.summary, reader)

        self._take_events(reader)
        if self.ended or (changed and not self._is_judged):
            self.findings = self.summary.diagnose()

        self._take_rate()
        return changed

    def report(self) -> Report:
        """Return the report on the newest steps; an empty one before the store exists."""
        if self._reader is None:
            return Report.empty(self.path.name)

        if not self.findings:
            self.findings = self.summary.diagnose()

        self._take_time(self._reader)
        known = self._telemetry_so_far()
        report = make_report(self.summary, self._reader, report_window(self.summary), self.findings, self.path, known)
        if known is None:
            self._telemetry = time.monotonic(), report.telemetry

        if self.rates:
            report.steps.set_rate(self.rates[-1])

        return report

    def series(self) -> RunSeries | None:
        """Return the series of the whole run; None before the store exists.

        The first call reads what is stored; later calls cost little.
        """
        if self._reader is None:
            return None

        if self._series is None:
            self._series = SeriesFollower()
            self._series.backfill(self.path)

        return self._series.series(self.summary)

    def notes(self) -> list[RunMessage]:
        """Return the run's messages, the newest first: events, warnings, texts."""
        if self._reader is not None:
            self._messages.update(self._reader)

        return self._messages.lines(self.events)

    def logged(self) -> tuple[MediaGroup, ...]:
        """Return the logged texts, images, histograms and files, the newest of each name."""
        if self._reader is not None:
            self._logged.update(self._reader)

        return self._logged.groups()

    def about(self) -> About:
        """Return the run's parameters, source, environment and machine; at most 5 s old."""
        now = time.monotonic()
        if self._reader is not None and (self._about is None or now - self._about[0] >= _ABOUT_S):
            self._about = now, about_run(self._reader)

        return About() if self._about is None else self._about[1]

    def close(self) -> None:
        """Close the store."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _opened(self) -> StoreReader | None:
        if self._reader is None and (self.path / STORE_NAME).is_file():
            self._reader = self._open()

        return self._reader

    def _open(self) -> StoreReader | None:
        try:
            reader = StoreReader(self.path / STORE_NAME)
        except StoreError:
            if (self.path / STORE_NAME).is_file():
                raise

            return None  # it is being replaced

        run = reader.meta().get("run", {})
        ranks = max(int(run.get("world_size", 1)), 1)
        self.summary = RunSummaryReader(slots_for(ranks))
        self.summary.start_at_end(reader, slots_for(ranks) * ranks)
        return reader

    def _take_events(self, reader: StoreReader) -> None:
        for event in reader.events(after=self._last_event):
            self._last_event = event.id
            self.events.take(event)
            if event.kind == "verdict":
                with suppress(msgspec.ValidationError):  # of another version: the report is diagnosed here
                    self.findings = [Finding.from_dict(finding) for finding in event.data.get("findings", [])]

                self._is_judged = bool(self.findings) and not awaits_rows(self.findings[0])

    def _take_rate(self) -> None:
        latest, ends = self.summary.kept.latest, self.summary.kept.end_ns
        if self.ended or not latest.size or int(latest.max()) < 0:
            return

        rank = int(latest.argmax())
        now = time.monotonic(), int(latest[rank]), int(ends[rank])
        if self._marks and now[0] - self._marks[-1][0] < _RATE_S / 8:
            return

        if not self._marks:
            self._first_age_s = self._age_s(rank, now[2])
            if self.rates:  # a restarted run steps again
                self.rates.extend(1 / step_s for step_s in self._step_s())

        if not self._marks or now[1] != self._marks[-1][1]:
            self._arrivals_s.append(now[0])

        self._marks.append(now)
        while len(self._marks) > 2 and now[0] - self._marks[1][0] >= _RATE_S:
            self._marks.popleft()

        first = self._marks[0]
        steps, by_rows_s, by_clock_s = now[1] - first[1], (now[2] - first[2]) / 1e9, now[0] - first[0]
        if steps > 0 and by_rows_s > 0:
            # The rank's timestamps hide bursts of frames; this process's clock counts if they stop.
            self.rates.append(steps / max(by_rows_s, by_clock_s if by_clock_s > 2 * _RATE_S else 0.0))
        elif self._have_stopped(now[0]):
            self.rates.append(0.0)

    def _forget_arrivals(self) -> None:
        """Begin with the steps of another attempt; until they come, there are none."""
        self._marks.clear()
        self._arrivals_s.clear()
        if self.rates:
            self.rates.append(0.0)

    def _have_stopped(self, now_s: float) -> bool:
        """Whether no step has arrived for far longer than is usual, which is long where steps or frames are."""
        gaps_s = [after - before for before, after in pairwise(self._arrivals_s)]
        since_s = now_s - self._arrivals_s[-1] + (0.0 if gaps_s else self._first_age_s)
        usual_s = gaps_s or self._step_s()
        return bool(usual_s) and since_s > _LATE_FACTOR * max(_RATE_S, median(usual_s))

    def _age_s(self, rank: int, end_ns: int) -> float:
        """Return the seconds since the end of a rank's step, where its machine is this one; else 0."""
        stream = self.summary.ranks.get(rank)
        is_here = stream is not None and stream.facts.get("boot_id") == boot_id()
        return max(monotonic_ns() - end_ns, 0) / 1e9 if is_here else 0.0

    def _step_s(self) -> list[float]:
        """Return the mean time of a step so far, of a run that was opened a moment ago; nothing where it is not known.

        It may have stopped before, as one that hangs.
        """
        latest, ends = self.summary.kept.latest, self.summary.kept.end_ns
        rank = int(latest.argmax())
        step, end_ns = self.summary.first.get(rank, (0, 0))
        steps = int(latest[rank]) - step
        return [int(ends[rank] - end_ns) / steps / 1e9] if end_ns and steps > 0 else []

    def _take_time(self, reader: StoreReader) -> None:
        """Divide the run's wall time again if that costs little compared with the time since the last call."""
        began = time.monotonic()
        if began < self._time_due:
            return

        self.summary.facts_builder.time = run_wall_time(self.summary, reader, self.path)
        ended = time.monotonic()
        self._time_due = ended + max(_TIME_S, _TIME_COST * (ended - began))

    def _telemetry_so_far(self) -> TelemetrySection | None:
        """Return the last telemetry section if it is new enough: counting lost rows costs more than all else."""
        if self._telemetry is not None and time.monotonic() - self._telemetry[0] < _TELEMETRY_S:
            return self._telemetry[1]

        return None
