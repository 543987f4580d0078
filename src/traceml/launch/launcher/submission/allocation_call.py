"""The call that a submitted job executes: the launch, and the request to queue it again when Slurm ends the job.

Process: the submitter makes it, the job's first process runs it.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from traceml.errors import SlurmError
from traceml.launch.launcher.launch_options import FunctionCall, LaunchOptions
from traceml.process_ends import EndedBySignal, ended_by
from traceml.supervise.slurm_jobs import is_cancelled, read_job, requeue_job, scheduler_end

__all__ = ["AllocationCall", "AllocationOutcome", "last_outcome"]

_WHY = {
    "preempted": "Slurm preempted the job",
    "time_limit": "the job reached its time limit",
    "warned": "the job ended close to its time limit",
    "requeued": "Slurm ended the job to queue it again",
}

_EARLY_S = 60.0  # "may be sent up to 60 seconds earlier than specified", in the words of sbatch's manual

_log = logging.getLogger("traceml")


@dataclass(frozen=True, slots=True)
class AllocationOutcome:
    """The end of a submitted launch: its result, or the error that it raised."""

    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class AllocationCall:
    """A launch in the allocation of a submitted job. Called there, without arguments."""

    options: LaunchOptions
    call: FunctionCall | None = None  # the function; None for a script
    script: Mapping[str, Any] | None = None  # the script, see `assembly.run_script`
    # Arguments of the script's `Tracing`; None: it is not traced.
    tracing: Mapping[str, Any] | None = field(default=None)
    retries: int = 0  # how often the job may be queued again

    def __call__(self) -> AllocationOutcome:
        """Run the launch.

        Raises:
            SystemExit: the job is queued again, and has no outcome yet.
        """
        try:
            with ended_by(signal.SIGTERM, signal.SIGHUP):
                outcome = AllocationOutcome(result=self._run())
        except EndedBySignal as error:
            self._requeue()
            outcome = AllocationOutcome(error=SlurmError(f"the job was ended by {signal.Signals(error.number).name}"))
        except Exception as error:  # noqa: BLE001 - whatever a worker raised is the outcome
            self._requeue()
            outcome = AllocationOutcome(error=_portable(error))
            if is_cancelled(os.environ):  # which ends the workers, too, and maybe first
                outcome = AllocationOutcome(error=SlurmError("the job was cancelled"))

        _outcomes.append(outcome)
        return outcome

    def _run(self) -> Any:
        from traceml.launch.launcher.assembly import run_function, run_script

        if self.call is not None:
            return run_function(self.options, self.call)

        assert self.script is not None
        tracing = None
        if self.tracing is not None:
            from traceml.launch.launcher.job.tracing import Tracing

            tracing = Tracing(**self.tracing)

        run_script(self.options, self.script, tracing=tracing)
        return None

    def _requeue(self) -> None:
        """Queue the job again if Slurm has ended it, and has not done so itself.

        Raises:
            SystemExit: it is queued.
            SlurmError: its retries are used up, or it cannot be queued.
        """
        why = scheduler_end(os.environ, _EARLY_S)
        if why is None:
            return

        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which queueing the job again sends
        job_id, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if restarts >= self.retries:
            raise SlurmError(f"{_WHY[why]}, and has been queued again {restarts} of {self.retries} times")

        job = read_job(job_id)
        if job is None or job.restarts <= restarts:
            requeue_job(job_id)

        _log.warning("%s: it is queued again (%d of %d)", _WHY[why], restarts + 1, self.retries)
        raise SystemExit(0)


_outcomes: list[AllocationOutcome] = []


def last_outcome() -> AllocationOutcome | None:
    """Return the outcome of the call in this process; None before its end."""
    return _outcomes[-1] if _outcomes else None


def _portable(error: Exception) -> BaseException:
    """Return an error as it is, or as text where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - classes of users may fail in any way
        return RuntimeError(f"{type(error).__name__}: {error}")

    return error
