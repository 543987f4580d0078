"""Locks of a runs folder: one process at a time recovers runs in it."""

from __future__ import annotations

from threading import Event, Thread

from traceml.aggregator.recovery_lock import RecoveryLock


def test_one_at_a_time_recovers(tmp_path):
    entered = Event()

    def enter() -> None:
        with RecoveryLock.FINISH.held(tmp_path):
            entered.set()

    other = Thread(target=enter)
    with RecoveryLock.FINISH.held(tmp_path), RecoveryLock.ADOPT.held(tmp_path):  # who finishes runs adopts rows
        other.start()
        assert not entered.wait(0.2)

    other.join(60)
    assert entered.is_set()


def test_a_folder_that_takes_no_lock_is_recovered_without(tmp_path):
    (tmp_path / "runs").write_text("a file in place of the folder")

    with RecoveryLock.FINISH.held(tmp_path / "runs"):
        pass
