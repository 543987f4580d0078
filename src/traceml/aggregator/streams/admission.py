"""Admission of ranks: the attempt of a run that a new rank belongs to."""

from __future__ import annotations

from collections.abc import Callable

from traceml.aggregator.run_facts import RunFacts
from traceml.aggregator.streams.stream import RankStream, StreamState
from traceml.aggregator.streams.stream_table import StreamTable
from traceml.inspection.kernel_state import process_info
from traceml.transport.hello import Hello

__all__ = ["Admission"]


class Admission:
    """Tells ranks of a run from those of other jobs.

    The same key does not prove the same job: torchrun's default address is the same each time, and a subprocess of a
    rank inherits its variables.

    Args:
        on_helper: called with a stream that has turned out to be no rank.
    """

    def __init__(
        self, facts: RunFacts, table: StreamTable, *, named: bool, on_helper: Callable[[RankStream], object]
    ) -> None:
        self._facts = facts
        self._table = table
        self._named = named
        self._on_helper = on_helper

    def attempt_for(self, hello: Hello) -> int | None:
        """Return the attempt that a new rank belongs to, None when it is of another job."""
        attempt = self._attempt_of(hello)
        if self.is_helper(hello):
            return attempt

        self._leave_to_children(hello, attempt)
        current = self._table.of_rank(attempt, hello.rank)
        if current is None:
            facts = self._facts
            other_job = facts.ended and attempt <= facts.attempt and hello.world_size != facts.world_size
            return None if other_job and not self._named else attempt

        if _is_busy(current, hello) or (hello.spawned_by and hello.world_size == 1):
            return None  # children that train each for themselves are runs of their own

        if self._named and hello.flight == current.flight != "" and not current.next.get("steps"):
            return attempt  # the same recording, which has joined a process group: that is not a restart

        return self._facts.attempt + 1 if self._named or _is_started_again(current, hello) else None

    def is_helper(self, hello: Hello) -> bool:
        """Whether a process is no rank: a forked child that only logs, or the parent of ranks."""
        return bool(hello.parent) or self.has_started_ranks(hello)

    def has_started_ranks(self, hello: Hello) -> bool:
        """Whether a process has started ranks that came before it, as the aggregator was late: it is no rank itself."""
        return hello.world_size == 1 and hello.recorder in self._table.starters

    def starts_next_run(self, hello: Hello) -> bool:
        """Whether a rank that has ended here begins again: that is the next run of its job."""
        current = self._table.of_rank(self._attempt_of(hello), hello.rank)
        return current is not None and current.ended

    def _attempt_of(self, hello: Hello) -> int:
        """Return the attempt that a rank's launcher counts; where others are further, the one under way or the next.

        The agent on its host may have counted fewer restarts than others, or have come later.
        """
        attempt, newest = self._facts.attempt_of(hello.attempt, hello.host), self._facts.attempt
        if attempt >= newest:
            return attempt

        ranks = self._table.of_attempt(newest)
        if any(stream.incarnation.host == hello.host for stream in ranks):
            return attempt  # a rank of an earlier one that connects late

        if not all(stream.ended for stream in ranks):
            return newest

        return newest + 1 if self._named else attempt

    def _leave_to_children(self, hello: Hello, attempt: int) -> None:
        """Make a process that has only started a rank a helper, because it is not a rank itself."""
        for stream in self._table.of_recorder(attempt, hello.spawned_by) if hello.spawned_by else ():
            if not stream.next.get("steps"):
                self._table.remove_rank(stream)
                self._on_helper(stream)


def _is_started_again(current: RankStream, hello: Hello) -> bool:
    """Whether one agent of torchrun has ended a rank and started it again, uncounted: a host has come or left."""
    is_elastic = hello.run.startswith("torchrun") and current.state is not StreamState.FINISHED
    if not is_elastic or hello.boot_id != current.incarnation.boot or current.launcher is None:
        return False

    info = process_info(hello.pid)
    return info is not None and info.parent == current.launcher


def _is_busy(current: RankStream, hello: Hello) -> bool:
    """Whether another process is that rank now; a second recorder of the same process replaces the first."""
    same_process = (current.incarnation.pid, current.incarnation.start_ticks, current.incarnation.boot) == (
        hello.pid, hello.start_ticks, hello.boot_id,
    )  # fmt: skip
    if same_process or current.ended:
        return False

    return current.connected or not current.is_dead
