"""State of each tracker's delivery: one small file per backend in `<run>/trackers/`, and a lock next to it.

The delivery process writes it after each batch; the aggregator, `traceml sync`, the rank, the report and the screens
read it. Imports little beyond the standard library, because all of them import this module.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict

from traceml.run_folder import TRACKERS_FOLDER
from traceml.trusted_files import read_regular, replace_file

__all__ = [
    "EXITS",
    "EXIT_AGAIN",
    "EXIT_BROKEN",
    "EXIT_DONE",
    "EXIT_TAKEN",
    "FAILING_PHASES",
    "AuditState",
    "DeliveryPhase",
    "DerivedState",
    "ResumeState",
    "SuspectState",
    "TrackerState",
    "TrainingState",
    "locked",
    "states_of",
]

# Exit statuses of a delivery process: all done; another process delivers; start it again; a person has to act.
EXITS = EXIT_DONE, EXIT_TAKEN, EXIT_AGAIN, EXIT_BROKEN = 0, 73, 75, 78

_SUFFIX = ".state.json"


class DeliveryPhase(StrEnum):
    """Phase of a delivery."""

    STARTING = "starting"
    DELIVERING = "delivering"
    WAITING = "waiting"  # for the next try: the tracker just failed, or asked for a later one
    OPEN = "open"  # circuit breaker: the tracker failed repeatedly; one probe per `max_backoff`
    UNAUTHORIZED = "unauthorized"
    BROKEN = "broken"  # its library is missing or broken, or it is misconfigured; no further tries
    STOPPED = "stopped"  # ended before all was delivered; `traceml sync` continues
    DONE = "done"


# The tracker does not accept what it is sent.
FAILING_PHASES = frozenset(
    {DeliveryPhase.WAITING, DeliveryPhase.OPEN, DeliveryPhase.UNAUTHORIZED, DeliveryPhase.BROKEN}
)
_GOING_ON = frozenset({DeliveryPhase.STARTING, DeliveryPhase.DELIVERING})
_PROGRAM = b"traceml.track.delivery"  # in the command line of a delivery process


class AuditState(TypedDict, total=False):
    """Counts since the last line of the audit log."""

    counts: dict[str, int]  # by kind of call
    bytes: int


class TrainingState(TypedDict, total=False):
    """State of `TrainingValues` between frames."""

    facts: dict[str, dict[str, Any]]  # rank -> what is known of its data, until it is decided who has data of its own
    decided: list[Any]  # number of ranks with data of their own, whether it is text, whether samples are counted
    repeating: list[int]  # ranks with the data of another one
    sizes: dict[str, int]  # sums of the open interval
    losses: dict[str, list[Any]]  # step -> sum and number of ranks
    loss_steps: dict[str, int]  # rank -> its last step with a loss
    loss_due: int  # losses up to this step are no longer waited for


class DerivedState(TypedDict, total=False):
    """State of `DerivedMetrics` between frames."""

    training: TrainingState
    group: dict[str, Any]  # fields of `GroupUse`
    interval: dict[str, Any]  # sums of the open interval
    lead: dict[str, Any]  # the lowest rank: its time, steps, restarts
    step_of: dict[str, int]  # rank -> its last step
    ranks: int  # size of the job
    resumes_at: dict[str, int]  # stream -> steps before those that its process counts from 0
    time: dict[str, Any]  # sums of the wall time of the lowest rank's processes
    held: dict[str, str]  # stream -> steps that wait for their device times
    samples: dict[str, dict[str, Any]]  # open windows, by table, rank and device
    counters: dict[str, list[Any]]  # last values before them


# The range of rows in which a refused one is looked for, the refused ones, and how many came without another between.
SuspectState = TypedDict(
    "SuspectState",
    {"from": dict[str, int], "to": dict[str, int], "rows": int, "found": list[dict[str, dict[str, int]]],
     "in_a_row": int}, total=False,
)  # fmt: skip


class ResumeState(TypedDict, total=False):
    """State that a delivery carries from batch to batch, so that it can continue after a death.

    Maps by experiment have the experiment's key.
    """

    windows: dict[str, dict[str, Any]]  # experiment -> open windows of its aggregates, see `filters`
    derived: DerivedState
    params: dict[str, dict[str, str]]  # experiment -> digests of the parameters of rank 0
    tags: dict[str, dict[str, str]]  # likewise of tags and facts
    open: dict[str, dict[str, bool]]  # experiment -> stream -> whether it is not ended there
    behind: dict[str, dict[str, int]]  # experiment -> stream -> values logged before its end
    # experiment to end -> its state, the epoch seconds at which that was read, and at which it ended
    to_end: dict[str, list[Any]]
    event: int  # id of the last live verdict that was read
    verdict: list[Any]  # kind, ranks and phase of the verdict sent last
    audit: AuditState
    before: dict[str, int]  # cursor of a delivery that started over
    suspect: SuspectState


@dataclass(slots=True)
class TrackerState:
    """State of one backend's delivery of one run."""

    backend: str
    phase: DeliveryPhase = DeliveryPhase.STARTING
    # Position in the store after which the next rows are read; see `record_reader`.
    cursor: dict[str, int] = field(default_factory=dict)
    passed: int = 0  # logged rows before the cursor
    # Per stream and table, the number of its rows before the cursor, lost ones included.
    reached: dict[str, dict[str, int]] = field(default_factory=dict)
    delivered: int = 0  # values and other logged rows that the backend has confirmed
    derived: int = 0  # values computed from the run (step time, verdict, system), delivered with them
    filtered: int = 0  # logged rows that filters kept back
    failed: int = 0  # logged rows that the backend refused; `reasons` counts them by reason
    fallback: int = 0  # number of rows in `delivered` that went to the fallback
    masked: int = 0  # number of masked texts
    reasons: dict[str, int] = field(default_factory=dict)
    # Position of each experiment at the tracker: `id`, `url`, `mark`, `ended`; `is_tagged`: its first tags are there.
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    resume: ResumeState = field(default_factory=ResumeState)
    batch_rows: int = 0  # most rows in the next batch, from the duration of the last ones; 0 before the first
    # Whether the fallback has everything, while the failing tracker does not know the end of the run.
    fallback_done: bool = False
    # Whether the backend has failed since the fallback last delivered: the fallback is next, also after `retry_at`.
    fallback_due: bool = False
    retries: int = 0  # failures in a row
    retry_at: float = 0.0  # epoch seconds of the next try
    latency_ms: float | None = None  # duration of a batch, smoothed
    error: str = ""  # last error. Empty after a success.
    busy_until: float = 0.0  # epoch seconds until which the current call may take
    target: str = ""
    pid: int = 0
    updated: float = 0.0  # epoch seconds of the last change

    @classmethod
    def path_in(cls, run_dir: Path, backend: str) -> Path:
        """Return the state file of a backend: a valid file name, different for each backend."""
        safe = re.sub(r"[^A-Za-z0-9_-]", "_", backend)[:80]
        if safe != backend:
            safe += f"-{hashlib.sha256(backend.encode()).hexdigest()[:8]}"

        return run_dir / TRACKERS_FOLDER / f"{safe}{_SUFFIX}"

    @classmethod
    def load(cls, run_dir: Path, backend: str) -> TrackerState:
        """Return a backend's state, or a new one."""
        return _read(cls.path_in(run_dir, backend)) or cls(backend)

    def save(self, run_dir: Path) -> None:
        """Write the state atomically.

        Raises:
            OSError: it cannot be written, typically on a full disk; the previous file stays.
        """
        self.updated = time.time()
        path = self.path_in(run_dir, self.backend)
        path.parent.mkdir(exist_ok=True)
        replace_file(path, json.dumps(asdict(self)).encode())

    def busy(self, seconds: float) -> None:
        """Record that a call begins which may take `seconds`."""
        self.busy_until = time.time() + seconds

    @property
    def was_cut_off(self) -> bool:
        """Whether the process that delivered has ended without saying so, as after SIGKILL."""
        if self.phase not in _GOING_ON or not self.pid:
            return False

        try:
            return _PROGRAM not in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return True

    @property
    def is_in_slow_call(self) -> bool:
        """Whether a call is running that may still take its announced time."""
        return time.time() < self.busy_until

    def reach(self, rows: Mapping[tuple[int, str], int]) -> None:
        """Record how many rows of each stream and table are before the cursor."""
        for (stream, table), count in rows.items():
            self.reached.setdefault(str(stream), {})[table] = count

    def pending(self, logged: int) -> int:
        """Return the number of rows that wait for delivery.

        Args:
            logged: number of logged rows in the store.
        """
        return max(logged - self.passed, 0)


def states_of(run_dir: Path) -> list[TrackerState]:
    """Return the state of every backend of a run, by name, without unreadable files."""
    found = [_read(path) for path in sorted((run_dir / TRACKERS_FOLDER).glob(f"*{_SUFFIX}")) if path.name[0] != "."]
    return sorted((state for state in found if state is not None), key=lambda state: state.backend)


@contextlib.contextmanager
def locked(run_dir: Path, backend: str) -> Iterator[bool]:
    """Lock a backend of a run; yield whether this process holds the lock. One process at a time delivers.

    The kernel releases the lock when the process dies.
    """
    path = TrackerState.path_in(run_dir, backend).with_suffix(".lock")
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a network file system without locks: deliver anyway

        yield True


def _read(path: Path) -> TrackerState | None:
    import msgspec  # a rank reads no state at its start

    try:
        return msgspec.convert(json.loads(read_regular(path)), TrackerState)
    except (OSError, ValueError, AttributeError, RecursionError, msgspec.ValidationError):
        return None  # no file, damaged, or of another version: the delivery starts over
