"""State of the hosts and workers of one job, as the launcher knows it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from traceml.launch.launcher.hosts.agent_connection import AgentConnection
from traceml.launch.launcher.hosts.hosts import HostSpec
from traceml.launch.shared.launch_messages import AgentHello, Prepared
from traceml.launch.shared.payload_buffer import PayloadBuffer

__all__ = ["JobHost", "Worker", "rendezvous_address"]


@dataclass(slots=True, eq=False)
class Worker:
    """One worker: one rank."""

    rank: int
    local_rank: int
    host: JobHost
    pid: int | None = None  # its process on its host, None before it started
    ready: bool = False  # whether it has joined the process group, or started where there is none
    done: bool = False  # whether it has returned, and its result is complete here
    ended: bool = False  # whether its process has ended
    result: PayloadBuffer | None = None  # the bytes it sends: its result, or its exception

    def __str__(self) -> str:
        return f"rank {self.rank} (local rank {self.local_rank} on {self.host.name})"


@dataclass(slots=True, eq=False)
class JobHost:
    """One host of a job."""

    spec: HostSpec
    key: Hashable  # the key under which its agent is kept after the job
    start: Callable[[], AgentConnection]  # makes a new connection to it
    connection: AgentConnection
    warm: bool = False  # whether its agent was kept from an earlier job and has not answered in this one
    prepared: Prepared | None = None  # the agent's message that its zygote is ready, or why it is not
    workers: list[Worker] = field(default_factory=list)
    started: bool = False  # whether it was asked to start workers
    idle: bool = False  # whether nothing of the job is left there
    lost: bool = False  # whether its agent is out of reach

    @property
    def name(self) -> str:
        """The host's name, as the user wrote it."""
        return self.spec.name

    @property
    def hello(self) -> AgentHello | None:
        """The agent's description of itself and its host; None until it has answered."""
        return self.connection.hello

    @property
    def size(self) -> int:
        """The number of workers on the host; known once it is prepared."""
        assert self.hello is not None
        assert self.prepared is not None
        return self.spec.workers or self.prepared.gpus or self.spec.cpu_workers or self.hello.cores

    @property
    def late_text(self) -> str:
        """The host, its current activity, and a command that shows why it takes long."""
        return f"host {self.name} ({self.activity}; try `{self.connection.by_hand}`)"

    @property
    def activity(self) -> str:
        """The host's current activity, for logs."""
        if self.lost or self.idle:
            return "lost" if self.lost else "idle"

        if not self.hello:
            return "starting the agent" if self.connection.channel.greeted else "connecting"

        if not self.started:
            return "preparing" if self.prepared is None else "prepared"

        ended, ready, done = (sum(getattr(w, name) for w in self.workers) for name in ("ended", "ready", "done"))
        count = len(self.workers)
        if ended:
            return f"{ended} of {count} workers ended"

        return f"{done} of {count} workers returned" if done else f"{ready} of {count} workers ready"


def rendezvous_address(hosts: list[JobHost]) -> str:
    """Return the IP address of rank 0's host at which all others reach it. A name might resolve differently there."""
    first, others = hosts[0], hosts[1:]
    if all(_same_machine(first, other) for other in others):
        return "127.0.0.1"

    for address in _candidates(first, others):
        if address and not address.startswith("127.") and address != "::1":
            return address

    return "127.0.0.1"


def _same_machine(one: JobHost, other: JobHost) -> bool:
    """Return whether two agents share one kernel and one network."""
    if one.spec.transport == other.spec.transport == "local":
        return True

    return _identity(one) == _identity(other)


def _identity(host: JobHost) -> tuple[str, str, Sequence[str]]:
    assert host.hello is not None
    return host.hello.boot_id, host.hello.netns, host.hello.addresses


def _candidates(first: JobHost, others: list[JobHost]) -> Iterator[str | None]:
    hello, hellos = first.hello, [other.hello for other in others if other.hello is not None]
    assert hello is not None
    # of hosts that our ssh reaches only: Slurm passes on the variable of the user's own session
    if first.spec.transport == "ssh":
        yield hello.address  # where ssh reached it
    elif first.spec.transport == "local":
        yield from (other.hello.peer for other in others if other.spec.transport == "ssh" and other.hello)

    own = [address for address in hello.addresses if not address.startswith("127.")]
    theirs = [address for other in hellos for address in other.addresses]
    yield from sorted(own, key=lambda address: -max((_common_prefix(address, each) for each in theirs), default=0))


def _common_prefix(one: str, other: str) -> int:
    """Return the number of leading parts that two addresses have in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
