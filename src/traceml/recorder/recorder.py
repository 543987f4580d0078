"""The recorder: everything of traceml that lives in a training process, from start to stop."""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml import settings
from traceml.clock import monotonic_ns
from traceml.database.flight import FALLBACK_FOLDER, FlightFile
from traceml.database.postmortem import FlightState, remove_stale
from traceml.database.schema import PACKED, Slot
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError, RunNotFoundError
from traceml.ids import RankIdentity
from traceml.privacy import secrets_only
from traceml.recorder.exits import describe
from traceml.recorder.identity import Identity, Spawned, forget_children, identify, tell_children
from traceml.recorder.recorder_thread import RecorderThread
from traceml.recorder.row_sender import RowSender
from traceml.recorder.uploads import FileUploader
from traceml.samplers.base import Sampler, SamplerScheduler, SamplerStatistics
from traceml.transport.client import Connection, connect

if TYPE_CHECKING:
    from traceml.instrument import Instrumentation

__all__ = ["Recorder", "RecorderStatistics"]

_log = logging.getLogger("traceml")

STOP_TIMEOUT_S = 5.0
_PROVISIONAL_S = 10.0
_FILES_STUCK_S = 10.0
_SHOW_S = 3.0


@dataclass(frozen=True, slots=True)
class RecorderStatistics:
    """What a recorder did so far.

    Attributes:
        state: `disabled`, `running` or `stopped`.
        rank, world_size: who it is.
        address: the aggregator's, as host:port.
        connected: whether there is a connection now.
        rows_appended, rows_acked, rows_lost: rows of all tables; appended = acked + lost + still here.
        bytes_sent: bytes put on the wire.
        reconnects: connections after the first.
        cpu_ns: CPU time of its thread, as of its last telemetry row.
        hook_ns_per_step: what the hooks cost per step.
        errors: turns of its thread that failed.
        samplers: what each sampler did and cost.
        clock_offset_ns, clock_rtt_ns: the aggregator's wall clock minus this monotonic clock, and how exact that is.
    """

    state: str
    rank: int = 0
    world_size: int = 1
    address: str = ""
    connected: bool = False
    rows_appended: int = 0
    rows_acked: int = 0
    rows_lost: int = 0
    bytes_sent: int = 0
    reconnects: int = 0
    cpu_ns: int = 0
    hook_ns_per_step: int = 0
    errors: int = 0
    samplers: tuple[SamplerStatistics, ...] = ()
    clock_offset_ns: int | None = None
    clock_rtt_ns: int | None = None


