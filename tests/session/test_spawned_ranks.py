"""The process that failed first, of those that a script spawns."""

from __future__ import annotations

import json
import os

import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from traceml.session.script import SpawnedRanks


def reported(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Return what is reported of a script that ends with this exception."""
    reader, writer = os.pipe()
    monkeypatch.setenv("TRACEML_FAILURES_FD", str(writer))
    spawned = SpawnedRanks()
    assert "TRACEML_FAILURES_FD" not in os.environ
    assert not os.get_inheritable(writer)

    spawned.report(error)
    os.close(writer)
    with os.fdopen(reader) as lines:
        return [json.loads(line) for line in lines]


def test_the_process_that_ended_first_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others were ended because of it, and look like it."""
    error = ProcessExitedException("killed", 1, 4711, -9, "SIGKILL")
    (told,) = reported(error, monkeypatch)

    assert {name: told[name] for name in ("pid", "exitcode")} == {"pid": 4711, "exitcode": -9}


@pytest.mark.parametrize("error", [ProcessRaisedException("KeyError", 1, 4711), ValueError("no process")])
def test_what_a_process_has_reported_itself_is_not(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception ends it with a report of its own; another one is of the script."""
    assert reported(error, monkeypatch) == []


def test_a_script_without_traceml_run_reports_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank of torchrun, which reports its ends itself."""
    monkeypatch.delenv("TRACEML_FAILURES_FD", raising=False)

    SpawnedRanks().report(ProcessExitedException("killed", 1, 4711, -9, "SIGKILL"))
