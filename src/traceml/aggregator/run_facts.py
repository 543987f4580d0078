"""Facts of a run, as its store holds them."""

from __future__ import annotations

import os
import socket
import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from traceml.clock import SteadyClock, boot_id, pid_namespace, process_start_ticks
from traceml.database.states import RunStatus
from traceml.database.store.store import StoreWriter
from traceml.ids import DEFAULT_PROJECT
from traceml.transport.hello import Hello

__all__ = ["RunFacts", "attempt_base"]


def attempt_base(run: Mapping[str, Any], host: str) -> int:
    """Return the number of the run's attempt in which the launcher on a host has counted no restart yet.

    Args:
        run: the facts of the run.
    """
    return int(run.get("attempt_bases", {}).get(host, 0))


class RunFacts:
    """The entry `run` of a store.

    Args:
        key: the job key by which its ranks find it.
        named: whether the user chose its id.
    """

    def __init__(self, run_id: str, key: str, *, named: bool) -> None:
        clock = SteadyClock.start()
        self.values: dict[str, Any] = {
            "id": run_id, "name": run_id, "project": DEFAULT_PROJECT, "job": key, "named": named, "command": "",
            "world_size": 1, "attempt": 0, "attempt_bases": {}, "started": clock.epoch_ns / 1e9, "clock": clock.facts,
            "ended": None, "state": RunStatus.RUNNING.value, "hosts": [],
        }  # fmt: skip

    @property
    def state(self) -> str:
        """running, finished, stopped, failed or lost."""
        return str(self.values["state"])

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.values["ended"] is not None

    @property
    def attempt(self) -> int:
        """The newest attempt of any rank."""
        return int(self.values["attempt"])

    @property
    def world_size(self) -> int:
        """Number of ranks of the newest attempt."""
        return int(self.values["world_size"])

    def attempt_of(self, counted: int, host: str) -> int:
        """Return the run's number of an attempt, from the restarts that the launcher on a host counts.

        Its count begins at 0 when the job comes again. And torchrun's agents count each for itself, the failures of
        their own ranks only: one that starts its ranks again because of another host counts no restart.
        """
        return counted + attempt_base(self.values, host)

    def name_after(self, hello: Hello) -> None:
        """Take name, project, command and start from the first rank; a launcher's run began before it."""
        self.values |= {"name": hello.name or self.values["id"], "project": hello.project, "command": hello.command}
        self.begin_with(hello)

    def add_rank(self, hello: Hello, attempt: int) -> None:
        """Take a rank's host, how the attempt is counted there, and the restarts that are left."""
        if self.attempt_of(hello.attempt, hello.host) != attempt:
            self.values["attempt_bases"] = {**self.values["attempt_bases"], hello.host: attempt - hello.attempt}

        hosts = self.values["hosts"]
        at = bisect_left(hosts, hello.host)  # sorted: thousands of hosts are asked for by each of their ranks
        if hosts[at : at + 1] != [hello.host]:
            self.values["hosts"] = [*hosts[:at], hello.host, *hosts[at:]]

        self.values["restarts_left"] = hello.restarts_left

    def begin_with(self, hello: Hello) -> None:
        """Set the start to that of a process's script, if it is earlier."""
        self.begin_at(self.now_s() - hello.script_ms / 1000)

    def begin_at(self, epoch_s: float) -> None:
        """Set the start to a moment that was found out later, if it is earlier."""
        self.values["started"] = min(self.values["started"], epoch_s)

    def end(self, state: str, at_s: float | None = None) -> None:
        """Set the end to an epoch second, by default this moment; a run does not end before its start."""
        ended = self.now_s() if at_s is None else max(at_s, self.values["started"])
        self.values |= {"state": state, "ended": ended}

    def reopen(self) -> None:
        """Remove the end."""
        self.values |= {"state": RunStatus.RUNNING.value, "ended": None}

    def now_s(self) -> float:
        """Return the epoch seconds of this moment; a wall clock that is set does not change the run's durations."""
        clock = SteadyClock.from_facts(self.values.get("clock"))
        return time.time() if clock is None else clock.now_s()

    def write(self, store: StoreWriter) -> None:
        """Put the facts, and who writes the store, into it."""
        pid = os.getpid()
        store.put_meta("run", self.values)
        store.put_meta(
            "aggregator",
            {
                "pid": pid,
                "start_ticks": process_start_ticks(pid),
                "pid_namespace": pid_namespace(),
                "boot_id": boot_id(),
                "host": socket.gethostname(),
            },
        )
