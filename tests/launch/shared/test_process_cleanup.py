"""Tests of ending the processes that a job has left on this host."""

from __future__ import annotations

import subprocess
import time

import pytest

from traceml.launch.shared.process_cleanup import ProcessTermination


def test_a_long_end_is_looked_at_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look reads files of every process of the host: at 100 Hz it took a core while exit handlers ran."""
    ending, now_s = ProcessTermination(set, grace_s=3600), time.monotonic()
    assert ending.pause_s == 0.01

    monkeypatch.setattr(time, "monotonic", lambda: now_s + 2)
    assert ending.pause_s == 0.1


@pytest.mark.process
def test_a_process_that_can_no_longer_be_recognized_is_awaited() -> None:
    """While a process ends, its environment is empty for some time; it has not ended, though no search finds it."""
    with subprocess.Popen(["sh", "-c", "trap '' TERM; echo; exec sleep 86411"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = iter([{process.pid}])
        ending = ProcessTermination(lambda: next(found, set()), grace_s=3600)

        assert not ending.step()
        assert not ending.step()
        assert ending.left == {process.pid}

        process.kill()
        process.wait()
        assert ending.step()
        assert ending.left == set()
