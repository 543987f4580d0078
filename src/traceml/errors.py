"""Errors of the package, as one tree.

TraceMLError
├── SettingsError                 (ValueError)     a setting has an unknown name or a bad value
├── AggregatorUnavailableError    (ConnectionError) no aggregator answered within the time allowed
├── AggregatorRefusedError        (ConnectionError) an aggregator answered and refused: token, version, limits
│   └── AggregatorForeignError                     it belongs to another user or another host: its token is unknown
├── ProtocolError                 (ValueError)     bytes on the wire of another protocol or version
├── RunNotFoundError              (LookupError)    no run of the given name or path
├── StoreError                    (OSError)        a run's store cannot be written or read
│   ├── StoreBusyError                             another aggregator is writing it
│   ├── TableNotFoundError        (KeyError)       it has no such table
│   └── StoreVersionError                          its format is that of another version of traceml
├── UsageError                    (ValueError)     wrong arguments of a command or a function
├── ArgumentTypeError             (TypeError)      an argument of a function has a type that it cannot take
├── FileUnreadableError           (OSError)        a file that is to be logged cannot be read
│   ├── FileMissingError          (FileNotFoundError) there is none of its name
│   └── FileForbiddenError        (PermissionError) this process may not read it
├── WorkerFailedError             (RuntimeError)   a launched worker ended by a signal or an exit code
├── AgentFailedError              (RuntimeError)   a host of a launch cannot be used, or was lost
├── LaunchTimeoutError            (TimeoutError)   a launch did not start within its timeout
├── PayloadError                  (TypeError)      an argument or a result of a launch cannot be pickled
├── SlurmError                    (RuntimeError)   Slurm was requested, without a readable allocation
├── ResultNotFoundError           (IndexError, KeyError) a launch has no such rank, host or local rank
├── RemoteTracebackError                           cause of a worker's exception: its remote traceback
├── TraceNotFoundError            (LookupError)    no trace file of the given name
├── TraceEmptyError               (ValueError)     a trace without a readable event
├── TraceInvalidError             (ValueError)     a trace, or its description, is not what the simulation needs
├── PluginError                   (LookupError, ValueError) a plugin is missing, broken, or configured wrongly
├── TaskError                     (RuntimeError)   a task cannot run, or will never have a result
│   ├── RuntimeClosedError                         its Runtime is shut down
│   ├── TaskCancelledError                         it was cancelled before it started
│   ├── TaskDeadlockError                          tasks wait for each other
│   ├── TaskForkedError                            it belongs to the process that this one was forked from
│   └── TasksFailedError          (ExceptionGroup) the exceptions of all failed tasks
├── TaskTimeoutError              (TimeoutError)   a task ran longer than its timeout
├── WaitTimeoutError              (TimeoutError)   a task had not ended within the time to wait
├── NotCallableError              (TypeError)      an object submitted as a task is not callable
└── BackendError                  (RuntimeError)   a tracker did not accept its rows
    ├── BackendUnauthorizedError  (PermissionError) it does not accept our credentials (401, 403)
    ├── BackendBusyError          (RuntimeError)   it asks to retry later (429, 503)
    └── BackendRefusedError       (ValueError)     it will never accept these rows: a bad name or value
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from traceml.loopback import is_loopback
from traceml.process_ends import exit_text

__all__ = [
    "AgentFailedError",
    "AggregatorForeignError",
    "AggregatorRefusedError",
    "AggregatorUnavailableError",
    "ArgumentTypeError",
    "BackendBusyError",
    "BackendError",
    "BackendRefusedError",
    "BackendUnauthorizedError",
    "FileForbiddenError",
    "FileMissingError",
    "FileUnreadableError",
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
    "StoreBusyError",
    "StoreError",
    "StoreVersionError",
    "TableNotFoundError",
    "TaskCancelledError",
    "TaskDeadlockError",
    "TaskError",
    "TaskForkedError",
    "TaskTimeoutError",
    "TasksFailedError",
    "TraceEmptyError",
    "TraceInvalidError",
    "TraceMLError",
    "TraceNotFoundError",
    "UsageError",
    "WaitTimeoutError",
    "WorkerFailedError",
]

_SHOWN_LINES = 20  # of a worker's log in an error's text; `log_tail` has all


class TraceMLError(Exception):
    """Base of every error that traceml raises on purpose.

    Examples:
        >>> try:
        ...     traceml.load_run("no-such-run")
        ... except traceml.TraceMLError as error:
        ...     print(type(error).__name__)
        RunNotFoundError
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args), vars(self)  # the default calls the class, which takes other arguments


