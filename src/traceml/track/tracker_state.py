"""How far each tracker of a run has got: one small file per backend in `<run>/trackers/`, and a lock beside it.

Written by the delivery process after each batch, read by everybody else: the aggregator, `traceml sync`, the report and
the screens. The standard library alone, as everybody reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = [
    "EXIT_AGAIN",
    "EXIT_BROKEN",
    "EXIT_DONE",
    "EXIT_TAKEN",
    "FOLDER",
    "DeliveryPhase",
    "TrackerState",
    "locked",
    "states_of",
]

# How a delivery process ends: all is done; start it again; somebody else delivers; a person has to mend something.
EXIT_DONE, EXIT_TAKEN, EXIT_AGAIN, EXIT_BROKEN = 0, 73, 75, 78

FOLDER = "trackers"
_SUFFIX = ".state.json"


class DeliveryPhase(StrEnum):
    """What a delivery is doing."""

    STARTING = "starting"
    DELIVERING = "delivering"
    WAITING = "waiting"  # for a next try: the tracker failed a moment ago, or asked us to come back later
    OPEN = "open"  # the circuit breaker: the tracker failed again and again; one probe now and then
    UNAUTHORIZED = "unauthorized"
    BROKEN = "broken"  # its library is missing or broken, or it is configured wrongly; nobody tries again by itself
    STOPPED = "stopped"  # ended before all was delivered; `traceml sync` goes on
    DONE = "done"


@dataclass(slots=True)
class TrackerState:
    """One backend's state of one run.

    Attributes:
        backend: its name.
        phase: what it is doing.
        cursor: position in the store after which the next rows are read, as `records` writes it.
        passed: logged rows before the cursor.
        delivered: values and other logged things that the backend has confirmed.
        derived: values made from the run itself (step time, verdict, system), delivered next to them.
        filtered: logged rows that rules kept back.
        failed: logged rows that the backend refused for good, and in `reasons` why and how often.
        fallback: of `delivered`, how many went to the fallback.
        masked: texts that were masked.
        experiments: per experiment where it stands at the tracker: `id`, `url`, `mark`, `started`, `ended`.
        memory: what rules and derived values carry from batch to batch.
        batch_rows: how many rows the next batch takes at most, by how long the last ones took; 0 before the first.
        stood_in: whether the fallback has got everything and the one that fails has not been told the end.
        retries: failures in a row.
        retry_at: epoch seconds before which nothing is tried.
        latency_ms: how long the backend took for a batch, smoothed.
        error: what went wrong last; `error_at` when, in epoch seconds. Empty after a success.
        busy_until: epoch seconds until which a call may take that is under way.
        target: where the rows go.
        pid: the process that delivers; updated: epoch seconds of the last change.
    """

    backend: str
    phase: DeliveryPhase = DeliveryPhase.STARTING
    cursor: dict[str, Any] = field(default_factory=dict)
    passed: int = 0
    delivered: int = 0
    derived: int = 0
    filtered: int = 0
    failed: int = 0
    fallback: int = 0
    masked: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    batch_rows: int = 0
    stood_in: bool = False
    retries: int = 0
    retry_at: float = 0.0
    latency_ms: float | None = None
    error: str = ""
    error_at: float | None = None
    busy_until: float = 0.0
    target: str = ""
    pid: int = 0
    updated: float = 0.0

    @classmethod
    def path_in(cls, run_dir: Path, backend: str) -> Path:
        """Return the state file of a backend; any name gives one that a folder can hold, different for each."""
        safe = re.sub(r"[^A-Za-z0-9_-]", "_", backend)[:80]
        if safe != backend:
            safe += f"-{hashlib.sha256(backend.encode()).hexdigest()[:8]}"

        return run_dir / FOLDER / f"{safe}{_SUFFIX}"

    @classmethod
    def load(cls, run_dir: Path, backend: str) -> TrackerState:
        """Return a backend's state, a new one where there is none."""
        return _read(cls.path_in(run_dir, backend)) or cls(backend)

    def save(self, run_dir: Path) -> None:
        """Write it; the file is whole at every moment.

        Raises:
            OSError: it cannot be written, typically for want of space; the former one is kept.
        """
        self.updated = time.time()
        path = self.path_in(run_dir, self.backend)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            draft.write_text(json.dumps(asdict(self)))
            draft.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

            raise

    def busy(self, seconds: float) -> None:
        """Note that a call begins which may take so long."""
        self.busy_until = time.time() + seconds

    @property
    def is_in_slow_call(self) -> bool:
        """Whether a call is under way that was known to take long, and still may."""
        return time.time() < self.busy_until

    def pending(self, logged: int) -> int:
        """Return how many rows wait.

        Args:
            logged: rows logged so far that are stored.
        """
        return max(logged - self.passed, 0)


def states_of(run_dir: Path) -> list[TrackerState]:
    """Return the state of every backend of a run, by name; a file that cannot be read is left out."""
    found = [_read(path) for path in sorted((run_dir / FOLDER).glob(f"*{_SUFFIX}")) if path.name[0] != "."]
    return sorted((state for state in found if state is not None), key=lambda state: state.backend)


@contextlib.contextmanager
def locked(run_dir: Path, backend: str) -> Iterator[bool]:
    """Hold the right to deliver to a backend; yields whether we have it: one process at a time does.

    The kernel gives it back when the process dies, however that happens.
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
            pass  # a network file system that cannot lock: better to deliver than not to

        yield True


def _read(path: Path) -> TrackerState | None:
    try:
        stored = json.loads(path.read_text())
        known = {each.name for each in fields(TrackerState)}
        state = TrackerState(**{name: value for name, value in stored.items() if name in known})
        state.phase = DeliveryPhase(state.phase)
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # none yet, or of another version: its backend starts over, which an idempotent one does not mind

    return state
