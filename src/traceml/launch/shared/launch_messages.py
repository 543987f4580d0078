"""Messages between the processes of a launch: launcher, agent, zygote and workers, each declared once.

A field without a default is required. Others are sent only if the sender gives them. Both ends have the same files, as
the launcher sends its package to a host that has others: a field has one meaning, and no message has a version.

The tables at the end of `agent.agent` and `launcher.job.job_state` name the handler of each message of the channel;
those of the sockets on one host are taken where `FdSocket.receive` is called.

Structs of msgspec would check types too. But a host that is sent the package may have torch alone, and msgspec, which
is compiled, cannot be sent along. Dataclasses would take 12 ms of an agent's start.

Process: launcher, agent, zygote and workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypedDict, TypeVar, dataclass_transform

from traceml.errors import ProtocolError
from traceml.inspection.cgroups import OomPlace

__all__ = [
    "FROM_AGENT", "FROM_LAUNCHER", "AgentHello", "AskWorkers", "ChildEnded", "CollectStacks", "Done", "Exited",
    "FailedToFork", "Fork", "Forked", "GroupReady", "Idle", "JobMessage", "M", "Message", "PackageRequest", "Ping",
    "Pong", "Prepare", "Prepared", "Probe", "Probed", "Raised", "Release", "Reserve", "Reserved", "Snapshot",
    "StackThread", "Stacks", "StacksRequest", "Start", "Started", "StopWorkers", "StreamOpened", "ThreadStacks",
    "TracedRun", "Tunnel", "TunnelReady", "WorkerDone", "WorkerMayEnd", "WorkerPayload", "WorkerRaised", "WorkerReady",
    "WorkerStack", "ZygoteFailed", "ZygoteReady", "ZygoteSettings", "ZygoteUp", "decode",
]  # fmt: skip


@dataclass_transform(kw_only_default=True)
class Message:
    """A message: a map of its fields, and its name `t`. Subclasses declare the fields, as a dataclass does."""

    t: ClassVar[str]
    known: ClassVar[frozenset[str]] = frozenset()
    required: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, *, t: str) -> None:
        cls.t = t
        cls.known = cls.known.union(cls.__annotations__)
        cls.required = cls.required.union(name for name in cls.__annotations__ if name not in vars(cls))

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def to_map(self) -> dict[str, Any]:
        """Return the map that is sent."""
        return {"t": self.t, **vars(self)}

    @classmethod
    def received(cls, fields: Mapping[str, Any]) -> Self:
        """Return the message with these fields; unknown ones are ignored.

        Raises:
            ProtocolError: a required field is missing.
        """
        if missing := cls.required - fields.keys():
            raise ProtocolError(f"a message {cls.t!r} without {', '.join(sorted(missing))}")

        return cls(**{name: value for name, value in fields.items() if name in cls.known})


class JobMessage(Message, t=""):
    """A message about one job, between the launcher and an agent."""

    job: str


M = TypeVar("M", bound=Message)


def decode(fields: Mapping[str, Any], kinds: Iterable[type[M]]) -> M | None:
    """Return the message that a received map is; None if it is none of these kinds.

    Raises:
        ProtocolError: a required field is missing.
    """
    return next((kind.received(fields) for kind in kinds if kind.t == fields.get("t")), None)


# --- channel: both directions -----------------------------------------------------------------------------------------


class Ping(Message, t="ping"):
    """Question of a channel whose peer is silent; the peer's channel answers `Pong`."""


class Pong(Message, t="pong"):
    """Answer to `Ping`."""


class StreamOpened(Message, t="stream"):
    """Announcement of a stream of bytes, which follow in frames of their own.

    From the launcher: `payload`, the function and its arguments; `tunnel`, the answers of the aggregator. From the
    agent: `log`, output of a worker; `result` and `error`, pickled objects of a worker; `flight`, the flight file of a
    dead worker; `tunnel`, a connection of a rank.
    """

    id: int = 0  # set by the channel that opens it: odd numbers are the agent's
    kind: str
    job: str = ""
    rank: int = -1
    local_rank: int = -1
    fd: str = ""  # of a log: `out`, `err`, or `records` (of `logging`)
    size: int = 0  # bytes of a payload, result or error
    path: str | None = None  # of a memory file that holds these bytes; the stream has only an end then
    of: int = -1  # of an answer in a tunnel: the stream that it answers


# --- channel: launcher to agent ---------------------------------------------------------------------------------------