def _rebuilt(kind: type[TraceMLError], args: tuple[Any, ...]) -> TraceMLError:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class SettingsError(TraceMLError, ValueError):
    """A setting has an unknown name or a value that is not allowed.

    Args:
        key: the setting, as written by the user.
        problem: the mistake.
        source: source of the value: `argument`, an environment variable's name, or a file's path.
        allowed: the accepted values; empty where `meant` tells all.
        meant: what the user may have meant, as a sentence.
    """

    def __init__(self, key: str, problem: str, *, source: str, allowed: str = "", meant: str = "") -> None:
        origin = "" if source == key else f" (from {source})"  # a variable is both
        super().__init__(
            " ".join(filter(None, (f"{key}: {problem}{origin}.", meant, allowed and f"Allowed: {allowed}")))
        )
        self.key, self.problem, self.source, self.allowed = key, problem, source, allowed


class AggregatorUnavailableError(TraceMLError, ConnectionError):
    """No aggregator answered at the address within the time allowed, or one could not take this process in yet.

    Attributes:
        is_local: whether the job was to start its own.
    """

    is_local = False

    def __init__(self, host: str, port: int, waited_s: float, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.host, self.port, self.waited_s, self.reason, self.refused = host, port, waited_s, reason, refused

    def __str__(self) -> str:
        return self._refusal_text() if self.refused else self._silence_text()

    def _refusal_text(self) -> str:
        reason = self.reason.rstrip(".")
        return (
            f"the traceml aggregator at {self.host}:{self.port} cannot accept this process: {reason}. "
            "To train without tracing, set TRACEML_ENABLED=0."
        )

    def _silence_text(self) -> str:
        own = "" if self.is_local else "let this job start its own with traceml.init(local=True), "
        slow = "" if is_loopback(self.host) else "give a slow network more time with TRACEML_CONNECT_TIMEOUT, "
        return (
            f"no traceml aggregator answered at {self.host}:{self.port} within {self.waited_s:.1f} s "
            f"(last try: {self.reason}). Start one with `traceml serve`, {own}{slow}or turn tracing off with "
            "TRACEML_ENABLED=0."
        )


class AggregatorRefusedError(TraceMLError, ConnectionError):
    """An aggregator answered and refused this peer; a retry would not help."""

    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(f"the traceml aggregator at {host}:{port} refused the connection: {why}")
        self.host, self.port, self.why = host, port, why


class AggregatorForeignError(AggregatorRefusedError):
    """An aggregator of another user or another host answered, whose token is not known."""


class ProtocolError(TraceMLError, ValueError):
    """Bytes on the wire belong to another protocol or another version."""


class RunNotFoundError(TraceMLError, LookupError):
    """There is no run of the given name or path."""


class StoreError(TraceMLError, OSError):
    """A run's store cannot be written or read."""


class StoreBusyError(StoreError):
    """A run's store is being written by another aggregator."""


class TableNotFoundError(StoreError, KeyError):
    """A run's store has no such table."""

    __str__ = Exception.__str__  # KeyError shows the repr of its text


class StoreVersionError(StoreError):
    """A run's store has the format of another version of traceml."""

    def __init__(self, path: object, version: int, newest: int) -> None:
        self.is_newer = version > newest
        super().__init__(
            f"the run's store {path} has format {version}, this traceml reads {newest}. "
            f"Use {'a newer' if self.is_newer else 'the older'} traceml for this run."
        )


class UsageError(TraceMLError, ValueError):
    """A command or a function got wrong arguments; the text is one line and a hint."""


class ArgumentTypeError(TraceMLError, TypeError):
    """An argument of a function has a type that it cannot take."""


class FileUnreadableError(TraceMLError, OSError):
    """A file that is to be logged cannot be read, or is none."""


class FileMissingError(FileUnreadableError, FileNotFoundError):
    """There is no file of the name that is to be logged."""


class FileForbiddenError(FileUnreadableError, PermissionError):
    """This process may not read the file that is to be logged."""


class TraceNotFoundError(TraceMLError, LookupError):
    """There is no trace file of the given name."""


class TraceEmptyError(TraceMLError, ValueError):
    """Files were read as traces and contain no event."""


class TraceInvalidError(TraceMLError, ValueError):
    """A trace, or the file that describes it, does not have what the simulation needs."""


class WorkerFailedError(TraceMLError, RuntimeError):
    """A worker of a launch ended without a result and without an exception of its own.

    Attributes:
        host: the host's name, as the user wrote it.
        rank: the worker's rank in the job.
        local_rank: its rank on the host.
        exit_code: its exit code, None when a signal ended it.
        signal: the number of the signal that ended it, None when it exited by itself.
        log_tail: its last output lines, oldest first.
        oom: whether the kernel killed it for lack of memory.
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
            how = exit_text(exit_code, signal)

        text = f"rank {rank} (local rank {local_rank} on {host}) {how}"
        if oom:
            text += ": its host was out of memory. Use fewer workers per host, or less memory in each"

        shown = list(log_tail)[-_SHOWN_LINES:]
        words = "\n".join(("Its last lines:", *_indented(shown))) if shown else "It wrote nothing."
        super().__init__(f"{text}. {words}")
        self.host, self.rank, self.local_rank = host, rank, local_rank
        self.exit_code, self.signal, self.oom, self.how = exit_code, signal, oom, how
        self.log_tail = list(log_tail)


class AgentFailedError(TraceMLError, RuntimeError):
    """A host of a launch cannot be used, or was lost during the launch.

    Attributes:
        host: the host's name, as the user wrote it.
        reason: the cause, in a few words.
        advice: a remedy.
        words: the last lines from ssh, srun or the agent.
    """

    def __init__(self, host: str, reason: str, *, advice: str = "", words: Sequence[str] = ()) -> None:
        text = f"host {host}: {reason}."
        if advice:
            text += f" {advice}"

        if words:
            text += "\n" + "\n".join(_indented(words))

        super().__init__(text)
        self.host, self.reason, self.advice, self.words = host, reason, advice, list(words)


class LaunchTimeoutError(TraceMLError, TimeoutError):
    """A launch did not get all its workers started within its time.

    Attributes:
        timeout_s: the timeout in seconds.
        absent: missing hosts, or ranks with their hosts.
    """

    def __init__(self, timeout_s: float, doing: str, absent: Sequence[str]) -> None:
        missing = "; ".join(absent)
        super().__init__(f"{doing} took longer than the timeout of {timeout_s:g} s. Still waiting for: {missing}")
        self.timeout_s, self.doing, self.absent = timeout_s, doing, list(absent)


class PayloadError(TraceMLError, TypeError):
    """An argument, a function or a result of a launch cannot be sent: it names the object that cannot be pickled."""


class SlurmError(TraceMLError, RuntimeError):
    """Slurm was requested, but there is no readable allocation."""


class ResultNotFoundError(TraceMLError, IndexError, KeyError):
    """A launch has no such rank, host or local rank."""

    __str__ = Exception.__str__  # KeyError shows the repr of its text


class RemoteTracebackError(TraceMLError):
    """Traceback of an exception in its worker; `__cause__` of the exception that `launch` raises."""

    def __init__(self, text: str) -> None:
        super().__init__("\n" + text.strip("\n"))
        self.text = text


def _indented(lines: Sequence[str]) -> list[str]:
    from traceml.formatting import printable  # here, as `import traceml` needs no regular expressions

    return [f"  {printable(line)}" for line in lines]


class PluginError(TraceMLError, LookupError, ValueError):
    """A plugin is missing, cannot be loaded, or is configured wrongly."""


class BackendError(TraceMLError, RuntimeError):
    """A tracker did not accept its rows; base of the errors that delivery distinguishes."""


class BackendUnauthorizedError(BackendError, PermissionError):
    """A tracker does not accept our credentials."""


class BackendBusyError(BackendError):
    """A tracker asks to retry later.

    Args:
        why: its answer.
        retry_after_s: seconds to wait, if it gave them.
    """

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class BackendRefusedError(BackendError, ValueError):
    """A tracker will never accept these rows: a retry would not help."""


class TaskError(TraceMLError, RuntimeError):
    """A task cannot run, or will never have a result; base of the causes."""


class RuntimeClosedError(TaskError):
    """A task was submitted to a Runtime that is shut down."""


class TaskCancelledError(TaskError):
    """A task was cancelled."""


class TaskDeadlockError(TaskError):
    """A wait would never end: the awaited task can only end after the waiting one."""


class TaskForkedError(TaskError):
    """A task belongs to the process that this one was forked from, and cannot end here."""


class TasksFailedError(TaskError, ExceptionGroup[Exception]):
    """Tasks failed: `exceptions` holds what each raised, with its traceback, in the order of failure.

    Examples:
        >>> with traceml.Runtime() as runtime:
        ...     tasks = [runtime.submit(int, text) for text in ("1", "x")]
        ...     try:
        ...         runtime.wait_all(raise_on_error=True)
        ...     except traceml.TasksFailedError as error:
        ...         print(error.exceptions)
        (ValueError("invalid literal for int() with base 10: 'x'"),)
    """

    def __new__(cls, message: str, excs: Sequence[Exception]) -> Self:
        """Make a group; without this, what unpickles one would find the method of RuntimeError."""
        return ExceptionGroup.__new__(cls, message, excs)

    def derive(self, excs: Sequence[Exception]) -> TasksFailedError:  # type: ignore[override]
        """Return a subgroup, for `except*` and `split`."""
        return TasksFailedError(self.message, excs)

    def __str__(self) -> str:
        return self.message


class TaskTimeoutError(TraceMLError, TimeoutError):
    """A task ran longer than its timeout, or its Runtime's."""


class WaitTimeoutError(TraceMLError, TimeoutError):
    """A task, or all of them, had not ended within the time to wait."""


class NotCallableError(TraceMLError, TypeError):
    """An object submitted as a task is not callable."""
