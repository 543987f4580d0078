"""What can go wrong, as one tree.

TraceMLError
├── SettingsError                 (ValueError)     a setting has an unknown name or a bad value
├── AggregatorUnavailableError    (ConnectionError) no aggregator answered within the time allowed
├── AggregatorRefusedError        (ConnectionError) an aggregator answered and refused: token, version, limits
│   └── AggregatorForeignError                     it belongs to another user or another host: its token is unknown
├── ProtocolError                 (ValueError)     bytes on the wire that are not ours or not this version's
├── RunNotFoundError              (LookupError)    no run where the user pointed
├── StoreError                    (OSError)        a run's store cannot be written or read
├── UsageError                    (ValueError)     a command or a function was called wrongly
├── WorkerFailedError             (RuntimeError)   a launched worker died: a signal, an exit code
├── AgentFailedError              (RuntimeError)   a host of a launch cannot be used, or was lost
├── LaunchTimeoutError            (TimeoutError)   a launch did not get started within its time
├── PayloadError                  (TypeError)      an argument or a result of a launch cannot be pickled
├── SlurmError                    (RuntimeError)   Slurm was asked for, and there is no allocation that can be read
├── ResultNotFoundError           (IndexError, KeyError) a launch has no such rank, host or local rank
├── RemoteTracebackError                           the cause of an exception that came from a worker: its traceback
├── TraceNotFoundError            (LookupError)    no trace file where the user pointed
├── TraceEmptyError               (ValueError)     a trace in which no event can be read
├── PluginError                   (LookupError)    a plugin is not there, is broken, or is configured wrongly
├── TaskError                     (RuntimeError)   a task cannot be run, or will never have a result
│   ├── RuntimeClosedError                         its Runtime is shut down
│   ├── TaskCancelledError                         it was cancelled before it began
│   ├── TaskDeadlockError                          what waits and what is waited for wait for each other
│   ├── TaskForkedError                            it belongs to the process that this one was forked from
│   └── TasksFailedError          (ExceptionGroup) what all failed tasks raised, together
├── TaskTimeoutError              (TimeoutError)   a task ran longer than it was allowed
├── WaitTimeoutError              (TimeoutError)   a task had not ended when its waiter had waited long enough
├── NotCallableError              (TypeError)      what was submitted as a task cannot be called
└── BackendError                  (RuntimeError)   a tracker did not take what it was given
    ├── BackendUnauthorizedError  (PermissionError) it does not accept our credentials (401, 403)
    ├── BackendBusyError          (RuntimeError)   it asks to come back later (429, 503)
    └── BackendRefusedError       (ValueError)     it will never take these rows: a bad name or value
"""

from __future__ import annotations

import signal as signals
from collections.abc import Sequence
from typing import Any

__all__ = [
    "AgentFailedError",
    "AggregatorForeignError",
    "AggregatorRefusedError",
    "AggregatorUnavailableError",
    "BackendBusyError",
    "BackendError",
    "BackendRefusedError",
    "BackendUnauthorizedError",
    "LaunchTimeoutError",
    "NotCallableError",
    "PayloadError",
    "PluginError",
    "ProtocolError",
    "RemoteTracebackError",
    "ResultNotFoundError",
    "RunNotFoundError",
    "RuntimeClosedError",
    "SettingsError",
    "SlurmError",
    "StoreError",
    "TaskCancelledError",
    "TaskDeadlockError",
    "TaskError",
    "TaskForkedError",
    "TaskTimeoutError",
    "TasksFailedError",
    "TraceEmptyError",
    "TraceMLError",
    "TraceNotFoundError",
    "UsageError",
    "WaitTimeoutError",
    "WorkerFailedError",
]

_SHOWN_LINES = 20  # of a worker's log in an error's text; `log_tail` has all that came


class TraceMLError(Exception):
    """Base of every error that traceml raises on purpose."""