class Recorder:
    """One rank's recorder. `traceml.init` makes it; a disabled one does nothing.

    Args:
        config: the settings in force.
        parent: the recorder of the process that this one was forked from, when it logs for that one's run.
        spawned: what is known of a process that `multiprocessing` has spawned this one from, for the same reason.
    """

    def __init__(
        self, config: settings.Config, *, parent: Recorder | None = None, spawned: Spawned | None = None
    ) -> None:
        self.config = config
        self.tracing = False
        """Whether the hooks are in place; else only what the user logs is recorded."""
        self._parent = parent._identity if parent is not None else spawned.identity if spawned is not None else None
        self.spawned = spawned
        self.pid = os.getpid()
        self.instrumentation: Instrumentation | None = None
        self._state = "disabled"
        self._identity: Identity | None = None
        self._flight: FlightFile | None = None
        self._sender: RowSender | None = None
        self._scheduler: SamplerScheduler | None = None
        self._worker: RecorderThread | None = None
        self._exit_told = False
        self._hold_until_ns = 0
        self._stopping = threading.Lock()
        self._before_stop: list[Callable[[], None]] = []
        self.files: FileUploader | None = None
        """Takes files for the run's folder."""

    def __repr__(self) -> str:
        if self._identity is None:
            return "<traceml recorder, disabled>"

        who = self._identity.who
        return f"<traceml recorder of rank {who.rank} of {who.world_size}, {self._state}, {self.address}>"

    @property
    def enabled(self) -> bool:
        """Whether it records."""
        return self._state == "running"

    @property
    def is_over(self) -> bool:
        """Whether it has recorded and was stopped."""
        return self._state == "stopped"

    @property
    def who(self) -> RankIdentity:
        """Rank, world size and local rank, as far as they are known."""
        return self._identity.who if self._identity is not None else RankIdentity()

    @property
    def job(self) -> str:
        """What the ranks of this job find each other's run by."""
        return self._identity.job if self._identity is not None else ""

    @property
    def is_child(self) -> bool:
        """Whether it logs in a child, for the run of the process that this one was forked or spawned from."""
        return self._parent is not None

    @property
    def flight(self) -> FlightFile | None:
        """Where rows go; None before the start."""
        return self._flight

    @property
    def address(self) -> str:
        """The aggregator's address."""
        return f"{self.config.host}:{self.config.port}"

    @property
    def run_dir(self) -> Path | None:
        """The run's folder, as the aggregator told; None before it was met, and where nothing is recorded."""
        told = self._flight.identity.get("run_dir") if self._flight is not None else None
        return Path(told) if told else None

    def show(self) -> None:
        """Show the run so far: drawn in a notebook, as text elsewhere. What was appended up to now is waited for.

        Raises:
            RunNotFoundError: nothing is recorded, or the run's folder is on another host.
        """
        import traceml  # what reads runs stands far above this room, and is loaded only when it is asked for

        if self.run_dir is None:
            raise RunNotFoundError("there is no run to show: traceml is disabled, or no aggregator has answered yet.")

        self._wait_until_stored()
        traceml.load_run(self.run_dir).show()

    def start(self, *, wait: bool = True, tracing: bool = True) -> None:
        """Reserve the tables, connect, put the hooks in place, start the thread.

        Args:
            wait: connect now, and raise if that fails; else the thread does it when it can.
            tracing: put the hooks in place.

        Raises:
            AggregatorUnavailableError: none answered in time, and `on_missing` is `raise`.
            AggregatorRefusedError: one answered and refused, and `on_missing` is `raise`.
        """
        config = self.config
        self._identity = (
            identify(config) if self._parent is None else self._parent.of_child(provisional=self.spawned is not None)
        )
        self._flight = FlightFile.create(
            None,
            self._identity.facts(config),
            capacities=_capacities(config)
            if self._parent is None
            else _CHILD_CAPACITIES | _capacity_of_metrics(config),
            fallback=config.runs_dir / FALLBACK_FOLDER,
        )
        try:
            self.files = FileUploader(self._flight.stems, self._append_logged, self._wake)
            self._sender = RowSender(
                self._flight,
                self._dial,
                flush_interval_s=config.flush_interval,
                commands=self._commands(),
                files=self.files,
                on_welcome=self._welcomed,
            )
            if self._identity.provisional:
                self._hold_until_ns = monotonic_ns() + int(_PROVISIONAL_S * 1e9)
            if wait:
                self._connect_first()

            self._start_threads(tracing=tracing)
            self.tell_children(self.spawned.experiment if self.spawned is not None else 0)
        except BaseException:
            self._abandon()
            raise

    def stop(self, reason: str = "finished", *, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Take the hooks out, send what is left, say bye; return whether everything is stored. Later calls do nothing.

        Args:
            reason: what the bye says: `finished` or `failed`.
            timeout_s: time for all of it.
        """
        if self._state != "running" or self.pid != os.getpid() or not self._stopping.acquire(blocking=False):
            return True

        self._state = "stopped"
        assert self._flight is not None
        assert self._worker is not None
        assert self._sender is not None
        self._uninstrument()
        ended = FlightState.FAILED if reason == "failed" else FlightState.FINISHED
        self._flight.open_slots[Slot.STATE] = ended
        self._hold_until_ns = 0
        forget_children()
        stored = self._worker.finish(reason, timeout_s=timeout_s, hope=self.config.supervised or self.config.local)
        # Where no aggregator was ever met, nobody will look for the file, unless a launcher sees to that.
        forlorn = self._sender.connections == 0 and not self.config.supervised and not self._flight.holds_user_rows
        if not stored and self._flight.holds_user_rows:
            _log.warning(
                "what was logged has not all been stored%s. It is kept in %s: the next script here, or `traceml sync`, "
                "takes it in.", f" ({self._sender.trouble})" if self._sender.trouble else "", self._flight.path,
            )  # fmt: skip

        self._flight.close(unlink=stored or forlorn)
        if self.files is not None:
            self.files.close(unlink=stored or forlorn)

        return stored

    def tell_children(self, experiment: int = 0) -> None:
        """Have children that are spawned from now on log for this run.

        Args:
            experiment: number of the experiment that is active.
        """
        if self._identity is not None:
            tell_children(self._identity, self.config, experiment)

    def before_stop(self, function: Callable[[], None]) -> None:
        """Have `function` called when the recorder is about to stop, while rows can still be appended."""
        self._before_stop.append(function)

    def after(self, delay_s: float, function: Callable[[], None]) -> None:
        """Have `function` called on the recorder's thread when so many seconds have passed."""
        if self._worker is not None:
            self._worker.call_later(delay_s, function)

    def prepare_stop(self) -> None:
        """Call what wants to be called before the stop, the last first."""
        while self._before_stop and self.pid == os.getpid():
            function = self._before_stop.pop()
            try:
                function()
            except Exception as error:  # noqa: BLE001 - fail open: the rows are sent all the same
                _log.warning("something did not end well: %r", error, exc_info=error)

    def files_done(self, timeout_s: float) -> bool:
        """Wait until the files that are being copied have arrived, as long as they get on; return whether they have.

        Args:
            timeout_s: at most so long.
        """
        files = self.files
        if files is None or self._worker is None:
            return True

        deadline = last = time.monotonic()
        deadline += timeout_s
        seen = files.progress
        while files.pending and time.monotonic() < deadline:
            if not files.copying and self._sender is not None and self._sender.trouble:
                break  # who would take them is not there

            self._worker.wake()
            time.sleep(0.01)
            if files.progress != seen:
                seen, last = files.progress, time.monotonic()
            elif time.monotonic() - last > _FILES_STUCK_S:
                break

        return not files.pending

    def note(self, kind: str, *, urgent: bool = False, **facts: Any) -> None:
        """Append a row of information.

        Args:
            kind: what it is about; see `database.schema.INFO`.
            urgent: may use the space that is kept for the end.
            facts: what it says.
        """
        if self._flight is not None and self.pid == os.getpid():
            self._flight.log("info").append({"kind": kind, "t_ns": monotonic_ns(), **facts}, urgent=urgent)

    def note_exit(self, error: BaseException | None, status: int) -> None:
        """Record how the process ends; the first word counts."""
        if self._exit_told or not self.enabled or self.pid != os.getpid():
            return

        assert self._flight is not None
        assert self._worker is not None
        self._exit_told = True
        slots = self._flight.open_slots
        slots[Slot.EXIT_START] = monotonic_ns()
        facts = {"code": status, "last_step": self._flight.ring("steps").appended - 1}
        if slots[Slot.STEP] >= 0:
            facts["step"] = slots[Slot.STEP]

        self.note("exit", urgent=True, **facts, **describe(error))
        if status:
            slots[Slot.STATE] = FlightState.FAILED

        self._worker.wake()

    @property
    def failed(self) -> bool:
        """Whether an exit with an exception or a status other than 0 was recorded."""
        return self._flight is not None and self._flight.open_slots[Slot.STATE] == FlightState.FAILED

    @property
    def exit_told(self) -> bool:
        """Whether it is recorded how the process ends."""
        return self._exit_told

    def forget(self) -> None:
        """Become a no-op in a forked child: the tables, the thread and the connection are the parent's."""
        self._state = "stopped"
        if self.instrumentation is not None:
            self.instrumentation.disable_in_child()

        if self._sender is not None:
            self._sender.abandon()

    def statistics(self) -> RecorderStatistics:
        """Return what it did so far."""
        if self._identity is None or self._sender is None or self._worker is None or self._scheduler is None:
            return RecorderStatistics(self._state)

        sender, worker, who = self._sender, self._worker, self._identity.who
        return RecorderStatistics(
            state=self._state,
            rank=who.rank,
            world_size=who.world_size,
            address=self.address,
            connected=sender.connected,
            rows_appended=sender.rows_appended,
            rows_acked=sender.rows_acked,
            rows_lost=sender.rows_lost,
            bytes_sent=sender.bytes_sent,
            reconnects=max(sender.connections - 1, 0),
            cpu_ns=worker.cpu_ns,
            hook_ns_per_step=self._hook_ns(),
            errors=worker.errors,
            samplers=self._scheduler.statistics(),
            clock_offset_ns=sender.clock.offset_ns if sender.clock else None,
            clock_rtt_ns=sender.clock.rtt_ns if sender.clock else None,
        )

    def _wait_until_stored(self) -> None:
        """Wait until what was appended before this call is stored, for a few seconds at most."""
        if self._sender is None or self._worker is None or self._state != "running":
            return

        appended, deadline = self._sender.rows_appended, time.monotonic() + _SHOW_S
        while self._sender.rows_acked < appended and time.monotonic() < deadline:
            self._worker.wake()
            time.sleep(0.02)

    # --- starting ----------------------------------------------------------------------------------------------------

    def _connect_first(self) -> None:
        assert self._sender is not None
        try:
            connection = self._reach()
        except (AggregatorUnavailableError, AggregatorRefusedError) as error:
            if self.config.on_missing == "raise":
                raise

            _log.warning("%s. Training goes on; it is tried again in the background.", str(error).rstrip("."))
            self._sender.said_missing()
            return

        if connection is not None:
            self._sender.attach(connection)

    def _reach(self) -> Connection | None:
        """Return a connection; None where only somebody's presence was checked."""
        config, identity = self.config, self._identity
        assert identity is not None
        hello = identity.probe() if identity.provisional else self._hello()
        if config.local and not config.supervised:
            from traceml.recorder.local_aggregator import connect_or_start

            connection = connect_or_start(config, hello)
        else:
            connection = connect(config.host, config.port, hello, config.token, timeout_s=config.connect_timeout)

        if not identity.provisional:
            return connection

        connection.close("only asking")
        return None

    def trace(self) -> None:
        """Add tracing to a recorder that has only logged so far."""
        assert self._worker is not None
        self._scheduler = scheduler = self._sampling(tracing=True)
        self._worker.call(lambda: self._worker.use(scheduler))  # type: ignore[union-attr]
        self._instrument()

    def _sampling(self, *, tracing: bool) -> SamplerScheduler:
        assert self._flight is not None
        assert self._identity is not None
        flight = self._flight
        samplers: Sequence[Sampler] = ()
        if tracing:
            from traceml.samplers.available import open_samplers  # 5 ms, for nothing where only logging is wanted

            samplers = open_samplers(local_rank=self._identity.who.local_rank)

        return SamplerScheduler(
            samplers,
            lambda table, row: flight.ring(table).append(*row),
            interval_s=self.config.sample_interval,
            intervals_s=self.config.sampler_intervals,
            on_error=lambda name, error: self.note("sampler", name=name, error=f"{type(error).__name__}: {error}"),
        )

    def _start_threads(self, *, tracing: bool) -> None:
        assert self._flight is not None
        assert self._sender is not None
        assert self._identity is not None
        flight = self._flight
        self._scheduler = self._sampling(tracing=tracing)
        self._worker = RecorderThread(flight, self._sender, self._scheduler, self._hook_ns, files=self.files)
        if tracing:
            self._instrument()
        if self._parent is None:
            self.note("process", **_process_facts(self._identity))

        flight.open_slots[Slot.STATE] = FlightState.RUNNING
        self._state = "running"
        self._worker.start()
        self._worker.call(lambda: self._sweep(flight))

    def _instrument(self) -> None:
        from traceml.instrument import install

        assert self._flight is not None
        self.tracing = True
        try:
            self.instrumentation = install(self._flight, on_info=self._take_info, on_group=self._group_initialised)
        except Exception as error:  # noqa: BLE001 - fail open: without hooks there are still samples and trace_step
            _log.warning("steps cannot be traced: %r", error, exc_info=error)

    def _welcomed(self, welcome: Mapping[str, Any]) -> None:
        """Note in the flight file where the run is: who finds it there later knows where its rows belong."""
        assert self._flight is not None
        if welcome.get("run_dir") and welcome["run_dir"] != self._flight.identity.get("run_dir"):
            self._flight.update_identity(run_dir=welcome["run_dir"])

    def _append_logged(self, row: dict[str, Any]) -> None:
        if self._flight is not None:
            self._flight.log("logged").append(row, urgent=True)

    def _wake(self) -> None:
        if self._worker is not None:
            self._worker.wake()

    def _take_info(self, facts: dict[str, Any]) -> None:
        if self._flight is not None:
            self._flight.log("info").append(facts)

    def _sweep(self, flight: FlightFile) -> None:
        """Remove what ranks of long ago left where ours is."""
        if flight.path is not None:
            remove_stale(flight.path.parent)

    def _commands(self) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        return {"statistics": lambda _args: asdict(self.statistics())}

    def _hello(self) -> Any:
        assert self._identity is not None
        return self._identity.hello(self.config, self._flight.path if self._flight else None)

    def _dial(self, timeout_s: float) -> Connection:
        """Connect by one try, on the recorder's thread."""
        config = self.config
        assert self._flight is not None
        if self._hold_until_ns > monotonic_ns() and not self._flight.ring("steps").appended:
            raise AggregatorUnavailableError(config.host, config.port, 0.0, "the rank is not known yet")

        if config.local and not config.supervised:
            from traceml.recorder.local_aggregator import connect_or_start

            return connect_or_start(config, self._hello(), lambda: self.is_over)

        return Connection.connect(config.host, config.port, self._hello(), config.token, timeout_s=timeout_s)

    # --- the process group -------------------------------------------------------------------------------------------

    def _group_initialised(self) -> None:
        if self._worker is not None and self.enabled:
            self._worker.call(self._identify_again)

    def _identify_again(self) -> None:
        """Take over what the process group tells; on the recorder's thread."""
        assert self._identity is not None
        assert self._flight is not None
        assert self._sender is not None
        before, now = self._identity, identify(self.config, self._identity)
        self._hold_until_ns = 0
        same = (before.who.rank, before.who.world_size, before.job) == (now.who.rank, now.who.world_size, now.job)
        if same:
            return

        if self._flight.ring("steps").acked or self._sender.steps_sent:
            # Steps under the old name are stored already: the rows go on there, with a word on who it is now.
            self.note("identity", rank=now.who.rank, world_size=now.who.world_size, job=now.job)
            return

        self._identity = now
        self.tell_children()
        self._flight.update_identity(**now.facts(self.config))
        self._sender.detach("another rank")

    # --- ending ------------------------------------------------------------------------------------------------------

    def _uninstrument(self) -> None:
        if self.instrumentation is None:
            return

        try:
            self.instrumentation.close_open_step()
            self.instrumentation.uninstall()
        except Exception as error:  # noqa: BLE001 - fail open: what stays in place only passes on
            _log.warning("some hooks could not be taken out: %r", error, exc_info=error)

    def _abandon(self) -> None:
        """Undo a start that failed."""
        if self._sender is not None:
            self._sender.detach()
        if self._flight is not None:
            self._flight.close(unlink=True)

        self._uninstrument()
        self._state = "stopped"

    def _hook_ns(self) -> int:
        return self.instrumentation.hook_ns_per_step() if self.instrumentation is not None else 0


# A child that only logs has no steps nor samples.
_CHILD_CAPACITIES = {table.name: 2 for table in PACKED}


def _capacity_of_metrics(config: settings.Config) -> dict[str, int]:
    return {"metrics": max(config.max_queue_size, 64)}


def _capacities(config: settings.Config) -> dict[str, int]:
    device_rows = config.ring_rows if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() else 256
    return {"steps": config.ring_rows, "device_steps": device_rows} | _capacity_of_metrics(config)


def _process_facts(identity: Identity) -> dict[str, Any]:
    from traceml.version import __version__

    who = identity.who
    return {
        "python": platform.python_version(),
        "traceml": __version__,
        "executable": sys.executable,
        "argv": secrets_only().mask_value("argv", sys.argv[:64]),
        "folder": str(Path.cwd()),
        "rank_from": who.source,
        "cores": len(os.sched_getaffinity(0)),
    }
