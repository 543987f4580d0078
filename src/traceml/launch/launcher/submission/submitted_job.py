"""Handle of a submitted job: its state, its result and its end.

Process: submitter.
"""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Generic, TypeVar

from traceml.errors import SlurmError, WaitTimeoutError
from traceml.launch.launcher.submission.allocation_call import AllocationOutcome
from traceml.supervise.slurm_jobs import cancel_job, is_forgotten, read_job

__all__ = ["SubmittedJob"]

R_co = TypeVar("R_co", covariant=True)
"""Result of the job."""

_OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
_UNKNOWN = "UNKNOWN"
_POLL_S, _MAX_POLL_S = 0.5, 20.0  # 0.5, 0.75, 1.1, 1.7, ... 20: the controller serves all users
_FORGOTTEN_S = 180.0  # a result may come later: its file system, or a controller that starts again, may be slow
_FILE_S = 10.0  # a network file system may show a file later


class SubmittedJob(Generic[R_co]):
    """A job that was submitted to Slurm, see `Launcher.submit`.

    Examples:
        >>> job = traceml.Launcher().submit(train, nodes=2)
        >>> model = job.result().rank(0)

    Attributes:
        job_id: Slurm's id.
        run_id: id of the run; each time that the job is queued again is an attempt of it.
        output: file with the job's output: that of rank 0, and the verdict.
    """

    def __init__(self, job_id: str, run_id: str, *, output: Path, outcome: Path) -> None:
        self.job_id, self.run_id, self.output = job_id, run_id, output
        self._outcome_file = outcome

    def __repr__(self) -> str:
        return f"SubmittedJob({self.job_id!r}, run_id={self.run_id!r})"

    @property
    def state(self) -> str:
        """Slurm's word for the job's state: PENDING, RUNNING, COMPLETED, …; UNKNOWN where it has none, or is silent."""
        job = read_job(self.job_id)
        return _UNKNOWN if job is None else job.state

    @property
    def done(self) -> bool:
        """Whether the job has ended for good."""
        return self._outcome_file.exists() or self.state in _OVER

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the job, also while it is queued again.

        Args:
            timeout: most seconds to wait; None: without limit.

        Raises:
            SlurmError: for minutes Slurm has known no such job, and there is no result of it.
            WaitTimeoutError: the job has not ended by then.
        """
        end_s = None if timeout is None else time.monotonic() + timeout
        poll_s, forgotten_at_s = _POLL_S, None
        while not self._outcome_file.exists() and (state := self.state) not in _OVER:
            forgotten_at_s = self._forgotten_at(state, forgotten_at_s)
            left_s = poll_s if end_s is None else end_s - time.monotonic()
            if left_s <= 0:
                raise WaitTimeoutError(f"job {self.job_id} is {state} after {timeout:g} s")

            time.sleep(min(poll_s, left_s))
            poll_s = min(1.5 * poll_s, _MAX_POLL_S)

    def _forgotten_at(self, state: str, before_s: float | None) -> float | None:
        """Return since when Slurm has known no such job; None if it knows it, or does not answer.

        Args:
            before_s: what was returned last.

        Raises:
            SlurmError: that is so for too long.
        """
        if state != _UNKNOWN or not is_forgotten(self.job_id):
            return None
        if before_s is not None and time.monotonic() - before_s >= _FORGOTTEN_S:
            raise SlurmError(f"Slurm has forgotten job {self.job_id}, and it left no result; its output: {self.output}")

        return time.monotonic() if before_s is None else before_s

    def result(self, timeout: float | None = None) -> R_co:
        """Wait for the job, and return what the launch returned.

        Args:
            timeout: most seconds to wait; None: without limit.

        Raises:
            Exception: what the launch raised.
            SlurmError: the job ended without a result: it was cancelled, or its retries are used up; or Slurm has
                forgotten it.
            WaitTimeoutError: the job has not ended by then.
        """
        self.wait(timeout)
        outcome = self._read_outcome()
        if outcome.error is not None:
            raise outcome.error

        result: R_co = outcome.result
        return result

    def cancel(self) -> None:
        """End the job, or take it from the queue; the report of what it has done is written.

        Raises:
            SlurmError: Slurm does not do it.
        """
        cancel_job(self.job_id)

    def _read_outcome(self) -> AllocationOutcome:
        end_s = time.monotonic() + _FILE_S
        while not self._outcome_file.exists():
            if time.monotonic() > end_s or self.state == "CANCELLED":
                raise SlurmError(f"job {self.job_id} ended without a result ({self.state}); its output: {self.output}")

            time.sleep(_POLL_S)

        with self._outcome_file.open("rb") as file:  # `success` with the value, or `error` with a traceback
            word, value = pickle.load(file)  # noqa: S301 - written by the user's own job, through submitit

        if word == "success":
            return AllocationOutcome(value.result, value.error)

        last = str(value).strip().splitlines()[-1]
        return AllocationOutcome(error=SlurmError(f"job {self.job_id} failed: {last}. Its output: {self.output}"))
