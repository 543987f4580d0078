"""Tracing of a rank: hooks, samplers and watches, added to a recording that may have only logged before."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.database.schema import Phase, Slot
from traceml.fail_open import fail_open
from traceml.inspection.thread_frames import thread_frame
from traceml.recorder.growth.growth_watch import GrowthWatch
from traceml.recorder.lines.line_sampler import LineSampler
from traceml.recorder.lines.worker_lines import WorkerLines
from traceml.recorder.no_progress.failed_threads import FailedThreads
from traceml.recorder.no_progress.long_evaluation import LongEvaluation
from traceml.recorder.no_progress.watch_assembly import progress_watch, register_stacks
from traceml.recorder.pauses.pause_recorder import PauseRecorder
from traceml.recorder.user_code import UserCode
from traceml.samplers.base import Sampler, SamplerScheduler
from traceml.samplers.limits import DeathCauses

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument import Instrumentation
    from traceml.instrument.groups.default_group import OnGroup
    from traceml.instrument.loader import DataProgress
    from traceml.instrument.step_clock import StepClock
    from traceml.recorder.profile_server import ProfileServer
    from traceml.recorder.recorder_thread import RecorderThread
    from traceml.settings import Config

__all__ = ["RankTracing"]

_log = logging.getLogger("traceml")


class RankTracing:
    """Hooks, samplers and watches of a rank; before `begin` it traces nothing.

    Args:
        rank: returns the rank, and its number on its host.
        note: appends a row to `info`.
        on_group: called on the training thread before and after a process group is made; see `DefaultGroup`.
    """

    def __init__(
        self,
        config: Config,
        flight: FlightFile,
        *,
        rank: Callable[[], tuple[int, int]],
        note: InfoSender,
        on_group: OnGroup,
    ) -> None:
        self._config, self._flight, self._rank, self._note, self._on_group = config, flight, rank, note, on_group
        self.instrumentation: Instrumentation | None = None
        self.is_on = False
        """Whether tracing has begun."""
        self._long_evaluation = LongEvaluation(note)
        self._pauses: PauseRecorder | None = None
        self._worker_lines: WorkerLines | None = None
        self._profiles: ProfileServer | None = None
        self._failed_threads = FailedThreads()
        self._progress_watch = progress_watch(
            flight,
            rank=lambda: rank()[0],
            thread=self._training_thread,
            clock=self._step_clock,
            data=self.data,
            failed_threads=self._failed_threads.newest,
            hang_timeout_s=config.hang_timeout,
        )

    def begin(self, thread: RecorderThread, run: Callable[[Callable[[], None]], None]) -> None:
        """Install the hooks, and let the recorder's thread sample and watch.

        Args:
            run: runs an action on it, or at once while it has not started.
        """
        self._thread = thread
        self._failed_threads.install()
        scheduler = self.scheduler(self._samplers())
        run(lambda: thread.use(scheduler))
        self._instrument()
        run(self._sample_lines)
        run(self._watch_growth)
        run(self._watch_pauses)
        self._watch_progress()

    def end(self) -> None:
        """Remove the hooks."""
        if self.instrumentation is None:
            return

        self._failed_threads.uninstall()
        with fail_open(_log, "recorder", "a profile could not be ended"):
            if self._profiles is not None:
                self._profiles.abandon()

        with fail_open(_log, "recorder", "the time of torch.compile is not known"):
            self._note_compilation()

        with fail_open(_log, "recorder", "some hooks could not be removed"):  # those that stay do nothing
            self.instrumentation.close_open_step()
            self.instrumentation.uninstall()

    def close_open_step(self) -> None:
        """Append the step that is open: the training is over."""
        if self.instrumentation is not None:
            self.instrumentation.close_open_step()

    def close_done_step(self) -> None:
        """Append the open step if it is done; only on the thread that trains, as another one may be in a hook."""
        if self.step_is_done and self._training_thread() == threading.get_ident():
            self.close_open_step()

    def forget(self) -> None:
        """Become a no-op in a forked child."""
        if self.instrumentation is not None:
            self.instrumentation.clock.stop()  # all hooks are plain calls then

        if self._pauses is not None:
            self._pauses.forget()

        if self._worker_lines is not None:
            self._worker_lines.close()

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation runs, whose time is in no step."""
        return self.instrumentation is not None and self.instrumentation.clock.is_evaluating

    @property
    def has_stepped(self) -> bool:
        """Whether the end of training closes the open step; else it is dropped."""
        return self.instrumentation is not None and self.instrumentation.clock.has_stepped

    @property
    def loop_has_ended(self) -> bool:
        """Whether the training loop is over, as far as is known, so that the open step does not count."""
        return self.instrumentation is not None and self.instrumentation.clock.loop_has_ended

    def note_left_loop(self) -> None:
        """Note, at the end of the process, whether the training loop was left."""
        clock = None if self.instrumentation is None else self.instrumentation.clock
        if clock is not None and clock.training_loader is not None:
            clock.training_loader.note_left(clock)

    @property
    def step_is_done(self) -> bool:
        """Whether an optimizer has stepped in the open step, and no part of another step has begun since."""
        return self.instrumentation is not None and self.instrumentation.clock.step_is_done

    @property
    def trains_in_thread(self) -> bool:
        """Whether a thread other than the main one trains, and has not ended."""
        thread = self._training_thread()
        return thread != threading.main_thread().ident and thread_frame(thread) is not None

    def data(self) -> DataProgress | None:
        """Return the progress through the data of the training loader; None without one."""
        clock = self._step_clock()
        loader = clock.training_loader if clock is not None else None
        return loader.data() if loader is not None else None

    def samples(self) -> int | None:
        """Return the samples of the model's input in the open step; None if no model has got any."""
        clock = self._step_clock()
        return clock.input_samples if clock is not None and clock.forward_ns else None

    def phase_left(self, error: BaseException | None) -> dict[str, str]:
        """Return the phase that an exception has left, where the traceback does not show it."""
        phase = self.instrumentation.clock.phase_of(error) if self.instrumentation is not None else None
        return {} if phase is None else {"open_phase": Phase(phase).label}

    def snapshot(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Answer the aggregator's command `snapshot`."""
        return self._progress_watch.snapshot_now(is_last=args.get("last") is True).to_row()

    def profile(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Answer the aggregator's command `profile`; see `ProfileServer.answer`."""
        if self._profiles is None:
            from traceml.recorder.profile_server import ProfileServer  # few runs are profiled

            self._profiles = ProfileServer(
                self._flight, clock=self._step_clock, thread=self._training_thread, contains=UserCode().contains
            )

        return self._profiles.answer(args)

    def close_profiles(self) -> None:
        """Remove the trace of the last profile."""
        if self._profiles is not None:
            self._profiles.close()

    def leave_out_output(self) -> None:
        """Take what was written up to now for no work of the script."""
        self._progress_watch.leave_out_output()

    def hook_ns(self) -> int:
        """Return what the hooks cost per step, in nanoseconds."""
        return self.instrumentation.hook_ns_per_step() if self.instrumentation is not None else 0

    def scheduler(self, samplers: Sequence[Sampler]) -> SamplerScheduler:
        """Return a scheduler of samplers whose rows go to the tables."""
        flight = self._flight
        return SamplerScheduler(
            samplers,
            lambda table, row: flight.ring(table).append(*row),
            interval_s=self._config.sample_interval,
            intervals_s={str(name): each for name, each in self._config.sampler_intervals.items()},
            on_error=self._note_failed_sampler,
        )

    def _note_failed_sampler(self, name: str, error: Exception) -> None:
        self._note(InfoKind.SAMPLER, name=name, error=f"{type(error).__name__}: {error}")

    def _samplers(self) -> Sequence[Sampler]:
        from traceml.instrument.workers.loader_workers import worker_pids
        from traceml.samplers.sampler_selection import open_samplers  # 5 ms, for nothing where only logging is wanted

        return open_samplers(
            local_rank=self._rank()[1],
            workers=worker_pids,
            save_folder=self._save_folder,
            training_thread=self._training_thread,
            note=self._note,
        )

    def _save_folder(self) -> str | None:
        return self.instrumentation.save_folder.path if self.instrumentation is not None else None

    def _instrument(self) -> None:
        from traceml.instrument import install

        self.is_on = True
        self._sample_workers()
        with fail_open(_log, "recorder", "steps cannot be traced"):  # samples and trace_step still work
            self.instrumentation = install(
                self._flight,
                on_info=self._append_info,
                on_group=self._on_group,
                in_worker=self._worker_lines.sampling if self._worker_lines is not None else None,
            )

    def _sample_workers(self) -> None:
        """Collect the lines of loader workers from now on."""
        interval_s = self._config.stack_interval
        if not interval_s:
            return

        with fail_open(_log, "recorder", "the lines of loader workers are not sampled"):
            from traceml.instrument.workers.loader_workers import worker_pids

            self._worker_lines = WorkerLines(self._flight, worker_pids, interval_s, self._note)
            self._thread.every_cycle(self._worker_lines)

    def _sample_lines(self) -> None:
        interval_s = self._config.stack_interval
        if interval_s:
            self._thread.sample_lines(
                LineSampler(
                    self._flight,
                    self._training_thread,
                    gives_batches=self._gives_batches,
                    is_evaluating=lambda: self.is_evaluating,
                    may_be_done=self._may_be_done,
                    on_gradients=lambda file, function: self._note(InfoKind.OWN_UPDATE, file=file, function=function),
                    interval_s=interval_s,
                )
            )

    def _watch_growth(self) -> None:
        with fail_open(_log, "recorder", "objects that grow in memory are not searched for"):
            contains = UserCode().contains
            self._thread.every_cycle(GrowthWatch(self._flight.open_slots, self._training_thread, contains, self._note))

    def _watch_pauses(self) -> None:
        with fail_open(_log, "recorder", "garbage collections, compilations and checkpoints are not reported"):
            saves = self.instrumentation.saves if self.instrumentation is not None else None
            self._pauses = PauseRecorder(self._flight, lambda: self.is_evaluating, UserCode().contains, saves)
            self._thread.every_cycle(self._pauses)

    def _watch_progress(self) -> None:
        register_stacks(self._flight.descriptor)
        self._thread.every_cycle(self._check_progress)
        with fail_open(_log, "recorder", "deaths of loader workers are not recorded"):
            self._death_causes = DeathCauses()
            self._thread.every_cycle(self._note_lost_workers)

    def _note_lost_workers(self, _last: bool) -> None:
        lost = self.instrumentation.lost_workers if self.instrumentation is not None else None
        while lost:
            self._note(InfoKind.WORKER_LOST, urgent=True, **lost.popleft(), **self._death_causes.facts())

    def _check_progress(self, last: bool) -> None:
        slots = self._flight.open_slots
        slots[Slot.EVALUATING], slots[Slot.TRAINING_THREAD] = self._outside_steps(), self._training_thread()
        self._long_evaluation(is_evaluating=slots[Slot.EVALUATING] == 1)
        self._progress_watch(last)
        is_profiled = self._profiles is not None and self._profiles.is_used
        self._thread.is_attentive = self._progress_watch.is_quiet or is_profiled

    def _outside_steps(self) -> int:
        """Return what `Slot.EVALUATING` has."""
        if self.is_evaluating:
            return 1

        if self.loop_has_ended:
            return 2

        clock = self._step_clock()
        return 3 if clock is not None and clock.is_overdue() else 0

    def _gives_batches(self, stack: Sequence[FrameType]) -> bool:
        source = self.instrumentation.events.batch_source if self.instrumentation is not None else None
        return source is not None and source.contains(stack)

    def _may_be_done(self) -> bool:
        """Return whether the open step may be done: what it waits for then may be an evaluation's batch."""
        clock = self._step_clock()
        return clock is not None and (clock.has_stepped or bool(clock.ended.may_be_step))

    def _step_clock(self) -> StepClock | None:
        return self.instrumentation.clock if self.instrumentation is not None else None

    def _training_thread(self) -> int:
        clock = self._step_clock()
        return clock.thread if clock is not None and clock.thread else threading.main_thread().ident or 0

    def _note_compilation(self) -> None:
        """Report how long torch.compile took, if it was used."""
        dynamo = sys.modules.get("torch._dynamo.utils")
        times = getattr(dynamo, "compilation_time_metrics", {}).get("_compile.compile_inner")
        if times:
            self._note(InfoKind.COMPILATION, seconds=round(sum(times), 3), graphs=len(times))

    def _append_info(self, facts: dict[str, Any]) -> None:
        self._flight.log("info").append(facts)