class SettingsError(TraceMLError, ValueError):
    """A setting has an unknown name or a value that is not allowed.

    Args:
        key: the setting, as written by the user.
        problem: what is wrong with it.
        source: where it came from: `argument`, an environment variable's name, or a file's path.
        allowed: what would be accepted.
    """

    def __init__(self, key: str, problem: str, *, source: str, allowed: str) -> None:
        super().__init__(f"{key}: {problem} (from {source}). Allowed: {allowed}")
        self.key, self.problem, self.source, self.allowed = key, problem, source, allowed


class AggregatorUnavailableError(TraceMLError, ConnectionError):
    """No aggregator answered at the address within the time allowed."""

    def __init__(self, host: str, port: int, waited_s: float, reason: str) -> None:
        super().__init__(
            f"no traceml aggregator answered at {host}:{port} within {waited_s:.1f} s (last try: {reason}). "
            "Start one with `traceml serve`, let this job start its own with traceml.init(local=True), "
            "or turn tracing off with TRACEML_ENABLED=0."
        )
        self.host, self.port, self.waited_s, self.reason = host, port, waited_s, reason


class AggregatorRefusedError(TraceMLError, ConnectionError):
    """An aggregator answered and refused this peer; trying again would not help."""

    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(f"the traceml aggregator at {host}:{port} refused the connection: {why}")
        self.host, self.port, self.why = host, port, why


class AggregatorForeignError(AggregatorRefusedError):
    """An aggregator answered for which no token is known: another user's, or one of another host."""


class ProtocolError(TraceMLError, ValueError):
    """Bytes on the wire that are not ours, or not of this version."""


class RunNotFoundError(TraceMLError, LookupError):
    """There is no run where the user pointed."""


class StoreError(TraceMLError, OSError):
    """A run's store cannot be written or read."""


class UsageError(TraceMLError, ValueError):
    """A command or a function was called wrongly; the text is one line and a hint."""


class TraceNotFoundError(TraceMLError, LookupError):
    """There is no trace file where the user pointed."""


class TraceEmptyError(TraceMLError, ValueError):
    """Files were read as traces, and there is not one event in them."""


class WorkerFailedError(TraceMLError, RuntimeError):
    """A worker of a launch ended without a result and without an exception of its own.

    Attributes:
        host: the host's name, as the user wrote it.
        rank: the worker's rank in the job.
        local_rank: its rank on the host.
        exit_code: what it exited with, None when a signal ended it.
        signal: the number of the signal that ended it, None when it exited by itself.
        log_tail: the last lines that it wrote, oldest first.
        oom: whether the kernel killed it because memory was short.
    """

    def __init__(
        self,
        host: str,
        rank: int,
        local_rank: int,
        *,
        exit_code: int | None = None,
        signal: int | None = None,
        log_tail: Sequence[str] = (),
        oom: bool = False,
        how: str | None = None,
    ) -> None:
        if how is None:
            how = f"was ended by {_signal_name(signal)}" if signal else f"exited with code {exit_code}"

        text = f"rank {rank} (local rank {local_rank} on {host}) {how}"
        if oom:
            text += ": its host was out of memory. Use fewer workers per host, or less memory in each"

        shown = list(log_tail)[-_SHOWN_LINES:]
        words = "\n".join(("Its last lines:", *(f"  {line}" for line in shown))) if shown else "It wrote nothing."
        super().__init__(f"{text}. {words}")
        self.host, self.rank, self.local_rank = host, rank, local_rank
        self.exit_code, self.signal, self.oom, self.how = exit_code, signal, oom, how
        self.log_tail = list(log_tail)

    def __reduce__(self) -> tuple[Any, ...]:
        known = {name: getattr(self, name) for name in ("exit_code", "signal", "log_tail", "oom", "how")}
        return _rebuild, (type(self), (self.host, self.rank, self.local_rank), known)


