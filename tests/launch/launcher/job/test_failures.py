"""Sentences about workers that had not ended when a launch failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from traceml.launch.launcher.job.failures import note_stacks
from traceml.launch.launcher.job.job_host import Worker

_WAITS = {
    "stack": 'Thread 0x1 (most recent call first):\n  File "/torch/distributed/distributed_c10d.py", line 1 in barrier'
}
_WORKS = {"stack": 'Thread 0x1 (most recent call first):\n  File "/job.py", line 7 in compute'}
_SILENT = {"stack": "", "state": "stopped"}


def first_line(stacks: dict[int, dict[str, Any]], ranks: int = 3) -> str:
    host: Any = SimpleNamespace(name="node1")
    error = RuntimeError()
    note_stacks(error, [Worker(rank, rank, host) for rank in range(ranks)], stacks)
    return error.__notes__[0].splitlines()[0]


@pytest.mark.parametrize(
    ("stacks", "says"),
    [
        (
            {0: _WAITS, 1: _WORKS, 2: _WAITS},
            "Ranks 0, 2 were waiting in a collective that these ranks had not entered: rank 1 (local rank 1 on node1).",
        ),
        (
            {0: _WAITS, 1: _SILENT, 2: _WAITS},
            (
                "Ranks 0, 2 were waiting in a collective. Whether these ranks had entered it is not known: "
                "rank 1 (local rank 1 on node1)."
            ),
        ),
        (
            {0: _WAITS, 1: _WORKS},
            "Rank 0 was waiting in a collective that these ranks had not entered: rank 1 (local rank 1 on node1).",
        ),
        ({0: _WAITS, 1: _WAITS, 2: _WAITS}, "ranks 0-2 were here:"),
        ({0: _SILENT}, "rank 0 (local rank 0 on node1) has reported no stack: its process is stopped."),
        ({0: _SILENT, 1: _SILENT}, "ranks 0, 1 have reported no stack: their processes are stopped."),
    ],
)
def test_only_a_rank_that_is_seen_elsewhere_had_not_entered(stacks: dict[int, dict[str, Any]], says: str) -> None:
    """A rank without a stack may be in the collective too."""
    assert first_line(stacks) == says
