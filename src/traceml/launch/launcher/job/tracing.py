"""Tracing of a launch: its aggregator, the tunnel to it from each host, and the end of each rank.

The loop of the launch drives it; see `Tracing`.
"""

from __future__ import annotations

import logging
import os
import selectors
import shlex
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from msgspec.structs import replace

from traceml import settings
from traceml.database.flight.flight_archive import unpack_flight
from traceml.database.snapshots.rank_snapshot import ABORT
from traceml.database.store.reader import StoreReader
from traceml.errors import StoreError
from traceml.launch.shared.channel import Channel
from traceml.launch.shared.launch_messages import Exited, Snapshot, StreamOpened, TracedRun, Tunnel, TunnelReady
from traceml.launch.shared.tunnel import TunnelConnector
from traceml.run_folder import COPIES_FOLDER, STORE_NAME
from traceml.supervise.aggregator_process import AggregatorProcess, choose_run_id
from traceml.supervise.final_report import load_card, print_final_report
from traceml.supervise.launch_screen import MakeScreen, Output, ScreenThread, terminal_screen
from traceml.supervise.slurm_jobs import scheduler_facts
from traceml.transport.exit_report import ExitReport
from traceml.transport.run_line import print_start, stuck_line

__all__ = ["Tracing"]

_WINDOW_BYTES = 1 << 20

_log = logging.getLogger("traceml")
_EVERY_S = 2.0
_GRACE_S = 12.0  # the aggregator kills after 10 s


class AbortWatch:
    """Reads a run's store for the decision to end it, as it hangs and its setting `on_hang` is `abort`.

    The aggregator asks each rank to end, and kills those of its own host that cannot. Ranks of other hosts whose
    interpreter is held in C are ended by the launcher.
    """

    def __init__(self, run_dir: Path) -> None:
        self._store = run_dir / STORE_NAME
        self._checked_s = 0.0
        self._aborted_s: float | None = None

    def is_overdue(self) -> bool:
        """Return whether the ranks had enough time to end by themselves; may be called at any rate."""
        now_s = time.monotonic()
        if self._aborted_s is None and now_s - self._checked_s >= _EVERY_S:
            self._checked_s = now_s
            self._aborted_s = now_s if self._is_aborted() else None

        return self._aborted_s is not None and now_s - self._aborted_s >= _GRACE_S

    def _is_aborted(self) -> bool:
        with suppress(StoreError, OSError):  # it is just being made
            if self._store.is_file():
                with StoreReader(self._store) as reader:
                    return reader.last_event(ABORT) is not None

        return False


@dataclass(slots=True)
class TracedHost:
    """One host of a traced launch."""

    name: str
    local: bool
    tunnel: TunnelConnector | None = None
    port: int = 0
    tunnel_error: str = ""


@dataclass(slots=True)
class _FlightTransfer:
    """A flight file that is being received."""

    data: bytearray = field(default_factory=bytearray)
    path: str = ""


