"""Supervisor of one job on this host: its aggregator, processes, output, signals and end.

It passes the job's output and signals through and reports the end of processes to the aggregator. If it dies, the
kernel ends the job, and the aggregator ends with the job.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from traceml.fail_open import print_notice
from traceml.process_ends import BY_OTHERS, CRASHES, has_terminal, not_ignored, shell_status
from traceml.run_folder import OUTPUT_LOG, UNREAD_LOG
from traceml.supervise.aggregator_process import AggregatorProcess
from traceml.supervise.output import OutputCopy, PassThroughScreen, UnreadOutput
from traceml.supervise.processes import FORWARDED_SIGNALS, PseudoTerminal, ScriptPipe, SignalWitness, spawn

if TYPE_CHECKING:
    from traceml.supervise.joined_run import JoinedRun
    from traceml.supervise.node_run import NodeRunReport
    from traceml.transport.exit_report import ExitReport

__all__ = ["JobOutcome", "LocalJob", "Screen", "Supervisor"]

_TICK_S = 0.1
_LOADING_S = 1.0  # in which the script and the aggregator load most of their modules, and need the cores
_CLEAN_EXIT_S = 1.0  # if other ranks still run this long after a clean exit, the job is not ending
_STDOUT, _STDERR = 1, 2
_ENDING = {signal.SIGINT, signal.SIGTERM}
_DEATHS = {signal.SIGKILL, signal.SIGBUS, *CRASHES}  # of torchrun: its ranks end with it
_SI_KERNEL = 0x80  # siginfo's code for a signal that the terminal sent, to the whole foreground group


class LocalJob(NamedTuple):
    """A job on this host."""

    command: Sequence[str]
    uses_torchrun: bool  # whether the program is our torchrun, which reports the ends of ranks itself
    run_id: str
    runs_dir: Path
    environ: Mapping[str, str] = MappingProxyType({})  # variables for the job, added to this process's own
    has_other_nodes: bool = False  # whether torchrun may start ranks on other nodes, too
    token: str | None = None  # secret that all nodes were given, if any
    tls: bool = False  # whether the ranks of other nodes encrypt what they send

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.runs_dir / self.run_id


class JobOutcome(NamedTuple):
    """The end of a job."""

    status: int  # as in a shell
    finished: bool  # whether the run is complete on disk
    joined: bool = False  # whether it was the run of another node, and is there


class Screen(Protocol):
    """A view of a running job."""

    def tick(self) -> None:
        """Redraw if it is time."""

    def write(self, data: bytes) -> None:
        """Show output of the script."""

    def close(self) -> None:
        """Restore the terminal."""


class Supervisor:
    """Runs one job to its end. A context manager: its exit ends what is left of the job."""

    def __init__(
        self,
        job: LocalJob,
        *,
        make_screen: Callable[[], Screen] | None = None,
        on_start: Callable[[], object] | None = None,
        on_joined: Callable[[JoinedRun], object] | None = None,
        on_delivery: Callable[[], object] | None = None,
        on_tick: Callable[[], object] | None = None,
        on_completing: Callable[[], object] = lambda: None,
        quiet: bool = False,
    ) -> None:
        """Prepare a job.

        Args:
            make_screen: makes the live view once the job is started; the job's output goes through it, with a copy in
                the run's folder. None: the job writes directly to our terminal or pipe.
            on_start: called once when the aggregator runs and the job is started, whose interpreter loads meanwhile.
                With other nodes, when they have met and the run is this node's.
            on_joined: called when this node's ranks belong to the run of another one.
            on_delivery: called once if the job has ended and trackers still receive logged values.
            on_tick: called a few times a second while the job runs.
            on_completing: called when the ranks have said bye, and again when their processes have ended, before the
                run is completed.
            quiet: do not print that the job is stuck.
        """
        self._job, self._quiet = job, quiet
        self._make_screen = make_screen
        self._screen: Screen | None = None
        self._copy: OutputCopy | None = None
        self._aggregator = AggregatorProcess(
            job.run_id,
            job.runs_dir,
            on_completing=on_completing,
            on_delivery=on_delivery,
            settings=job.environ,
            token=job.token,
            is_shared=job.has_other_nodes,
            tls=job.tls,
        )
        self._joined: JoinedRun | None = None
        self._has_begun = False
        self._on_start, self._on_joined = on_start, on_joined
        self._on_tick, self._on_completing = on_tick, on_completing
        self._failures: list[ExitReport] = []
        self._reported_exits, self._all_reported_s = 0, 0.0  # exits that the aggregator knows; when it knew all
        self._next_report_s = 0.0
        self._signals: set[int] = set()
        self._not_ignored = not_ignored(FORWARDED_SIGNALS)
        self._witness = SignalWitness()
        self._had_terminal = has_terminal()
        self._ended_by: dict[str, Any] | None = None
        self._reader_left = self._have_left = False
        self._selector = selectors.DefaultSelector()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = UnreadOutput((_STDOUT, _STDERR), self._is_ending, self._keep_output)

    def __enter__(self) -> Self:
        with ExitStack() as opened:  # closed in the opposite order
            signal.pthread_sigmask(signal.SIG_BLOCK, self._not_ignored)  # the kernel drops the ignored ones
            opened.callback(signal.pthread_sigmask, signal.SIG_UNBLOCK, self._not_ignored)
            opened.callback(self._witness.close)
            opened.callback(self._selector.close)
            opened.callback(self._aggregator.close)
            opened.enter_context(self._unread)
            self._opened = opened.pop_all()

        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def run(self) -> JobOutcome:
        """Run the job; return when all its processes have ended and the run is stored."""
        self._selector.register(self._aggregator.watch_ranks(), selectors.EVENT_READ, "ranks")
        if not self._job.has_other_nodes:
            self._aggregator.start()

        process = self._run_job()
        finished = self._finish(process)
        return JobOutcome(shell_status(process.wait()), finished, joined=self._joined is not None)

    # the job

    def _run_job(self) -> subprocess.Popen[bytes]:
        terminal = _output_pipe() if self._make_screen is not None else None
        process = self._process = self._start_job(terminal)
        try:
            if not self._job.has_other_nodes:
                self._begin()
            elif self._make_screen is not None:
                self._screen = PassThroughScreen()

            self._watch_job(process, terminal)
        finally:
            if process.poll() is None:  # after an error of ours: the job does not outlive its supervisor
                process.terminate()
                process.wait()

            if self._screen is not None:
                self._screen.close()

            if self._copy is not None:
                self._copy.close()

            if terminal is not None:
                terminal.close()

        return process

    def _begin(self) -> None:
        """Show the run, whose aggregator has been started."""
        self._has_begun = True
        if self._on_start is not None:
            self._on_start()

        if self._make_screen is not None:
            self._screen = self._make_screen()
            self._copy = OutputCopy(self._job.run_dir / OUTPUT_LOG)

    def _take_node_run(self, report: NodeRunReport) -> None:
        """Report to the run that this node's ranks belong to from now on."""
        if report.location is not None:
            from traceml.supervise.joined_run import JoinedRun

            if self._joined is None or self._joined.location != report.location:
                if self._joined is not None:
                    self._joined.withdraw()

                self._joined = JoinedRun(report, self._job.runs_dir)
                if self._on_joined is not None:
                    self._on_joined(self._joined)

            return

        if self._joined is not None:  # its aggregator is gone, and knew what there was to know
            self._joined.withdraw()
            self._joined = None
            self._failures.clear()
            self._reported_exits = 0

        if not self._has_begun:
            self._aggregator.start()
            self._begin()

    def _start_job(self, terminal: ScriptPipe | None) -> subprocess.Popen[bytes]:
        failures_in, failures_out = os.pipe()
        os.set_blocking(failures_in, False)
        environ = {**os.environ, **self._job.environ, **self._aggregator.environ()}
        environ["TRACEML_FAILURES_FD"] = str(failures_out)
        if self._job.has_other_nodes:
            environ["TRACEML_NODE_RUN"] = "token" if self._job.token is None else "given"

        try:
            process = spawn(
                self._job.command,
                environ=environ,
                stdout=terminal.slave if terminal is not None else None,
                stderr=terminal.slave if isinstance(terminal, PseudoTerminal) and sys.stderr.isatty() else None,
                pass_fds=(failures_out,),
                death_signal=signal.SIGTERM,
            )
        finally:
            os.close(failures_out)
            if terminal is not None:
                terminal.close_slave()

        self._witness.start()
        self._selector.register(failures_in, selectors.EVENT_READ, "failures")
        return process

    def _watch_job(self, process: subprocess.Popen[bytes], terminal: ScriptPipe | None) -> None:
        """Pass output and signals through until the job has ended."""
        requests_from_s = time.monotonic() + _LOADING_S
        ended = os.pidfd_open(process.pid)
        self._selector.register(ended, selectors.EVENT_READ, "ended")
        if terminal is not None:
            self._selector.register(terminal.master, selectors.EVENT_READ, "output")

        try:
            while process.poll() is None:
                ready = {key.data: key for key, _ in self._selector.select(_TICK_S)}
                if "output" in ready and terminal is not None and not self._show(terminal):
                    self._selector.unregister(terminal.master)
                    if self._reader_left:
                        terminal.close()

                if "failures" in ready:
                    self._read_failures(ready["failures"].fd)

                if "ranks" in ready:
                    self._take_rank_messages()

                self._report_exits(process)
                self._pass_signals(process)
                self._aggregator.restart_if_dead()
                if time.monotonic() > requests_from_s:
                    self._aggregator.prepare_requests()

                if self._screen is not None:
                    self._screen.tick()

                if self._on_tick is not None:
                    self._on_tick()

                if terminal is not None:
                    terminal.follow_size()
        finally:
            os.close(ended)

        # the rest of the pipes, whose writers are gone
        while terminal is not None and self._show(terminal, at_end=True):
            pass

        for key in list(self._selector.get_map().values()):
            if key.data == "failures":
                self._read_failures(key.fd)

    def _take_rank_messages(self) -> None:
        for facts in self._aggregator.rank_messages():
            if facts:
                self._print_stuck(facts)
            elif not self._have_left:
                self._have_left = True
                self._aggregator.prepare_requests()
                self._on_completing()

    def _print_stuck(self, facts: dict[str, Any]) -> None:
        """Print that the job is stuck, as no rank can: C code has the GIL in each."""
        if self._quiet:
            return

        from traceml.transport.run_line import stuck_line

        line = stuck_line(facts)
        if self._screen is not None and sys.stdout.isatty() and sys.stderr.isatty():
            self._screen.write(f"{line}\r\n".encode())
        else:  # in a thread of its own: nobody may read the pipe
            Thread(target=print_notice, args=(line,), name="traceml-notice", daemon=True).start()

    def _pass_signals(self, process: subprocess.Popen[bytes]) -> None:
        """Forward signals that were sent to this process only; the job receives those of the terminal itself."""
        while (info := signal.sigtimedwait(self._not_ignored, 0)) is not None:
            if info.si_signo in _ENDING and not self._signals & _ENDING:
                (self._joined or self._aggregator).client.take_last_snapshots()

            self._signals.add(info.si_signo)
            self._note_sender(info)
            has_come = _is_for_job_too(info) or self._witness.has_received(info.si_signo)
            if not has_come and process.poll() is None:
                process.send_signal(info.si_signo)

    def _is_ending(self) -> bool:
        """Whether the job was asked to end, or its processes have ended; torchrun may be left, with its log."""
        if (self._signals | signal.sigpending()) & _ENDING:
            return True

        process = self._process
        if process is None or process.returncode is not None:
            return process is not None

        from traceml.inspection.kernel_state import children_of, is_running  # the script waits for no import of ours

        return self._job.uses_torchrun and not any(map(is_running, children_of(process.pid)))

    def _keep_output(self, data: bytes) -> None:
        """Keep output that nobody has read."""
        copy = OutputCopy(self._job.run_dir / UNREAD_LOG)
        copy.write(data)
        copy.close()

    def _note_sender(self, info: signal.struct_siginfo) -> None:
        """Remember who ended the job: the program may have ended when the job has."""
        if self._ended_by is not None or info.si_signo not in BY_OTHERS:
            return

        self._ended_by = {"signal": info.si_signo, "time": time.time()}
        if info.si_code == _SI_KERNEL or (self._had_terminal and not has_terminal()):
            self._ended_by["from_terminal"] = True
        else:
            from traceml.inspection.program_names import program_name

            self._ended_by |= {"sender": program_name(info.si_pid), "sender_pid": info.si_pid}

    def _show(self, terminal: ScriptPipe, *, at_end: bool = False) -> bool:
        """Show what the script wrote; return whether there may be more."""
        data = terminal.read()
        if data and self._screen is not None:
            try:
                self._screen.write(data)
            except OSError:  # nobody takes it: the script's next write fails, as it does without us
                self._reader_left = True
                return False

        if data and self._copy is not None:
            self._copy.write(data)

        return bool(data) if at_end else data is not None

    def _read_failures(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            lines = os.read(fd, 65536)
            if not lines:
                self._selector.unregister(fd)
                os.close(fd)

            import json

            for line in lines.splitlines():
                self._take_message(json.loads(line))

    def _take_message(self, message: dict[str, Any]) -> None:
        from traceml.transport.exit_report import ExitReport

        if "node_run" in message:
            from msgspec import convert

            from traceml.supervise.node_run import NodeRunReport

            self._take_node_run(convert(message["node_run"], NodeRunReport))
        elif (report := ExitReport.from_message(message)) is not None:
            self._failures.append(report)

    def _report_exits(self, process: subprocess.Popen[bytes]) -> None:
        """Report ranks that have ended while others run.

        This node's own aggregator sees the ends of processes itself; but after os._exit(0) a rank looks lost. That of
        another node sees none.
        """
        if self._joined is None:
            self._report_clean_exits()
            return

        from traceml.inspection.kernel_state import children_of

        self._joined.silent_workers.check(children_of(process.pid))
        new = self._failures[self._reported_exits :]
        if new and time.monotonic() >= self._next_report_s:
            if self._joined.report_ends(self._as_stopped(new)):
                self._reported_exits = len(self._failures)
            else:
                self._next_report_s = time.monotonic() + _CLEAN_EXIT_S

    def _report_clean_exits(self) -> None:
        clean = [each for each in self._failures if each.exitcode == 0]
        if len(clean) == self._reported_exits:
            self._all_reported_s = time.monotonic()
        elif time.monotonic() - self._all_reported_s >= _CLEAN_EXIT_S:
            if self._aggregator.report_ends(clean):
                self._reported_exits = len(clean)
            else:  # it is busy: ask again later, as each try keeps the job's output waiting
                self._all_reported_s = time.monotonic()

    # the end

    def _finish(self, process: subprocess.Popen[bytes]) -> bool:
        """Report the end of the processes to the aggregator; return whether the run is complete on disk."""
        from traceml.transport.exit_report import ExitReport

        failures = self._failures
        if not self._job.uses_torchrun:
            failures = [*failures, ExitReport(rank=0, pid=process.pid, exitcode=process.returncode)]

        if self._ended_by is not None:
            from traceml.supervise.slurm_jobs import scheduler_facts

            self._ended_by["waited_s"] = round(time.time() - self._ended_by["time"], 3)
            self._ended_by |= scheduler_facts(os.environ)
        elif self._job.uses_torchrun and -process.returncode in _DEATHS:
            self._ended_by = {"launcher_pid": process.pid, "time": time.time()}

        if self._joined is not None:
            self._joined.finish(self._as_stopped(failures[self._reported_exits :]), self._ended_by)
            return True

        return self._aggregator.finish(self._as_stopped(failures), shell_status(process.wait()), self._ended_by)

    def _as_stopped(self, exits: Sequence[ExitReport]) -> list[ExitReport]:
        """Return exits, those by a signal to this command marked: who signals it ends the job as a whole."""
        from msgspec.structs import replace

        ends = {-number for number in self._signals} | {128 + number for number in self._signals}
        return [replace(each, stopped=True) if each.exitcode in ends else each for each in exits]


def _is_for_job_too(info: signal.struct_siginfo) -> bool:
    """Whether the job has received a signal itself: a closed terminal tells only the leader of its session."""
    leads = info.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
    return info.si_code == _SI_KERNEL and not leads


def _output_pipe() -> ScriptPipe:
    """Return a replacement of the same kind for our standard output: a script may check for a terminal."""
    return PseudoTerminal(sys.stdout.fileno()) if sys.stdout.isatty() else ScriptPipe()
