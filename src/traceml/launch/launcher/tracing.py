"""The run of a launch that is traced: its aggregator, the way to it from each host, and what became of each rank.

The launch's own loop drives it; see `Tracing`.
"""

from __future__ import annotations

import logging
import selectors
import shlex
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from traceml import settings
from traceml.database.flight import COPIES_FOLDER
from traceml.errors import UsageError
from traceml.ids import new_run_id, safe_run_id
from traceml.launch.wire.channel import Channel
from traceml.launch.wire.flight_archive import keep_copy
from traceml.launch.wire.tunnel import TunnelConnector
from traceml.supervise.aggregator_process import AggregatorProcess
from traceml.supervise.conclusion import conclude
from traceml.supervise.screens import MakeScreen, Output, terminal_screen
from traceml.supervise.supervisor import Screen

__all__ = ["Tracing"]

_WINDOW_BYTES = 1 << 20

_log = logging.getLogger("traceml")


@dataclass(slots=True)
class TracedHost:
    """What is known of one host."""

    name: str
    local: bool
    tunnel: TunnelConnector | None = None
    port: int = 0
    trouble: str = ""


@dataclass(slots=True)
class _Flight:
    """A flight file on its way here."""

    data: bytearray = field(default_factory=bytearray)
    path: str = ""


