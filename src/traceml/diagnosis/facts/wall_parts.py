"""Parts of the wall time that one rank spent, from the sums of its processes; and the time in which it did not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import EPOCHS, EVALS, STEPS

__all__ = ["ProcessSums", "Stop", "stop_of", "wall_parts", "without_stops"]

_S = 1e9


class ProcessSums(msgspec.Struct):
    """Sums of one process of a rank; plain numbers, so that they can be kept as JSON."""

    attempt: int = 0
    first_ns: int = 0  # begin of its first step or evaluation, and end of its last one; epoch nanoseconds
    last_ns: int = 0
    steps: int = 0  # number of step rows
    total_ns: int = 0  # sums over steps: wall time, saving, waiting for data
    saving_ns: int = 0
    input_ns: int = 0
    evals_ns: int = 0  # evaluation
    epochs: int = 0  # steps that waited for the first batch of an iterator, without the first one of the process
    epochs_ns: int = 0  # waiting for data in these
    restart_ns: int = 0  # of it, the creation and the end of iterators
    first_batch_ns: int = 0  # waiting for data in the first step of the process
    set_up_ns: int = 0  # by which its first steps took longer than the others, without waiting for data and saving
    open_ns: int = 0  # time in the step in which the process ended, which has no row

    def add(self, table: str, rows: NDArray[np.void], ends_ns: NDArray[np.int64]) -> None:
        """Add rows of `schema.STEPS`, `EVALS` or `EPOCHS`, in order, which end at these epoch nanoseconds."""
        takers = {STEPS.name: self._add_steps, EVALS.name: self._add_evals, EPOCHS.name: self._add_epochs}
        takers[table](rows, ends_ns)

    def end_in_step(self, begin_ns: int, end_ns: int, hung_ns: int = 0, *, has_row: bool) -> None:
        """Add the step in which the process ended, without the time for which it hung.

        Args:
            has_row: whether the end of the process has written its row, as that of a step that was trained.
        """
        if not has_row:  # of a killed process, the end is its last sign of life, which may be before its last rows
            begin_ns, end_ns = max(begin_ns, self.last_ns), max(end_ns, begin_ns, self.last_ns)

        hung_ns = min(hung_ns, end_ns - begin_ns)
        if has_row:
            self.total_ns -= hung_ns
            self.last_ns -= hung_ns
        else:
            self._cover(begin_ns, end_ns - hung_ns)
            self.open_ns = end_ns - hung_ns - begin_ns

    def _add_steps(self, rows: NDArray[np.void], ends_ns: NDArray[np.int64]) -> None:
        self._cover(int(ends_ns[0] - rows["total_ns"][0]), int(ends_ns[-1]))
        self.steps += len(rows)
        self.total_ns += int(rows["total_ns"].sum())
        self.saving_ns += int(rows["checkpoint_ns"].sum())
        self.input_ns += int(rows["input_wait_ns"].sum())

    def _add_evals(self, rows: NDArray[np.void], ends_ns: NDArray[np.int64]) -> None:
        self._cover(int(ends_ns[0] - rows["ns"][0]), int(ends_ns[-1]))
        self.evals_ns += int(rows["ns"].sum())

    def _add_epochs(self, rows: NDArray[np.void], _: NDArray[np.int64]) -> None:
        first = rows["first"] > 0
        self.first_batch_ns += int(rows["ns"][first].sum())
        self.epochs += int((~first).sum())
        self.epochs_ns += int(rows["ns"][~first].sum())
        self.restart_ns += int((rows["create_ns"] + rows["drain_ns"])[~first].sum())

    @property
    def later_epochs_ns(self) -> int:
        """Waiting for the first batch of later epochs, beyond the usual wait.

        The end and the start of workers are not a usual wait, even where each step has its own iterator.
        """
        usual_steps = self.steps - self.epochs - (1 if self.first_batch_ns else 0)
        if usual_steps < 1:
            return self.restart_ns

        usual_ns = max(self.input_ns - self.epochs_ns - self.first_batch_ns, 0) / usual_steps
        return max(self.restart_ns, self.epochs_ns - int(usual_ns * self.epochs))

    def _cover(self, begin_ns: int, end_ns: int) -> None:
        self.first_ns = min(self.first_ns or begin_ns, begin_ns)
        self.last_ns = max(self.last_ns, end_ns)


def wall_parts(
    processes: Sequence[ProcessSums], begin_ns: int, end_ns: int, attempt: int = 0, open_part: str | None = None
) -> dict[str, float]:
    """Return the seconds of each part of the time from `begin_ns` to `end_ns`; see `run_time.PARTS`.

    Args:
        processes: those of one rank that have steps, an open one at their end, or evaluation.
        begin_ns: start of the run, epoch nanoseconds.
        attempt: the job's last attempt, whose start may be under way.
        open_part: the part that the rank is in since its last row, if it is known.
    """
    parts = dict.fromkeys(
        ("startup", "steps", "evaluation", "checkpoint", "between_epochs", "idle", "restart", "unexplained"), 0
    )
    reached_ns, in_attempt = begin_ns, 0
    for each in sorted(processes, key=lambda process: (process.attempt, process.first_ns)):
        before = "restart" if each.attempt > in_attempt else "startup"
        first_ns = each.first_batch_ns + each.set_up_ns
        parts[before] += each.first_ns - reached_ns + first_ns
        parts["steps"] += each.total_ns + each.open_ns - each.saving_ns - first_ns - each.later_epochs_ns
        parts["checkpoint"] += each.saving_ns
        parts["evaluation"] += each.evals_ns
        gaps_ns = each.last_ns - each.first_ns - each.total_ns - each.open_ns - each.evals_ns
        parts["between_epochs"] += each.later_epochs_ns + min(gaps_ns, 0)
        parts["unexplained"] += max(gaps_ns, 0)
        reached_ns, in_attempt = each.last_ns, each.attempt

    after = "restart" if attempt > in_attempt else (open_part or "idle") if processes else "startup"
    parts[after] += end_ns - reached_ns
    return {part: ns / _S for part, ns in parts.items()}


_PARTS = {
    "steps": ("steps", "between_epochs"),
    "startup": ("startup",),
    "outside": ("evaluation", "idle", "unexplained", "between_epochs"),
    # The clock of the steps does not advance while the machine is suspended.
    "suspended": ("idle", "unexplained", "between_epochs", "startup"),
}


class Stop(NamedTuple):
    """One stop of a rank."""

    seconds: float
    part: str  # where the rank was: in `steps`, in `startup`, or `outside` of both; `suspended` with its whole machine
    first_step: int = -1  # open step at the last cycle of the recorder before it, and after it; -1 without one
    last_step: int = -1
    began_s: float | None = None  # epoch seconds of its begin; None if unknown


def stop_of(row: Mapping[str, Any]) -> Stop | None:
    """Return the stop of an `info` row; None if the row is not a valid one."""
    seconds, part = row.get("seconds"), row.get("part")
    if not isinstance(seconds, int | float) or part not in _PARTS:
        return None

    last, began = row.get("step"), row.get("began_s")
    last = last if isinstance(last, int) else -1
    first = row.get("from_step")
    return Stop(
        float(seconds), part, first if isinstance(first, int) else last, last,
        began if isinstance(began, int | float) else None,
    )  # fmt: skip


def without_stops(parts: Mapping[str, float], stops: Iterable[Stop]) -> dict[str, float]:
    """Move stopped time out of the parts of a rank's wall time, in seconds, to the part `stopped`."""
    found = {**parts, "stopped": parts.get("stopped", 0.0)}
    for stop in stops:
        left = stop.seconds
        for part in _PARTS[stop.part]:
            moved = min(left, max(found.get(part, 0.0), 0.0))
            if moved:
                found[part] -= moved
                found["stopped"] += moved
                left -= moved

    return found