class Prepare(JobMessage, t="prepare"):
    """Request for a zygote that can make a job's workers, answered by `Prepared`."""

    env: dict[str, str]  # variables, over the agent's own
    is_whole: bool = False  # whether they are all that workers have, without the agent's
    env_file: str | None = None  # a file that bash sources first
    cwd: str
    sys_path: Sequence[str]  # folders that are searched for modules first
    need_torch: int  # whether torch is imported: 0 no, 1 if it is installed, 2 it must be installed
    main: dict[str, str | None] = {}  # noqa: RUF012 - not changed. Of the launcher's `__main__`, see `main_module`


class Tunnel(JobMessage, t="tunnel"):
    """Request of a port for ranks that leads to the aggregator, answered by `TunnelReady`."""


class Reserve(JobMessage, t="reserve"):
    """Request to the host of rank 0 for a port at which ranks meet, answered by `Reserved`."""

    address: str  # IP address of that host


class Probe(JobMessage, t="probe"):
    """Request to connect to the port at which ranks meet, answered by `Probed`."""

    address: str
    port: int


class TracedRun(TypedDict):
    """The run that a job is traced as."""

    run_id: str
    runs_dir: str
    flights: bool  # whether the agent looks for flight files, as the aggregator is on another host


class Start(JobMessage, t="start"):
    """Request to start a job's workers here. For each: `Started`, `GroupReady`, `Done` or `Raised`, `Exited`."""

    payload: int | None = None  # id of the stream with the function and its arguments
    shares_memory: bool = False  # whether launcher and agent can open each other's memory files
    script: Mapping[str, Any] | None = None  # instead of a function: `path` or `module`, and `argv`
    ranks: Sequence[int]  # of this host, by local rank
    world_size: int
    group_rank: int  # number of this host
    master_addr: str
    master_port: int
    backend: str | None = None  # None: no process group
    timeout_s: float  # for the process group
    env: dict[str, str] = {}  # noqa: RUF012 - not changed. Variables of tracing
    trace: TracedRun | None = None
    cpu_affinity: bool = True  # whether workers share out the cores
    log_level: int  # of the root logger


class Release(JobMessage, t="release"):
    """Permission for the workers to end: all ranks of the job have returned."""


class CollectStacks(JobMessage, t="stacks"):
    """Request of the workers' stacks, answered by `Stacks`."""


class AskWorkers(JobMessage, t="ask"):
    """Request to have the workers end by themselves, by SIGTERM; `StopWorkers` follows."""


class StopWorkers(JobMessage, t="stop"):
    """Request to end the workers and all that they have started, answered by `Idle`."""

    grace_s: float  # between SIGTERM and SIGKILL
    exit_s: float  # for exit handlers of workers that have returned or raised


# --- channel: agent to launcher ---------------------------------------------------------------------------------------


class PackageRequest(Message, t="package"):
    """Request for the package by a host that has other files; `launcher.hosts.bootstrap` makes the answer."""


class AgentHello(Message, t="hello"):
    """Description of an agent and its host, its first message."""

    mark: str  # the job's processes have it in their environment
    pid: int
    hostname: str
    python: str  # version
    executable: str
    cores: int
    address: str | None = None  # where ssh has reached the host
    peer: str | None = None  # where ssh came from
    boot_id: str
    netns: str  # network namespace
    addresses: Sequence[str]  # of all network interfaces
    can_reach_launcher: bool  # whether it can open files of the parent of its reaper: of a launcher on this host


class Prepared(JobMessage, t="prepared"):
    """Answer to `Prepare`: the zygote is ready, or `error`."""

    gpus: int  # that the job's workers see
    error: dict[str, str] | None = None  # `kind`, see `failures.preparation_failed`, and `text`
    env_file_log: str = ""  # output of the zygote and of env_file


class TunnelReady(JobMessage, t="tunnel_ready"):
    """Answer to `Tunnel`."""

    port: int  # 0: there is none, see `error`
    error: str = ""


class Reserved(JobMessage, t="reserved"):
    """Answer to `Reserve`: address and port, or `error`."""

    address: str = ""
    port: int = 0
    error: str = ""


class Probed(JobMessage, t="probed"):
    """Answer to `Probe`."""

    error: str  # empty if the port can be reached


class Started(JobMessage, t="started"):
    """A worker was forked."""

    rank: int
    pid: int


class GroupReady(JobMessage, t="group_ready"):
    """A worker is in the process group, or runs where there is none."""

    rank: int


class Done(JobMessage, t="done"):
    """A worker has returned, and its result has been sent. It runs until `Release`."""

    rank: int


class Raised(JobMessage, t="raised"):
    """A worker has raised an exception, which has been sent if it can be pickled. It runs until `StopWorkers`."""

    rank: int
    tail: Sequence[str]  # last lines of the worker's output
    type: str
    message: str
    traceback: str
    notes: Sequence[str]
    bases: Sequence[str]  # names of its class and of all bases