class Tracing:
    """One traced launch. A context manager, at whose exit the verdict is printed and the aggregator gone.

    The owner calls `start` before the agents, `tick` twice a second or more, passes on what agents say, and calls
    `finish` once all hosts are idle. A launch whose workers were never started leaves no run.

    Args:
        name: what to call the run where the user gave it no name: the function's or the script's.
        make_screen: makes the live view.
        report: where to put a copy of report.json.
        program: what to call ourselves in messages.
        given: settings by name, over those of environment and files.

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
        self._keeper = AggregatorProcess(
            _run_id(config.run_id) or new_run_id(config.run_name or name), config.runs_dir.absolute()
        )
        self._environ = {
            "TRACEML_RUN_NAME": config.run_name or name,
            "TRACEML_PROJECT": config.project,
            "TRACEML_COMMAND": shlex.join(sys.argv),
        }
        self._make_screen, self._report, self._program = make_screen, report, program
        self._screen: Screen | None = None
        self._waiting: deque[str] = deque()
        self._begun = False
        self._finished: bool | None = None
        self._hosts: dict[str, TracedHost] = {}
        self._flights: dict[int, _Flight] = {}
        self._exits: list[dict[str, Any]] = []
        self._raised: set[int] = set()
        self.output, self.errors = Output("stdout"), Output("stderr")
        """Where the job's output is to be written, from any thread: it appears above the live view."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self._keeper.run_dir

    def start(self) -> None:
        """See that there can be a run.

        Raises:
            TraceMLError: the folder of the runs cannot be written.
        """
        self._keeper.check()

    def tick(self) -> None:
        """Start the aggregator again if it died, and draw."""
        if not self._begun:
            return

        self._keeper.keep()
        if self._screen is not None:
            self._show_output()
            self._screen.tick()

    # --- hosts -------------------------------------------------------------------------------------------------------

    def joined(
        self, host: str, channel: Channel, selector: selectors.BaseSelector, *, job: Any, hostname: str, local: bool
    ) -> None:
        """Take a host in; ask its agent for a way to the aggregator unless it is on this machine.

        Args:
            host: what the launcher calls it.
            channel: to its agent.
            selector: the launcher's loop.
            job: the job's id on the channel.
            hostname: what it calls itself.
            local: whether its ranks can reach this machine's loopback.
        """
        self._hosts[host] = known = TracedHost(hostname, local)
        if not local:
            known.tunnel = TunnelConnector(selector, channel, self._keeper.port)
            channel.send("tunnel", job=job)

    def tunnelled(self, host: str, message: Mapping[str, Any]) -> None:
        """Take an agent's word that ranks find the aggregator at a port there, or why not."""
        known = self._hosts[host]
        known.port = int(message.get("port") or 0)
        if not known.port:
            known.trouble = str(message.get("error") or "no port")
            _log.warning("ranks on %s are not traced live: %s", host, known.trouble)

    def ready(self, host: str) -> bool:
        """Whether ranks can be started there."""
        known = self._hosts[host]
        return known.local or bool(known.port) or bool(known.trouble)

    def environ(self, host: str) -> dict[str, str]:
        """Return the variables by which the ranks of a host find their aggregator, which is started now.

        Raises:
            TraceMLError: the run's folder cannot be written.
        """
        self._begin()
        known = self._hosts[host]
        address = None if known.local else f"127.0.0.1:{known.port or 9}"  # 9: nobody answers, rows stay in the rank
        return {**self._environ, **self._keeper.environ(address)}

    def about(self, host: str) -> dict[str, Any]:
        """Return what the agent must know to send flight files; files of this machine are found without."""
        keeper = self._keeper
        return {"run_id": keeper.run_id, "runs_dir": str(keeper.runs_dir), "flights": not self._hosts[host].local}

    # --- what agents say ---------------------------------------------------------------------------------------------

    def opened(self, host: str, message: Mapping[str, Any], channel: Channel) -> None:
        """Take a stream of the kind `tunnel` or `flight`."""
        known, number = self._hosts[host], int(message["id"])
        if message["kind"] == "tunnel":
            if known.tunnel is not None:
                known.tunnel.opened(dict(message))

            return

        rank = int(message["rank"])
        flight = self._flights[rank] = _Flight()
        label = f"{known.name}-{rank}-{number}"
        channel.accept(
            number, flight.data.extend, lambda error: self._arrived(flight, label, error), window_bytes=_WINDOW_BYTES
        )

    def raised(self, rank: int) -> None:
        """Take note that a function raised: its process stays until it is ended, and that is not how it ended."""
        self._raised.add(rank)

    def exited(self, host: str, message: Mapping[str, Any], *, stopped: bool) -> None:
        """Take an agent's word on how a worker ended.

        Args:
            host: where.
            message: `{rank, local_rank, pid, code, signal}`.
            stopped: whether we ended it because of others.
        """
        signal = message.get("signal")
        told = {
            "rank": message["rank"],
            "local_rank": message.get("local_rank", 0),
            "pid": message.get("pid"),
            "host": self._hosts[host].name,
            "exitcode": -signal if signal else message.get("code"),
            "time": time.time(),
        }
        if message["rank"] in self._raised:
            told["exitcode"] = 1
        elif stopped:
            told["stopped"] = True

        self._exits.append(told)

    def host_lost(self, host: str, ranks: Mapping[int, int | None], reason: str) -> None:
        """Take note that a host is out of reach.

        Args:
            host: which.
            ranks: its ranks that had not ended, with their process ids where they are known.
            reason: why, in words.
        """
        known = self._hosts.get(host)
        if known is None:
            return

        if known.tunnel is not None:
            known.tunnel.close()

        for rank, pid in ranks.items():
            self._exits.append({"rank": rank, "pid": pid, "host": known.name, "lost": reason, "time": time.time()})

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self, status: int) -> bool:
        """Tell the aggregator how everything ended; return whether the run is complete on disk.

        Args:
            status: what the job ended with, as a shell counts.
        """
        for told in self._exits:
            flight = self._flights.get(told["rank"])
            if flight is not None and flight.path:
                told["flight"] = flight.path

        self._finished = self._begun and self._keeper.finish(self._exits, status)
        return self._finished

    def close(self) -> None:
        """Leave the terminal as it was, print the verdict, see the aggregator out. May be called again."""
        self._show_output()
        self.output.redirected = self.errors.redirected = None
        if self._screen is not None:
            self._screen.close()
            self._screen = None

        for known in self._hosts.values():
            if known.tunnel is not None:
                known.tunnel.close()
                known.tunnel = None

        self._keeper.close()
        if self._begun and self._finished is not None:
            finished, self._finished = self._finished, None
            conclude(self.run_dir, finished=finished, program=self._program, report=self._report, file=sys.stderr)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _arrived(self, flight: _Flight, label: str, error: Mapping[str, Any] | None) -> None:
        if error is not None:
            _log.warning("the last rows of %s did not arrive: %s", label, error.get("text"))
            return

        try:
            flight.path = str(keep_copy(bytes(flight.data), self.run_dir / COPIES_FOLDER, label))
        except (OSError, ValueError) as failure:
            _log.warning("the last rows of %s cannot be kept: %s", label, failure)

        flight.data.clear()

    def _begin(self) -> None:
        if not self._begun:
            self._keeper.start()
            self._begun = True
            self._screen = self._make_screen(self.run_dir)
            if self._screen is not None:
                self.output.redirected = self.errors.redirected = self._waiting

    def _show_output(self) -> None:
        while self._screen is not None and self._waiting:
            self._screen.write(self._waiting.popleft().encode(errors="replace"))


def _run_id(wanted: str | None) -> str | None:
    try:
        return safe_run_id(wanted) if wanted else None
    except ValueError as error:
        raise UsageError(f"run_id: {error}") from error