class AgentFailedError(TraceMLError, RuntimeError):
    """A host of a launch cannot be used, or was lost while it ran.

    Attributes:
        host: the host's name, as the user wrote it.
        reason: what happened, in a few words.
        advice: what can be done about it.
        words: the last lines of what ssh, srun or the agent itself said.
    """

    def __init__(self, host: str, reason: str, *, advice: str = "", words: Sequence[str] = ()) -> None:
        text = f"host {host}: {reason}."
        if advice:
            text += f" {advice}"

        if words:
            text += "\n" + "\n".join(f"  {line}" for line in words)

        super().__init__(text)
        self.host, self.reason, self.advice, self.words = host, reason, advice, list(words)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), (self.host, self.reason), {"advice": self.advice, "words": self.words})


class LaunchTimeoutError(TraceMLError, TimeoutError):
    """A launch did not get all its workers started within its time.

    Attributes:
        timeout_s: the time that was allowed, in seconds.
        absent: who was being waited for: hosts, or ranks with their hosts.
    """

    def __init__(self, timeout_s: float, doing: str, absent: Sequence[str]) -> None:
        who = "; ".join(absent)
        super().__init__(f"{doing} took longer than the timeout of {timeout_s:g} s. Still waiting for: {who}")
        self.timeout_s, self.doing, self.absent = timeout_s, doing, list(absent)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), (self.timeout_s, self.doing, self.absent), {})


class PayloadError(TraceMLError, TypeError):
    """An argument, a function or a result of a launch cannot be sent: it names the object that cannot be pickled."""


class SlurmError(TraceMLError, RuntimeError):
    """Slurm was asked for, and there is no allocation, or it cannot be read."""


class ResultNotFoundError(TraceMLError, IndexError, KeyError):
    """A launch has no such rank, host or local rank."""

    __str__ = Exception.__str__  # KeyError shows the repr of its text


class RemoteTracebackError(TraceMLError):
    """The traceback of an exception as its worker saw it; `__cause__` of the exception that `launch` raises."""

    def __init__(self, text: str) -> None:
        super().__init__("\n" + text.strip("\n"))
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text,)


def _rebuild(kind: type[Any], args: tuple[Any, ...], known: dict[str, Any]) -> Any:
    """Make an error again that came from another process: a launch inside a launch's worker."""
    return kind(*args, **known)


def _signal_name(number: int | None) -> str:
    try:
        return f"signal {number} ({signals.Signals(number or 0).name})"
    except ValueError:
        return f"signal {number}"


class PluginError(TraceMLError, LookupError):
    """A plugin is not there, cannot be loaded, or is configured wrongly."""


class BackendError(TraceMLError, RuntimeError):
    """A tracker did not take what it was given; base of the kinds that delivery treats apart."""


class BackendUnauthorizedError(BackendError, PermissionError):
    """A tracker does not accept our credentials."""


class BackendBusyError(BackendError):
    """A tracker asks to come back later.

    Args:
        why: what it said.
        retry_after_s: seconds to wait, when it named them.
    """

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class BackendRefusedError(BackendError, ValueError):
    """A tracker will never take these rows: trying them again would not help."""


class TaskError(TraceMLError, RuntimeError):
    """A task cannot be run, or will never have a result; base of the reasons."""


class RuntimeClosedError(TaskError):
    """A task was submitted to a Runtime that is shut down."""


class TaskCancelledError(TaskError):
    """A task was cancelled."""


class TaskDeadlockError(TaskError):
    """Waiting would never end: what is waited for can only end after the one that waits."""


class TaskForkedError(TaskError):
    """A task belongs to the process that this one was forked from, and cannot end here."""


class TasksFailedError(TaskError, ExceptionGroup[Exception]):
    """Tasks failed: `exceptions` holds what each raised, with its traceback, in the order of failure."""

    def derive(self, excs: Sequence[Exception]) -> TasksFailedError:  # type: ignore[override]
        """Make the part of the group that `except*` and `split` ask for."""
        return TasksFailedError(self.message, excs)

    def __str__(self) -> str:
        return self.message


class TaskTimeoutError(TraceMLError, TimeoutError):
    """A task ran longer than its timeout, or its Runtime's."""


class WaitTimeoutError(TraceMLError, TimeoutError):
    """A task, or all of them, had not ended when the time to wait was over."""


class NotCallableError(TraceMLError, TypeError):
    """What was submitted as a task cannot be called."""
