"""Aggregator: takes the ranks of any number of runs, stores and diagnoses their rows, and ends the runs."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.alerts.finding_alerts import FindingAlerts
from traceml.aggregator.alerts.finding_profiles import FindingProfiles
from traceml.aggregator.checks.run_checks import RunChecks, checking
from traceml.aggregator.commands import Commands
from traceml.aggregator.registry import Registry, prepare_runs_dir, safe_run_id
from traceml.aggregator.relay.relayed_hosts import RelayedHosts
from traceml.aggregator.streams.stream import RankStream, StreamPeer
from traceml.database.store.store import merge_wal
from traceml.errors import ProtocolError, StoreError
from traceml.fail_open import fail_open
from traceml.run_folder import STORE_NAME
from traceml.track.delivery.delivery_manager import STALL_LIMIT_S, DeliveryManager, RunDeliveries
from traceml.transport.folder_aggregator import folder_id
from traceml.transport.hello import Hello
from traceml.transport.server import Peer, RefusedError, Server
from traceml.transport.tls import ServerIdentity

__all__ = ["Aggregator"]

# An ack follows its rows after half of this on average; longer ticks save nothing (measured).
TICK_S = 0.1
# A host does not wait for each of its messages to be stored, and the verdict stores what has come before it looks.
_HOSTS_TICK_S = 0.5
_WATCH_S = 0.25
_VERDICT_S = 1.0
# After each tick, when the rows are acknowledged, for summing, merging and thinning what the open runs have stored.
_MAINTAIN_S = 0.015
_END_POLLS, _END_POLL_S = 100, 0.05
# An aggregator that ends when idle waits this long for its first rank.
_NEVER_JOINED_S = 60.0
_ADOPT_S = 2.0

_log = logging.getLogger("traceml")


class Aggregator:
    """Many runs, one process, one core.

    Args:
        delivery_nice: nice value of delivery processes, and of those that read about the code of a run.
        profiles_deliveries: write a profile of each delivery process next to its state.
        run_id: the run that a launcher started this aggregator for; the launcher reports its end.
        launcher_pid: that launcher; by default the parent, unless it is gone when this process asks for it.
        on_left: called when all ranks of a run have said bye; their processes take a moment to end.
        on_mute: called when a job is stuck and none of its ranks can print that, with the facts of `stuck_line`.
        on_run_finished: called with a run's folder after its end, in a thread of its own.
        on_run_delivered: likewise when its logged rows are delivered, or are left for `traceml sync`.
        retention_gb: gigabytes of steps and samples that a run keeps; None keeps all.

    Raises:
        StoreError: the runs folder cannot be written.
    """

    def __init__(
        self,
        runs_dir: Path,
        token: str,
        *,
        delivery_nice: int,
        profiles_deliveries: bool = False,
        run_id: str | None = None,
        launcher_pid: int | None = None,
        exit_when_idle: bool = False,
        on_rank: Callable[[], object] | None = None,
        on_left: Callable[[], object] | None = None,
        on_mute: Callable[[dict[str, Any]], object] | None = None,
        on_run_finished: Callable[[Path], object] | None = None,
        on_run_delivered: Callable[[Path], object] | None = None,
        retention_gb: float | None = None,
        alerts: FindingAlerts | None = None,
        profiles: FindingProfiles | None = None,
        tls: ServerIdentity | None = None,
    ) -> None:
        prepare_runs_dir(runs_dir)
        self.registry = Registry(runs_dir, retention_gb)
        self.server = Server(self, token, tls)
        self._commands = Commands(self)
        self._hosts = RelayedHosts(self._admit)
        self._run_id = run_id
        self._exit_when_idle = exit_when_idle
        self._on_rank = on_rank
        self._on_left = on_left
        self._on_run_finished = on_run_finished
        self._on_run_delivered = on_run_delivered
        # An aggregator that ends when idle does not wait for a tracker that is down; one that serves on does.
        self._deliveries = DeliveryManager(
            STALL_LIMIT_S if exit_when_idle else None, delivery_nice, profile=profiles_deliveries
        )
        self._finishing: set[Path] = set()
        self._parent = os.getppid() if launcher_pid is None else launcher_pid
        self.profiles = profiles if profiles is not None else FindingProfiles(0.0)
        self._checks = RunChecks(self._start, on_run_finished, delivery_nice, alerts, self.profiles, on_mute)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: dict[ActiveRun, asyncio.Task[bool]] = {}
        self._tick_s = math.inf
        self._tick_timer: asyncio.TimerHandle | None = None
        self._idle_since_s = self._adopted_s = time.monotonic()
        self._seen_any = False
        self._done = asyncio.Event()

    async def serve(self, sock: socket.socket, on_ready: Callable[[], None] | None = None) -> None:
        """Serve on a bound socket until stopped, idle (if `exit_when_idle`), SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

        self._resume_runs()
        await self.server.start(sock)
        # Imported modules live as long as the process: the collector need not scan them ten times a second.
        gc.freeze()  # without a collection before, which takes 30 ms for a few hundred objects
        if on_ready is not None:
            on_ready()

        watch = asyncio.create_task(self._watch())
        await self._done.wait()
        watch.cancel()
        await self._close_all()

    def stop(self) -> None:
        """Stop: store the received rows, and leave open runs to the next aggregator."""
        self._done.set()

    def statistics(self) -> dict[str, Any]:
        """Return counters of the server and of each open run, for the command `status`."""
        return {
            "server": asdict(self.server.statistics()),
            "runs": [
                {
                    "id": run.id,
                    "job": run.key,
                    "path": str(run.path),
                    "state": run.state,
                    "streams": len(run.streams),
                    "connected": len(run.connected),
                    "verdicts": self._checks.verdict_count(run),
                    **asdict(run.ingest.statistics()),
                }
                for run in self.registry.open_runs
            ],
        }

    # --- transport.server.Handler -------------------------------------------------------------------------------

    def welcome(self, peer: Peer) -> dict[str, Any]:
        """Admit a peer: a rank gets its run and the numbers of its stored rows; clients and agents need neither."""
        hello = peer.hello
        assert hello is not None
        if self._done.is_set() and hello.role == "rank":  # its launcher may still tell how the ranks ended
            raise RefusedError("this aggregator is stopping", retry=True)

        if hello.runs_dir and list(hello.runs_dir_id) != folder_id(self.registry.runs_dir):
            raise RefusedError(_elsewhere(hello, self.registry.runs_dir))

        if hello.role != "rank":
            return {"acked": {}, "run_id": "", "run_dir": "", "run_dir_id": [], "stream": 0}

        run, stream = peer.context = self._admit(hello, peer)
        return {
            "acked": dict(stream.next), "run_id": run.id, "run_dir": str(run.path), "run_dir_id": folder_id(run.path),
            "stream": stream.id, "sample_interval_s": run.sample_interval_s,
        }  # fmt: skip

    def _admit(self, hello: Hello, peer: StreamPeer) -> tuple[ActiveRun, RankStream]:
        """Connect a rank, new or known, to its run."""
        known = self.registry.find_stream(hello)
        try:
            if known is not None:
                run, stream = known
                was_over = run.ended
                run.connect(stream, hello, peer)
            else:
                run, attempt = self.registry.assign(hello)
                was_over = run.ended
                stream = run.join(hello, attempt, peer)
        except StoreError as error:
            raise RefusedError(str(error), retry=True) from error

        if was_over:
            self.registry.mark_open(run)

        self._seen_any = True
        self._schedule()
        if self._on_rank is not None:
            with fail_open(_log, "aggregator", "the report cannot be prepared", once=True):
                self._on_rank()

        return run, stream

    def rows(self, peer: Peer, message: dict[str, Any]) -> None:
        """Take rows, to be stored and acknowledged at the next tick."""
        context = peer.context
        if context is None:
            raise ProtocolError("rows come from ranks only")

        get = message.get
        context[0].ingest.take(context[1], get("table"), get("seq"), get("n"), get("data"))
        self._schedule()

    def message(self, peer: Peer, message: dict[str, Any]) -> None:
        """Handle any message except rows."""
        kind = message["t"]
        if peer.hello is not None and peer.hello.role == "relay" and kind != "bye":
            self._hosts.take(peer, message)
            self._schedule(_HOSTS_TICK_S if kind == "update" else TICK_S)
        elif kind == "command" and peer.context is None:
            self._start(self._commands.run(peer, message))
        elif kind == "reply" and peer.context is not None:
            self._commands.take_reply(peer.context[1], message)
        elif kind == "bye":
            self._bye(peer, str(message.get("reason"))[:200], _failures_of(message))
        elif kind == "clock" and peer.context is not None:
            self._note_clock(peer.context[0], peer.context[1], message)
        else:
            raise ProtocolError(f"{kind[:50]!r} is not expected from a {peer.hello.role if peer.hello else 'peer'}")

    def disconnected(self, peer: Peer) -> None:
        """Record that a peer's connection has ended."""
        self._hosts.disconnected(peer)
        if peer.context is None:
            return

        run, stream = peer.context
        peer.context = None
        if stream.peer is peer:
            run.disconnected(stream)

    # --- ends of runs ------------------------------------------------------------------------------------------------

    async def end(self, run: ActiveRun, status: int | None = None) -> bool:
        """Close a run and write its report; return False while its rows cannot be stored."""
        if run not in self._ending:
            if run.ended:
                return True

            self._ending[run] = task = asyncio.create_task(self._end(run, status))
            task.add_done_callback(lambda _: self._ending.pop(run, None))

        return await asyncio.shield(self._ending[run]) and run.ended  # a rank may have opened it again

    async def _end(self, run: ActiveRun, status: int | None) -> bool:
        await self._checks.sources.end(run)
        run.recover_flights()
        run.add_unmatched_exits()
        report_follows = self._on_run_finished is not None
        if not run.end(status, diagnose=self._checks.alerts.has_targets, report_follows=report_follows):
            return False

        self._hosts.stored(run)
        self._hosts.confirm(run, at_once=True)
        self._checks.end(run)
        if not run.streams and run.id != self._run_id:
            self._deliveries.forget(run.path)
            self.registry.discard(run)
            return True

        self.registry.mark_ended(run)
        if self._on_run_finished is not None:
            await asyncio.to_thread(_call, self._on_run_finished, run.path)

        self._deliveries.poll(run.path, ended=True)
        self._finish_delivered()  # a run without trackers at once: its launcher waits
        return True

    def is_delivering(self, path: Path) -> bool:
        """Whether rows or alerts of an ended run are still being delivered."""
        return path in self._deliveries.ended_runs or path in self._finishing or self._checks.alerts.is_sending(path)

    async def _await_ranks(self) -> None:
        """Wait a moment for ranks that end too, and for the launcher's report of it.

        A scheduler signals all processes of a job at once.
        """
        for _ in range(_END_POLLS):
            for run in self.registry.open_runs:
                self._check_launcher(run)
                run.check_absent()
                run.commit()

            if all(_is_left(run) and not self._has_launcher(run) for run in self.registry.open_runs):
                break

            await asyncio.sleep(_END_POLL_S)

        for run in filter(_is_left, self.registry.open_runs):
            run.end_remaining(None)  # also those of other hosts, which nobody waits for any more

    async def _close_all(self) -> None:
        if self._exit_when_idle:
            await self._await_ranks()

        await self._checks.sources.close()
        for run in self.registry.open_runs:
            over = not run.is_connected and all(stream.ended for stream in run.streams)
            if over and await self.end(run):
                continue

            run.close()

        await asyncio.gather(*self._ending.values(), return_exceptions=True)
        await self._checks.close()
        await asyncio.to_thread(self._deliveries.stop)
        await self.server.stop()

    # --- time --------------------------------------------------------------------------------------------------------

    def _schedule(self, after_s: float = TICK_S) -> None:
        """Have a tick within some seconds."""
        if self._tick_s <= after_s:  # nearly always: it is due no later, or a moment later than one from now would be
            return

        if self._tick_timer is not None:
            self._tick_timer.cancel()

        self._tick_s = after_s
        self._tick_timer = asyncio.get_running_loop().call_later(after_s, self._tick)

    def _tick(self) -> None:
        self._tick_s, self._tick_timer = math.inf, None
        for run in self.registry.open_runs:
            if run.commit():
                self._hosts.stored(run)
                self._maintain(run)
            else:
                self._schedule()

    def _maintain(self, run: ActiveRun) -> None:
        """Maintain the store of a run; all open runs share the time."""
        run.maintain(_MAINTAIN_S / len(self.registry.open_runs), self._deliveries.cursors(run.path))

    async def _watch(self) -> None:
        verdict_at_s = time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_S)
            now_s = time.monotonic()
            diagnose = now_s >= verdict_at_s
            if diagnose:
                verdict_at_s = max(verdict_at_s + _VERDICT_S, now_s)

            for run in self.registry.open_runs:
                with checking(run):
                    self._watch_run(run, diagnose=diagnose)

            self._manage_deliveries()
            self._stop_if_idle()

    def _manage_deliveries(self) -> None:
        """Start delivery processes and restart dead ones, on this thread: they end with the thread that starts them."""
        for run in self.registry.open_runs:
            self._deliveries.poll(run.path, ended=False)

        for path in self._deliveries.ended_runs:
            self._deliveries.poll(path, ended=True)

        self._finish_delivered()

    def _finish_delivered(self) -> None:
        """Start the last work on runs whose delivery has ended."""
        for delivered in self._deliveries.pop_delivered():
            self._finishing.add(delivered.run_dir)
            self._start(self._finish(delivered))

    async def _finish(self, run: RunDeliveries) -> None:
        try:
            await asyncio.to_thread(run.close)
            await asyncio.to_thread(merge_wal, run.run_dir / STORE_NAME)
            if self._on_run_delivered is not None:
                await asyncio.to_thread(_call, self._on_run_delivered, run.run_dir)
        finally:
            self._finishing.discard(run.run_dir)

    def _watch_run(self, run: ActiveRun, *, diagnose: bool) -> None:
        self._check_launcher(run)
        run.check_absent()
        if diagnose:
            self._hosts.ask(run, self._checks.check(run).wanted)

        if not run.ended:  # also where no rows arrive
            self._hosts.confirm(run)
            self._maintain(run)

        if run not in self._ending and run.is_over(has_launcher=self._has_launcher(run)):
            self._start(self._end_checked(run))  # the other runs are not kept waiting for its report

    async def _end_checked(self, run: ActiveRun) -> None:
        with checking(run):
            await self.end(run)

    def _has_launcher(self, run: ActiveRun) -> bool:
        """Whether a live launcher will report the end of this run."""
        return run.id == self._run_id and os.getppid() == self._parent

    def _check_launcher(self, run: ActiveRun) -> None:
        """Note when the launcher of a run is gone that has reported no end."""
        if run.id == self._run_id and run not in self._ending and os.getppid() != self._parent:
            run.note_lost_launcher(self._parent)

    def _stop_if_idle(self) -> None:
        now_s = time.monotonic()
        delivering = self._deliveries.ended_runs or self._finishing or self._checks.alerts.is_busy
        if self.registry.open_runs or self._ending or delivering or any(peer.context for peer in self.server.peers):
            self._idle_since_s = self._adopted_s = now_s

        quiet_s = now_s - self._idle_since_s
        if self._exit_when_idle and not self._seen_any and now_s - self._adopted_s > _ADOPT_S:
            # The rank that started this aggregator may have been killed before it connected.
            self._adopted_s = now_s
            with fail_open(_log, "aggregator", "rows of killed ranks were not recovered", once=True):
                self._seen_any = bool(self.registry.recover_flights())
        elif self._exit_when_idle and quiet_s > (_WATCH_S if self._seen_any else _NEVER_JOINED_S):
            self.stop()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _resume_runs(self) -> None:
        """Open the run that this aggregator is for, or those that an earlier one has left here."""
        if self._run_id is not None:
            key, self._run_id = self._run_id, safe_run_id(self._run_id)
            try:
                self.registry.begin(self._run_id, key, named=True)
            except RefusedError as error:
                if not error.retry:
                    raise StoreError(str(error)) from error

                _log.warning("run %s begins when its ranks connect: %s", self._run_id, error)
                return

            self._seen_any = True
            return

        if not self._exit_when_idle:
            self.registry.resume_unfinished_runs()

        self.registry.recover_flights()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop keeps no strong reference to it
        task.add_done_callback(self._tasks.discard)

    def _bye(self, peer: Peer, reason: str, failures: dict[str, int]) -> None:
        if peer.context is None:
            peer.close()
            return

        run, stream = peer.context
        run.bye(stream, reason, peer, failures)
        run.commit(force=True)
        if self._on_left is not None and all(each.ended for each in run.streams):
            self._on_left()

        if run.ingest.waiting:
            self._schedule()

    @staticmethod
    def _note_clock(run: ActiveRun, stream: RankStream, message: dict[str, Any]) -> None:
        offset, rtt = message.get("offset_ns"), message.get("rtt_ns")
        if not isinstance(offset, int) or not isinstance(rtt, int):
            raise ProtocolError("a clock message carries offset_ns and rtt_ns")

        pair = message.get("pair")
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, int) for each in pair):
            stream.clock_shift_ns = offset + pair[0] - pair[1]

        run.store.update_stream(
            stream.id, clock_offset_ns=offset, clock_rtt_ns=rtt, clock_shift_ns=stream.clock_shift_ns
        )


def _call(listener: Callable[[Path], object], path: Path) -> None:
    with fail_open(_log, "aggregator", f"no report for {path}", level=logging.ERROR):
        listener(path)


def _failures_of(bye: dict[str, Any]) -> dict[str, int]:
    """Return the handled failures that a rank reports with its bye, by package."""
    counts = bye.get("failures")
    if not isinstance(counts, dict):
        return {}

    return {str(package)[:50]: count for package, count in list(counts.items())[:50] if type(count) is int}


def _elsewhere(hello: Hello, runs_dir: Path) -> str:
    return (
        f"it serves the runs folder {runs_dir}, and this job's is {hello.runs_dir}. Start `traceml serve` for that one "
        "(with --port 0 next to this one) or let the job do it with traceml.init(local=True); "
        f"or set TRACEML_RUNS_DIR={shlex.quote(str(runs_dir))}, or the address (TRACEML_PORT), to store the run there"
    )


def _is_left(run: ActiveRun) -> bool:
    """Whether all ranks have left a run: none is connected, and none lives on this host."""
    return not run.is_connected and all(stream.ended or not stream.seen_here for stream in run.streams)
