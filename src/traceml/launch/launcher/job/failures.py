"""Failures of workers and hosts, and the exception that `launch` raises for them."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from traceml.errors import AgentFailedError, RemoteTracebackError, WorkerFailedError
from traceml.formatting import capitalized, ranks_text
from traceml.launch.launcher.job.job_host import JobHost, Worker
from traceml.launch.shared import payload
from traceml.launch.shared.launch_messages import Exited, Raised, WorkerStack
from traceml.launch.shared.payload_buffer import PayloadBuffer

__all__ = [
    "JobFailure",
    "first_cause",
    "note_stacks",
    "preparation_failed",
    "unreachable",
    "worker_died",
    "worker_hung",
    "worker_raised",
]

# Errors of a collective when another worker is gone or late.
_SECONDARY = re.compile(
    r"[Cc]onnection (was )?(closed|reset) by|Broken pipe|connectFullMesh|DistBackendError|DistNetworkError"
    r"|ncclRemoteError|[Ss]ocket [Tt]imeout|[Tt]imed out waiting|recvValue failed|TCPStore|wait timeout|failed to recv"
)
_IN_COLLECTIVE = re.compile(r'File "[^"]*torch/distributed/')
_INNERMOST_FRAMES = 12
# Exceptions that would end the launcher if they were raised here.
_NOT_RAISED = frozenset(
    {"builtins.KeyboardInterrupt", "builtins.GeneratorExit", "builtins.SystemExit", "asyncio.exceptions.CancelledError"}
)
_LAST_LINES = 5
# A harmless warning of torch, the first output of each worker where addresses have no names.
_NO_REVERSE_DNS = "[c10d] The hostname of the client socket cannot be retrieved"
_THREAD = re.compile(r"^((?:Current t|T)hread) 0x[0-9a-f]+")
# A thread of the recorder: the frame next to the thread's own is ours.
_OUR_THREAD = re.compile(
    r'File "[^"]*/traceml/[^"]*", line \d+ in \w+\n  File "[^"]*threading\.py", line \d+ in run$', re.MULTILINE
)
_OURS = re.compile(r'File "[^"]*traceml/(launch/worker/worker_main|session/script)\.py"')


class JobFailure:
    """The failure of one worker or one host.

    Args:
        error: the exception to raise, or a function that makes it: loading one may import torch, and only one of all
            is raised.
        secondary: whether it looks like the consequence of another worker's failure.
        rank: the worker's; None for a host's failure.
    """

    def __init__(
        self, error: BaseException | Callable[[], BaseException], secondary: bool = False, rank: int | None = None
    ) -> None:
        self.secondary, self.rank = secondary, rank
        self._error = error

    @property
    def error(self) -> BaseException:
        """The exception to raise for it."""
        if not isinstance(self._error, BaseException):
            self._error = self._error()

        return self._error

    def explains(self, error: BaseException) -> bool:
        """Return whether `error` was raised for it and is not a consequence of another failure."""
        return self._error is error and not self.secondary


def first_cause(failures: Iterable[JobFailure]) -> BaseException:
    """Return the error of the first failure that is not the consequence of another."""
    found = list(failures)
    return next((failure for failure in found if not failure.secondary), found[0]).error


def worker_raised(worker: Worker, message: Raised, received: PayloadBuffer | None) -> JobFailure:
    """Return the failure for a worker's exception, with its host, rank and traceback.

    Args:
        received: the pickled exception, None if it could not be pickled.
    """
    kind, text = message.type.removeprefix("builtins."), message.message
    trace, bases = message.traceback, message.bases

    def error() -> BaseException:
        if not _NOT_RAISED.isdisjoint(bases):
            how = f"raised {kind}" + (f": {text}" if text else "")
            found: BaseException = _failed(worker, how=how, exit_code=1, log_tail=_shown(message.tail))
        else:
            found = _loaded(received) or _substitute_exception(kind, text, bases, message.notes)

        found.__cause__ = RemoteTracebackError(trace) if trace else None
        found.add_note(f"Raised on {worker}, pid {worker.pid}.")
        return found

    return JobFailure(error, bool(_SECONDARY.search(f"{kind}: {text}")), worker.rank)


def worker_died(worker: Worker, message: Exited) -> JobFailure:
    """Return the failure for a worker that ended without a result."""
    tail = _shown(message.tail)
    error = _failed(worker, exit_code=message.code, signal=message.signal, log_tail=tail, oom=bool(message.oom))
    # a script's exception is in its last lines of output
    secondary = not message.signal and bool(_SECONDARY.search("\n".join(tail[-_LAST_LINES:])))
    return JobFailure(error, secondary, worker.rank)


def worker_hung(worker: Worker) -> JobFailure:
    """Return the failure for the first worker of a job that hangs and cannot end itself."""
    how = "has not ended: the job hangs, and on_hang is abort"
    return JobFailure(_failed(worker, how=how, exit_code=1), rank=worker.rank)


def _failed(worker: Worker, **facts: Any) -> WorkerFailedError:
    return WorkerFailedError(worker.host.name, worker.rank, worker.local_rank, **facts)


def preparation_failed(host: JobHost, error: Mapping[str, Any]) -> AgentFailedError:
    """Return the error for a host whose zygote cannot be started."""
    python = host.hello.executable if host.hello is not None else ""
    what, advice = {
        "no_torch": (
            "torch is not installed there",
            f"Install it for {python}, or pass backend=None for functions that need no process group.",
        ),
        "env_file": ("env_file cannot be sourced there", "It must exist on each host, and be a script for bash."),
        "cwd": (
            "the working directory does not exist there",
            "Workers run in the launcher's working directory: it must exist on each host.",
        ),
        "import": ("torch cannot be imported there", ""),
        "died": ("the process that imports torch died there", ""),
    }.get(str(error.get("kind")), ("it cannot be prepared", ""))
    return AgentFailedError(host.name, what, advice=advice, words=str(error.get("text") or "").splitlines())


def unreachable(host: JobHost, hosts: Sequence[JobHost], rendezvous: tuple[str, int], error: str) -> AgentFailedError:
    """Return the error for a host from which the address where the ranks meet cannot be reached."""
    address, port = rendezvous
    names = " ".join(each.name for each in hosts)
    return AgentFailedError(
        host.name,
        f"it cannot connect to {hosts[0].name} at {address}:{port}, where the ranks meet: {error}",
        advice="All hosts must reach the first one, at any port: check routes and firewalls. "
        f"`traceml doctor --hostnames {names}` tests the network.",
    )


def note_stacks(
    error: BaseException,
    waiting: Iterable[Worker],
    stacks: Mapping[int, WorkerStack],
    timed_out: Iterable[int] = (),
) -> None:
    """Add a note to an error: the stack of each worker, and the workers that the others waited for."""
    workers = list(waiting)
    if not workers:
        return

    texts = {worker.rank: stacks[worker.rank]["stack"] if worker.rank in stacks else "" for worker in workers}
    innermost = {rank: "\n".join(text.splitlines()[:_INNERMOST_FRAMES]) for rank, text in texts.items()}
    inside = {rank for rank, text in innermost.items() if _IN_COLLECTIVE.search(text)} | set(timed_out)
    outside = [worker for worker in workers if worker.rank not in inside]
    lines = _who_waited(inside, outside, {rank for rank, text in texts.items() if not text}) if inside else []

    together: dict[str, list[Worker]] = {}
    for worker in workers:
        together.setdefault(_where(stacks.get(worker.rank)), []).append(worker)

    for where, those in together.items():
        if len(those) == 1:
            lines.append(f"{those[0]}{where}")
        else:
            lines.append(ranks_text({worker.rank for worker in those}) + _where(stacks.get(those[0].rank), many=True))

    error.add_note("\n".join(lines))


def _who_waited(inside: Collection[int], outside: Sequence[Worker], unknown: Collection[int]) -> list[str]:
    """Return which ranks waited in a collective, and for whom; of ranks without a stack it is not known.

    Args:
        inside: ranks that waited.
        outside: the other workers that had not ended.
        unknown: ranks that reported no stack.
    """
    waited = f"{capitalized(ranks_text(inside))} {'was' if len(inside) == 1 else 'were'} waiting in a collective"
    absent = [worker for worker in outside if worker.rank not in unknown]
    if absent:
        return [f"{waited} that these ranks had not entered: {'; '.join(map(str, absent))}."]

    if outside:
        return [f"{waited}. Whether these ranks had entered it is not known: {'; '.join(map(str, outside))}."]

    return []


def _where(stack: WorkerStack | None, *, many: bool = False) -> str:
    """Return a worker's stack without the frames that called the user's function; `many` workers have the same."""
    have, host, process, were = (
        ("have", "the host of each does", "their processes are", "were")
        if many
        else ("has", "its host does", "its process is", "was")
    )
    if stack is None:
        return f" {have} reported no stack: {host} not answer."

    if not stack["stack"]:
        return f" {have} reported no stack: {process} {stack['state'] or 'silent'}."

    threads = stack["stack"].strip("\n").split("\n\n")
    text = "\n\n".join(thread for thread in threads if not _OUR_THREAD.search(thread))
    lines = [_THREAD.sub(r"\1", line) for line in text.splitlines()]
    ours = next((i for i, line in enumerate(lines) if _OURS.search(line)), len(lines))
    rest = next((i for i in range(ours, len(lines)) if not lines[i].startswith("  ")), len(lines))
    return f" {were} here:\n" + "\n".join(lines[: max(ours, 2)] + lines[rest:])


def _loaded(received: PayloadBuffer | None) -> BaseException | None:
    if received is None or not received.complete:
        return None

    try:
        error = payload.load(received.memory(), what="the exception")
    except Exception:  # noqa: BLE001 - its class may be missing here or fail to be made: then its text is used
        return None

    return error if isinstance(error, BaseException) else None


def _substitute_exception(kind: str, text: str, bases: Iterable[str], notes: Iterable[str]) -> BaseException:
    """Return an exception of the nearest built-in class, for one that cannot be loaded here."""
    error = _nearest(kind, text, bases)
    for note in notes:
        error.add_note(note)

    return error


def _nearest(kind: str, text: str, bases: Iterable[str]) -> BaseException:
    for base in [kind, *bases]:
        found = getattr(builtins, base.removeprefix("builtins."), None)
        if not (isinstance(found, type) and issubclass(found, BaseException)):
            continue

        try:
            return found(text if found.__name__ == kind else f"{kind}: {text}")
        except TypeError:  # it needs more arguments than a text
            continue

    return RuntimeError(f"{kind}: {text}")


def _shown(tail: Iterable[str]) -> list[str]:
    """Return a worker's last lines, without a harmless warning, and in a crash's stacks without our threads."""
    lines = [line for line in tail if _NO_REVERSE_DNS not in line]
    parts = "\n".join(lines).split("\n\n")
    kept = [part for part in parts if not (_THREAD.match(part) and _OUR_THREAD.search(part))]
    return "\n\n".join(kept).split("\n") if lines else []
