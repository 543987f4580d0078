"""Whether the aggregator that writes a run is alive, as far as a reader can know."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import pytest

from traceml.clock import boot_id, pid_namespace, process_start_ticks
from traceml.runs.run_state import is_written_by, state_of


def here() -> dict[str, Any]:
    """Facts about this process as a live aggregator; the module may be imported in another one."""
    return {
        "host": socket.gethostname(),
        "boot_id": boot_id(),
        "pid_namespace": pid_namespace(),
        "pid": os.getpid(),
        "start_ticks": process_start_ticks(os.getpid()),
    }


@pytest.mark.parametrize(
    ("facts", "silent_s", "state"),
    [
        ({}, 90_000, "running"),
        ({"start_ticks": 1}, 0, "lost"),
        ({"pid": 2**22 + 1}, 0, "lost"),
        ({"boot_id": "another"}, 0, "lost"),
        ({"host": "another", "pid": 2**22 + 1}, 80_000, "running"),
        ({"host": "another", "pid": 2**22 + 1}, 90_000, "lost"),
        # A container with the network, and so the name, of its host.
        ({"pid_namespace": "pid:[7]", "pid": 2**22 + 1}, 80_000, "running"),
        ({"pid_namespace": "pid:[7]", "pid": 2**22 + 1}, 90_000, "lost"),
    ],
)
def test_a_run_is_lost_if_its_aggregator_is_certainly_gone(facts: dict[str, Any], silent_s: float, state: str) -> None:
    """A run that is told as lost may be removed: where nothing can be known, it runs, for a day without a write."""
    written_s = time.time() - silent_s
    assert state_of({"state": "running"}, here() | facts, written_s) == state
    assert state_of({"state": "finished"}, here() | facts, written_s) == "finished"


def test_a_store_of_an_earlier_checkout_has_no_namespace() -> None:
    """Its number is looked for here."""
    earlier = {name: fact for name, fact in here().items() if name != "pid_namespace"}

    assert state_of({"state": "running"}, earlier, None) == "running"
    assert state_of({"state": "running"}, earlier | {"start_ticks": 1}, None) == "lost"


@pytest.mark.parametrize("name", ["host", "boot_id", "pid_namespace", "pid"])
def test_the_writer_is_one_process(name: str) -> None:
    """Several containers have a process of the same number."""
    assert is_written_by(here(), os.getpid())
    assert not is_written_by(here() | {name: "another"}, os.getpid())
