"""Tables, connection and thread of a recorder that has been started."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.clock import monotonic_ns
from traceml.clock import own_time as time
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import default_folder, disk_folders
from traceml.database.flight.flight_header import FlightState
from traceml.database.flight.flight_owner import remove_stale
from traceml.database.info_kinds import InfoKind
from traceml.database.schema import Phase, Slot
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError
from traceml.gc_pause import gc_pause
from traceml.inspection.crash_stacks import disable_crash_stacks
from traceml.recorder.end_warnings import lost_text, waiting_text
from traceml.recorder.exits import address_limit_bytes, cause_of, describe
from traceml.recorder.hang_commands import abort_process, print_stuck
from traceml.recorder.identity import Identity, export_to_children, identify, stop_export
from traceml.recorder.rank_tracing import RankTracing
from traceml.recorder.recorder_facts import RecorderStatistics, capacities, child_capacities, process_facts
from traceml.recorder.recorder_thread import DIALING_S, RecorderThread
from traceml.recorder.sending.dialing import dial, stored_elsewhere
from traceml.recorder.sending.row_sender import RowSender
from traceml.recorder.sending.uploads import FileUploader
from traceml.transport.client import START_S, Connection

if TYPE_CHECKING:
    from traceml.settings import Config

__all__ = ["Recording"]

_log = logging.getLogger("traceml")

_PROVISIONAL_S = 10.0
_FILES_STUCK_S = 10.0


class Recording:
    """Tables, connection and thread of a recorder that has been started.

    Args:
        is_child: whether it only logs, for the run of its parent process.
        statistics: answers the aggregator's command of that name.
        defer_connect: connect only when this process trains or logs; see `release`.
        on_stored: called with the run's folder when an aggregator has named it.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        *,
        is_child: bool,
        statistics: Callable[[], RecorderStatistics],
        defer_connect: bool = False,
        on_stored: Callable[[Path], None] = lambda _run_dir: None,
    ) -> None:
        self.identity = identity
        self.exit_noted = False
        self.is_stored_late = False
        """Whether it has ended before a slow aggregator had stored everything."""
        self.stream: int | None = None
        """Number of this recorder's rows in the run's store; None before a connection."""
        self.address = ""
        """Address of the aggregator that answered last, as host:port."""
        self._config, self._is_child = config, is_child
        self._on_stored = on_stored
        self._ending, self._is_deferred = False, defer_connect
        self._hold_until_ns = monotonic_ns() + int(_PROVISIONAL_S * 1e9) if identity.provisional else 0
        self.flight = FlightFile.create(
            None,
            identity.facts(config),
            capacities=child_capacities(config) if is_child else capacities(config),
            runs_dir=config.runs_dir,
        )
        append_logged = partial(self.flight.log("logged").append, urgent=True)
        self.files = FileUploader(
            self.flight.journal_stems, append_logged, self._wake, self.flight.claim, self.flight.staging_folder
        )
        self.tracing = RankTracing(config, self.flight, rank=self._rank, note=self.note, on_group=self._on_group)
        self.sender = RowSender(
            self.flight,
            self._dial,
            flush_interval_s=config.flush_interval,
            commands={
                "snapshot": self.tracing.snapshot,
                "statistics": lambda _args: asdict(statistics()),
                "profile": self.tracing.profile,
                "abort": lambda _args: abort_process(self.thread.call_later),
                "notice": lambda args: {} if config.quiet else print_stuck(args, self.tracing.leave_out_output),
            },
            files=self.files,
            on_welcome=self._welcomed,
            is_deferred=lambda: self._is_held or self.check_deferred(),
            is_ending=lambda: self._ending,
        )
        self.thread = RecorderThread(
            self.flight, self.sender, self.tracing.scheduler(()), self.tracing.hook_ns, files=self.files
        )
        self.thread.detect_stops(self.note)

    def connect(self) -> None:
        """Connect to the aggregator now.

        Raises:
            AggregatorUnavailableError: none answered in time, and `on_missing` is `raise`.
            AggregatorRefusedError: one answered and refused, and `on_missing` is `raise`.
        """
        try:
            connection = self._reach()
        except (AggregatorUnavailableError, AggregatorRefusedError) as error:
            if self._config.on_missing == "raise":
                raise

            _log.warning("%s. Training continues; the connection is retried in the background.", str(error).rstrip("."))
            self.sender.note_warned(error)
            return

        if connection is not None:
            self.sender.attach(connection)

    def start(self, *, tracing: bool) -> None:
        """Install the hooks, if tracing, and start the thread."""
        if tracing:
            with gc_pause:  # it imports what the hooks need
                self.tracing.begin(self.thread, lambda action: action())

        if not self._is_child:
            self.note(InfoKind.PROCESS, tracing=tracing, **process_facts(self.identity, self._config))

        self.flight.open_slots[Slot.STATE] = FlightState.RUNNING
        self.thread.start()
        self.thread.call(self._remove_stale_flights)

    def trace(self) -> None:
        """Add tracing to a recording that has only logged so far."""
        self.tracing.begin(self.thread, self.thread.call)
        self.note(InfoKind.TRACING)

    def finish(self, reason: str, timeout_s: float) -> bool:
        """Remove the hooks, send the remaining rows, say bye; return whether everything is stored.

        Args:
            reason: the bye's reason: `finished` or `failed`.
        """
        self._ending = True
        self.tracing.end()
        self.flight.open_slots[Slot.STATE] = FlightState.FAILED if reason == "failed" else FlightState.FINISHED
        self._hold_until_ns = 0
        self.tracing.close_profiles()
        stop_export()
        has_launcher, local = self._config.supervised, self._config.local
        keep_trying = not self.check_deferred() and (has_launcher or local)
        stored = self.thread.finish(reason, timeout_s=timeout_s, keep_trying=keep_trying) and not self.files.left
        # Without any aggregator so far, only a launcher would look for the file.
        is_useless = self.sender.connections == 0 and not has_launcher and not self.flight.holds_user_rows
        if (lost := lost_text(self.flight, self.sender)) is not None:
            _log.warning("%s", lost)
        if not stored:
            waiting = waiting_text(self.flight, self.sender, supervised=has_launcher, local=local)
            self.is_stored_late = waiting is None
            if waiting is not None:
                _log.warning("%s", waiting)

        _log.debug("the recorder ends as %s; all rows stored: %s", reason, stored)
        self.flight.close(unlink=stored or is_useless)
        disable_crash_stacks()
        self.files.close(unlink=stored or is_useless)
        return stored

    def abandon(self) -> None:
        """Undo a start that failed."""
        self._ending = True
        self.sender.detach()
        self.flight.close(unlink=True)
        disable_crash_stacks()
        self.tracing.end()

    def forget(self) -> None:
        """Become a no-op in a forked child: the tables, the thread and the connection are the parent's."""
        self._ending = True
        disable_crash_stacks()
        self.tracing.forget()
        self.sender.abandon()

    def export_to_children(self, experiment: int = 0) -> None:
        """Let children that are spawned from now on log for this run and the numbered experiment."""
        export_to_children(self.identity, self._config, experiment)

    def note(self, kind: InfoKind, /, *, urgent: bool = False, **facts: Any) -> None:
        """Append a row to `info`, which holds what diagnosis cannot know from other rows."""
        self.flight.log("info").append({"kind": kind, "t_ns": monotonic_ns(), **facts}, urgent=urgent)

    def note_return(self, *, is_script: bool) -> None:
        """Record that the launched function or script is over; the process ends when those of all ranks are."""
        step = self.flight.open_slots[Slot.STEP]
        last_step = step - 1 + self.tracing.has_stepped if step >= 0 else -1
        self.note(InfoKind.RETURNED, urgent=True, last_step=last_step, script=is_script)
        if self.tracing.trains_in_thread:
            self.thread.wake()
        else:
            self.thread.stop_lines()  # its last step may be open still: waiting for the other ranks is no part of it

    def note_launch(self) -> None:
        """Record that the process runs functions by `traceml.launch` without tracing them."""
        self.note(InfoKind.LAUNCHES)

    def note_exit(self, error: BaseException | None, status: int) -> None:
        """Record how the process ends; only the first call counts, or an interrupt of an end without error."""
        if self.exit_noted and (self.failed or not isinstance(error, KeyboardInterrupt)):
            return

        self.exit_noted = True
        slots = self.flight.open_slots
        slots[Slot.EXIT_START] = monotonic_ns()
        reported = {**self.tracing.phase_left(cause_of(error)), **describe(error)}
        facts: dict[str, Any] = {"code": status, "last_step": self.flight.ring("steps").appended - 1}
        if slots[Slot.STEP] >= 0:
            is_done = self._is_between_phases(reported) and self.tracing.step_is_done
            closes = is_done if status else self.tracing.has_stepped  # the end of training closes the open step
            facts["last_step"] = slots[Slot.STEP] - 1 + closes  # a resumed training does not count from 0
            if is_done or self._is_in_step(status, reported):  # the same as the last one where that ends only now
                facts["step"] = slots[Slot.STEP]

            if began_ns := slots[Slot.STEP_START]:
                facts["open_s"] = (slots[Slot.EXIT_START] - began_ns) / 1e9

        # After an evaluation it saves, or the script ends.
        if status and self.tracing.is_evaluating and reported.get("open_phase") != Phase.CHECKPOINT.label:
            reported["open_phase"] = "evaluation"

        if slots[Slot.SAVED_IN]:
            facts |= {"saved_steps": slots[Slot.SAVED], "saved_in": slots[Slot.SAVED_IN]}

        if status and (limit_bytes := address_limit_bytes()) is not None:
            facts["address_limit_bytes"] = limit_bytes

        if status and (samples := self.tracing.samples()):
            facts["samples"] = samples

        if (data := self.tracing.data()) is not None:
            facts |= {"batches": data.batches, "epoch": data.epoch, "data_ended": data.is_over}

        facts["at_s"] = time.time() + (self.sender.clock.shift_ns / 1e9 if self.sender.clock else 0.0)
        self.note(InfoKind.EXIT, urgent=True, **{**reported, **facts})
        if status:
            slots[Slot.STATE] = FlightState.FAILED

        self.thread.wake()

    def note_os_exit(self, error: BaseException | None, status: int) -> None:
        """Record that the process ends at once by `os._exit`, in what it does: no exit handlers follow."""
        if not status:  # a good end, where it is in no loop
            self.tracing.note_left_loop()
            return

        self.note_exit(error, status)
        self.tracing.close_done_step()
        self.flight.open_slots[Slot.EXIT_START] = 0

    def note_idle(self, *, idle: bool) -> None:
        """Record that this process waits for another task, or has one: one that waits may be ended by a signal.

        An aggregator reads the steps of a process that has ended only if the process has connected to it before.
        """
        if self.exit_noted:
            return

        is_over = idle and not self.tracing.trains_in_thread
        self.flight.open_slots[Slot.STATE] = FlightState.FINISHED if is_over else FlightState.RUNNING
        deadline = time.monotonic() + DIALING_S
        while is_over and self.sender.is_unknown and time.monotonic() < deadline:
            self.thread.wake()
            time.sleep(0.02)

    def _is_in_step(self, status: int, reported: Mapping[str, Any]) -> bool:
        """Whether the end comes in the middle of a step: after the last one another is open, with nothing done."""
        if self._is_between_phases(reported) and self.tracing.loop_has_ended:
            return False

        return bool(status) or self.tracing.has_stepped

    def _is_between_phases(self, reported: Mapping[str, Any]) -> bool:
        """Whether no phase that belongs to a step is open: a script also saves after its last one."""
        return reported.get("open_phase") in (None, Phase.CHECKPOINT.label)

    def check_deferred(self) -> bool:
        """Return whether no aggregator is asked for, as this process has neither trained nor logged yet."""
        if self._is_deferred and (self.flight.ring("steps").appended or self.flight.holds_user_rows):
            self._is_deferred = False

        return self._is_deferred

    def release(self) -> None:
        """Connect to an aggregator, as this process trains."""
        if self._is_deferred:
            self._is_deferred = False
            self.thread.wake()

    @property
    def failed(self) -> bool:
        """Whether an exit with an exception or a status other than 0 was recorded."""
        return self.flight.open_slots[Slot.STATE] == FlightState.FAILED

    def note_exec(self, *, failed: bool) -> None:
        """Record that the process becomes another program, whose end its launcher reports.

        The rows stay in the flight file. Before the first step it has only prepared the training.

        Args:
            failed: whether it did not become one, and this program continues.
        """
        slots = self.flight.open_slots
        if failed:
            self.exit_noted = False
            slots[Slot.EXIT_START], slots[Slot.STATE] = 0, FlightState.RUNNING
        elif self.flight.ring("steps").appended or self.tracing.has_stepped:
            self.note_exit(None, 0)
            self.tracing.close_open_step()
            slots[Slot.STATE] = FlightState.FINISHED

    def wait_for_files(self, timeout_s: float) -> bool:
        """Wait until the files being copied have arrived, while they make progress; return whether they have."""
        files = self.files

        def advance() -> bool:
            self.thread.wake()
            return bool(files.copying) or not self.sender.trouble  # else there is no aggregator to take them

        return files.wait(advance, timeout_s=timeout_s, stuck_s=_FILES_STUCK_S) == "done"

    def wait_until_stored(self, timeout_s: float) -> bool:
        """Wait until the rows appended before this call are stored; return whether they are."""
        self._hold_until_ns = 0  # who waits for it does not wait for the rank to be certain
        appended, deadline = self.sender.rows_appended, time.monotonic() + timeout_s
        while (is_missing := self.sender.rows_acked < appended) and time.monotonic() < deadline:
            self.thread.wake()
            time.sleep(0.02)

        return not is_missing

    def statistics(self, state: str, address: str) -> RecorderStatistics:
        """Return counts and costs so far."""
        sender, thread, own = self.sender, self.thread, self.identity.rank_identity
        return RecorderStatistics(
            state=state,
            rank=own.rank,
            world_size=own.world_size,
            address=address,
            connected=sender.connected,
            rows_appended=sender.rows_appended,
            rows_acked=sender.rows_acked,
            rows_lost=sender.rows_lost,
            bytes_sent=sender.bytes_sent,
            reconnects=max(sender.connections - 1, 0),
            cpu_ns=thread.cpu_ns,
            hook_ns_per_step=self.tracing.hook_ns(),
            errors=thread.errors,
            samplers=thread.scheduler.statistics(),
            clock_offset_ns=sender.clock.offset_ns if sender.clock else None,
            clock_rtt_ns=sender.clock.rtt_ns if sender.clock else None,
        )

    def _rank(self) -> tuple[int, int]:
        own = self.identity.rank_identity
        return own.rank, own.local_rank

    def _wake(self) -> None:
        self.thread.wake()

    @property
    def _is_held(self) -> bool:
        """Whether it does not connect yet, because its rank may still change."""
        return self._hold_until_ns > monotonic_ns() and not self.flight.ring("steps").appended

    def _remove_stale_flights(self) -> None:
        runs_dir = self._config.runs_dir
        remove_stale(default_folder(), *disk_folders(runs_dir), runs_dir=runs_dir)

    def _reach(self) -> Connection | None:
        """Return a connection; None if only the aggregator's presence was checked."""
        config, identity = self._config, self.identity
        hello = identity.probe(config) if identity.provisional else identity.hello(config, self.flight.path)
        start_s = START_S if config.on_missing == "raise" else 0.0  # else it is connected to in the background
        connection = dial(config, hello, timeout_s=config.connect_timeout, start_s=start_s)
        self.address = connection.address
        if not identity.provisional:
            return connection

        connection.close("only asking")
        return None

    def _dial(self, timeout_s: float) -> Connection:
        """Connect by one try, on the recorder's thread."""
        config = self._config
        hello = self.identity.hello(config, self.flight.path)
        connection = dial(config, hello, timeout_s=timeout_s, tries=1, is_ending=lambda: self._ending)
        self.address = connection.address
        return connection

    def _welcomed(self, welcome: Mapping[str, Any]) -> None:
        """Note the run's folder in the flight file: after a crash it says where the rows belong."""
        self.stream = int(welcome.get("stream") or 0)
        if welcome.get("run_dir") and welcome["run_dir"] != self.flight.identity.get("run_dir"):
            self.flight.update_identity(run_dir=welcome["run_dir"])
            self._on_stored(Path(welcome["run_dir"]))
            place = stored_elsewhere(self._config, welcome)
            if place and not self._is_child and self.identity.rank_identity.rank == 0:
                _log.warning(
                    "this run is stored in %s, by the aggregator at %s that the settings name, not in the runs_dir %s",
                    place, self.address, self._config.runs_dir,
                )  # fmt: skip

    def _on_group(self, joining: tuple[int, int] | None) -> None:
        if not self._ending:
            self.thread.call(partial(self._identify_again, joining))

    def _identify_again(self, joining: tuple[int, int] | None) -> None:
        """Take over rank and job from the process group; on the recorder's thread."""
        self.release()
        before, now = self.identity, identify(self._config, self.identity, joining)
        self._hold_until_ns = 0
        old, new = before.rank_identity, now.rank_identity
        if (old.rank, old.world_size, before.job) == (new.rank, new.world_size, now.job):
            return

        if self.flight.ring("steps").acked or self.sender.steps_sent:
            # Steps under the old rank are stored already: the rows continue there, with a note of the new one.
            self.note(InfoKind.IDENTITY, rank=new.rank, world_size=new.world_size, job=now.job)
            return

        _log.debug("the process group makes this rank %d of %d of job %s", new.rank, new.world_size, now.job)
        self.identity = now
        self.export_to_children()
        self.flight.update_identity(**now.facts(self._config))
        self.sender.detach("another rank")