class Tracing:
    """One traced launch. A context manager: its exit prints the verdict and ends the aggregator.

    The owner enters it before it starts agents, calls `tick` at least twice a second, passes messages of agents to the
    methods below, and calls `finish` once all hosts are idle. A launch whose workers were never started leaves no run.

    Args:
        name: name of the run if the user gave none: the function's or the script's.
        given: settings by name; they override environment and files.

    Raises:
        SettingsError: a setting is not allowed.
        UsageError: the run's id cannot be a folder's name.
    """

    def __init__(
        self,
        name: str,
        *,
        make_screen: MakeScreen = terminal_screen,
        report: Path | None = None,
        program: str = "traceml launch",
        **given: Any,
    ) -> None:
        config = settings.load(**given)
        self._aggregator = AggregatorProcess(
            choose_run_id(config, config.run_name or name), config.runs_dir.absolute(), on_completing=load_card
        )
        self._environ = {
            "TRACEML_RUN_NAME": config.run_name or name,
            "TRACEML_PROJECT": config.project,
            "TRACEML_ON_HANG": config.on_hang,
            "TRACEML_COMMAND": shlex.join(sys.argv),
        }
        self._abort_watch = AbortWatch(self.run_dir) if config.on_hang == "abort" else None
        self._make_screen, self._report, self._program = make_screen, report, program
        self._quiet = config.quiet
        self._screen: ScreenThread | None = None
        self._waiting: deque[str] = deque()
        self._begun = False
        self._finished: bool | None = None
        self._hosts: dict[str, TracedHost] = {}
        self._flights: dict[int, _FlightTransfer] = {}
        self._exits: list[ExitReport] = []
        self.raised: set[int] = set()
        """Ranks whose function raised: we end their processes later, and that is not the cause of their end."""
        self.output, self.errors = Output("stdout"), Output("stderr")
        """Streams for the job's output, for any thread: it appears above the live view."""

    def __enter__(self) -> Self:
        """Check that a run can be stored.

        Raises:
            TraceMLError: the folder of the runs cannot be written.
        """
        self._aggregator.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self._aggregator.run_dir

    @property
    def must_end(self) -> bool:
        """Whether the job hangs, and its ranks have not ended though they were asked to (`on_hang = "abort"`)."""
        return self._begun and self._abort_watch is not None and self._abort_watch.is_overdue()

    def tick(self) -> None:
        """Restart the aggregator if it died, print what no rank can, and have the view drawn."""
        if not self._begun:
            return

        self._aggregator.restart_if_dead()
        for facts in filter(None, self._aggregator.rank_messages()):
            if not self._quiet:
                line = f"{stuck_line(facts)}\n"
                self.errors.write(line) if self._screen is None else self._waiting.append(line)

        if self._screen is not None:
            self._screen.tick()

    # --- hosts -------------------------------------------------------------------------------------------------------

    def add_host(
        self, host: str, channel: Channel, selector: selectors.BaseSelector, *, job: str, hostname: str, local: bool
    ) -> None:
        """Add a host; ask its agent for a tunnel to the aggregator unless it is this machine.

        Args:
            hostname: its own name.
            local: whether its ranks can reach this machine's loopback.
        """
        self._hosts[host] = known = TracedHost(hostname, local)
        if not local:
            known.tunnel = TunnelConnector(selector, channel, self._aggregator.port)
            channel.send(Tunnel(job=job))

    def tunnel_ready(self, host: str, message: TunnelReady) -> None:
        """Record the port of a host's tunnel, or the reason why there is none."""
        known = self._hosts[host]
        known.port = message.port
        if not known.port:
            known.tunnel_error = message.error or "no port"
            _log.warning("ranks on %s are not traced live: %s", host, known.tunnel_error)

    def is_ready(self, host: str) -> bool:
        """Return whether ranks can be started on a host."""
        known = self._hosts[host]
        return known.local or bool(known.port) or bool(known.tunnel_error)

    def environ(self, host: str) -> dict[str, str]:
        """Start the aggregator, and return the variables by which the ranks of a host find it.

        Raises:
            TraceMLError: the run's folder cannot be written.
        """
        self._begin()
        known = self._hosts[host]
        address = None if known.local else f"127.0.0.1:{known.port or 9}"  # 9: no listener, rows stay in the rank
        return {**self._environ, **self._aggregator.environ(address)}

    def traced_run(self, host: str) -> TracedRun:
        """Return what a host's agent looks for flight files with; the aggregator itself finds those of this machine."""
        aggregator = self._aggregator
        local = self._hosts[host].local
        return {"run_id": aggregator.run_id, "runs_dir": str(aggregator.runs_dir), "flights": not local}

    # --- messages of agents ------------------------------------------------------------------------------------------

    def stream_opened(self, host: str, message: StreamOpened, channel: Channel) -> None:
        """Handle a new stream of the kind `tunnel` or `flight`."""
        known, number = self._hosts[host], message.id
        if message.kind == "tunnel":
            if known.tunnel is not None:
                known.tunnel.accept_connection(number)

            return

        flight = self._flights[message.rank] = _FlightTransfer()
        label = f"{known.name}-{message.rank}-{number}"
        channel.accept(
            number, flight.data.extend, lambda error: self._arrived(flight, label, error), window_bytes=_WINDOW_BYTES
        )

    def worker_snapshot(self, host: str, message: Snapshot) -> None:
        """Pass on an agent's snapshot of a worker that is silent."""
        about = {"host": self._hosts[host].name, "rank": message.rank, "pid": message.pid}
        self._aggregator.client.send_snapshot({**about, "snapshot": message.snapshot, "job": message.traced})

    def worker_exited(self, host: str, message: Exited, *, stopped: bool) -> None:
        """Record the end of a worker.

        Args:
            stopped: whether we ended it because of others.
        """
        raised = message.rank in self.raised
        self._exits.append(
            ExitReport(
                rank=message.rank,
                local_rank=message.local_rank,
                pid=message.pid,
                host=self._hosts[host].name,
                exitcode=1 if raised else -message.signal if message.signal else message.code,
                time=time.time(),
                stopped=stopped and not raised,
                oom=message.oom,
                crash=message.crash,
            )
        )

    def host_lost(self, host: str, ranks: Mapping[int, int | None], reason: str, *, stopped: bool) -> None:
        """Record a lost host.

        Args:
            ranks: its ranks that have not ended, with their processes.
            stopped: whether we were ending them because of others.
        """
        known = self._hosts.get(host)
        if known is None:
            return

        if known.tunnel is not None:
            known.tunnel.close()

        for rank, pid in ranks.items():
            self._exits.append(
                ExitReport(rank=rank, pid=pid, host=known.name, lost=reason, time=time.time(), stopped=stopped)
            )

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self, status: int, ended_by: Mapping[str, Any] | None = None) -> bool:
        """Report the end of the job to the aggregator; return whether the run is complete on disk.

        Args:
            status: the job's exit status, as in a shell.
            ended_by: the signal that ended it, see `AggregatorProcess.finish`.
        """
        why = scheduler_facts(os.environ) if status else {}
        copies: dict[int | None, str] = {rank: flight.path for rank, flight in self._flights.items() if flight.path}
        exits = [replace(each, flight=copies.get(each.rank), **why) for each in self._exits]
        self._finished = self._begun and self._aggregator.finish(exits, status, ended_by)
        return self._finished

    def close(self) -> None:
        """Restore the terminal, print the verdict, end the aggregator. May be called again."""
        if self._screen is not None:
            self._screen.close()
            self._screen = None

        self.output.redirected = self.errors.redirected = None
        for known in self._hosts.values():
            if known.tunnel is not None:
                known.tunnel.close()
                known.tunnel = None

        self._aggregator.close()
        if self._begun and self._finished is not None:
            finished, self._finished = self._finished, None
            print_final_report(
                self.run_dir,
                finished=finished,
                program=self._program,
                report=self._report,
                quiet=self._quiet,
                file=sys.stderr,
            )

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _arrived(self, flight: _FlightTransfer, label: str, error: Mapping[str, Any] | None) -> None:
        if error is not None:
            _log.warning("the last rows of %s did not arrive: %s", label, error.get("text"))
            return

        try:
            flight.path = str(unpack_flight(bytes(flight.data), self.run_dir / COPIES_FOLDER, label))
        except (OSError, ValueError) as failure:
            _log.warning("the last rows of %s cannot be kept: %s", label, failure)

        flight.data.clear()

    def _begin(self) -> None:
        if not self._begun:
            self._aggregator.watch_ranks()
            self._aggregator.start()
            self._begun = True
            if not self._quiet:
                print_start(self.run_dir)

            screen = self._make_screen(self.run_dir)
            if screen is not None:
                self.output.redirected = self.errors.redirected = self._waiting
                self._screen = ScreenThread(screen, self._waiting)