class Exited(JobMessage, t="exited"):
    """The process of a worker has ended."""

    rank: int
    local_rank: int
    pid: int | None  # None: it was never forked
    code: int | None  # exit status; None if a signal has ended it
    signal: int | None
    tail: Sequence[str]  # last lines of the worker's output
    crash: str  # faulthandler's stacks, after a signal of a crash
    oom: OomPlace | None  # where the kernel has killed for lack of memory meanwhile; None: not known


class WorkerStack(TypedDict):
    """Stacks of a worker's threads, the main thread's first, and the kernel's state of its process."""

    stack: str
    state: str
    wchan: str


class Stacks(JobMessage, t="stacks"):
    """Answer to `CollectStacks`."""

    ranks: dict[int, WorkerStack]


class Snapshot(JobMessage, t="snapshot"):
    """Snapshot of a traced worker whose recorder does not run."""

    rank: int
    pid: int
    snapshot: dict[str, Any]  # see `database.snapshots.rank_snapshot`
    traced: dict[str, Any]  # what its flight file says of the job: see `database.snapshots.silent_workers`


class Idle(JobMessage, t="idle"):
    """Nothing of the job is left on the host."""


# --- sockets on one host: agent and zygote ----------------------------------------------------------------------------


class ZygoteSettings(Message, t="settings"):
    """First message to a zygote."""

    parent: int  # pid of the agent
    mark: str  # see `AgentHello`
    sys_path: Sequence[str]
    need_torch: int  # see `Prepare`


class Fork(Message, t="fork"):
    """Request to the zygote for a worker, with its descriptors; answered by `Forked` or `FailedToFork`."""

    rank: int
    env: dict[str, str]  # variables, over the zygote's
    unset: Sequence[str]  # variables to remove
    cwd: str
    sys_path: Sequence[str]
    main: dict[str, str | None]
    interface: str | None  # network interface towards rank 0
    backend: str | None
    timeout_s: float
    script: Mapping[str, Any] | None
    log_level: int
    is_traced: bool
    cores: Sequence[int]  # to run on; empty: all
    threads: int | None  # of torch; None: its own choice


class ZygoteUp(Message, t="up"):
    """Python runs in the zygote."""


class ZygoteReady(Message, t="ready"):
    """Modules are imported in the zygote."""

    gpus: str | None  # which torch was built for: `cuda`, `hip`, or none (empty); None: it is not imported
    cuda_visible_devices: str | None  # as env_file has set it


class ZygoteFailed(Message, t="failed"):
    """Modules cannot be imported in the zygote."""

    kind: str  # `no_torch` or `import`
    text: str


class Forked(Message, t="forked"):
    """Answer to `Fork`."""

    rank: int
    pid: int


class FailedToFork(Message, t="failed_to_fork"):
    """Answer to `Fork`."""

    rank: int
    text: str


class ChildEnded(Message, t="ended"):
    """A child of the zygote has ended."""

    pid: int
    status: int  # as `waitpid` returns it


# --- sockets on one host: agent and worker ----------------------------------------------------------------------------


class WorkerPayload(Message, t="payload"):
    """The function and its arguments, in a memory file whose descriptor comes along."""


class WorkerMayEnd(Message, t="release"):
    """Permission for a worker to end."""

    failed: bool = False  # the job is stopped: not all ranks will leave the process group


class WorkerReady(Message, t="ready"):
    """The worker is in the process group, or runs where there is none."""


class WorkerDone(Message, t="done"):
    """The worker has returned; its result is in a memory file whose descriptor comes along."""


class WorkerRaised(Message, t="raised"):
    """The worker has raised an exception; a memory file comes along if it can be pickled. Fields: see `Raised`."""

    type: str
    message: str
    traceback: str
    notes: Sequence[str]
    bases: Sequence[str]


class StacksRequest(Message, t="stacks"):
    """Request of stacks to the thread of a worker that reports them."""


class StackThread(Message, t="thread"):
    """First message of that thread."""

    tid: int  # native id


class ThreadStacks(Message, t="stacks"):
    """Answer to `StacksRequest`."""

    text: str  # in faulthandler's format


FROM_LAUNCHER: Sequence[type[Message]] = (
    Ping, Pong, StreamOpened, Prepare, Tunnel, Reserve, Probe, Start, Release, CollectStacks, AskWorkers, StopWorkers,
)  # fmt: skip
FROM_AGENT: Sequence[type[Message]] = (
    Ping, Pong, StreamOpened, PackageRequest, AgentHello, Prepared, TunnelReady, Reserved, Probed, Started, GroupReady,
    Done, Raised, Exited, Stacks, Snapshot, Idle,
)  # fmt: skip
