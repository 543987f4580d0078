"""Silent workers of a launch: whom their agent asks, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from traceml.clock import monotonic_ns
from traceml.database.schema import OPEN_SLOTS, Slot
from traceml.database.snapshots import silent_workers
from traceml.database.snapshots.external_snapshots import LiveSlots
from traceml.database.snapshots.rank_snapshot import RankSnapshot
from traceml.database.snapshots.silent_workers import SilentWorker, SilentWorkers


class _Snapshots:
    """Snapshots of a worker whose recorder has been silent for 10 s."""

    def __init__(self, rank: int, pid: int, flight: Path) -> None:
        self.rank, self.asked_s = rank, 0.0
        self._pid = pid
        del flight

    def slots(self) -> LiveSlots:
        slots = [0] * OPEN_SLOTS
        slots[Slot.HEARTBEAT] = monotonic_ns() - 10 * 10**9
        return LiveSlots(tuple(slots), 0)

    def make(self, *, may_ask: bool) -> RankSnapshot:
        self.asked_s = monotonic_ns() / 1e9 if may_ask else self.asked_s
        return RankSnapshot(rank=self.rank, pid=self._pid, answered="signal" if may_ask else "kernel")

    def is_news(self, _: RankSnapshot) -> bool:
        return True


def test_one_worker_is_asked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes up to a second, in which the agent forwards no output and no end; of all a snapshot is sent."""
    monkeypatch.setattr(silent_workers, "ExternalSnapshots", _Snapshots)
    monkeypatch.setattr(silent_workers, "find_live_flight", lambda *_, **__: Path("flight"))
    monkeypatch.setattr(silent_workers, "flight_identity", lambda _: {})
    monkeypatch.setattr(silent_workers, "_EVERY_S", 0.0)
    sent: list[SilentWorker] = []
    workers = SilentWorkers("run", "runs", sent.append)

    for _ in range(4):
        workers.check((1, 2, 3))

    assert len(sent) == 12
    assert [each.pid for each in sent if each.snapshot["answered"] == "signal"] == [1, 2, 3, 1]
