"""Hello message: identity of a peer and layout of its rows."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from traceml.clock import boot_id, clock_pair, monotonic_ns, process_start_ticks
from traceml.database import schema
from traceml.errors import ProtocolError
from traceml.ids import DEFAULT_PROJECT
from traceml.transport.folder_aggregator import folder_id

__all__ = ["WORLD_LIMIT", "Hello", "Role", "check_rank", "schemas"]

Role = Literal["rank", "agent", "client", "relay"]

_TEXT_LIMIT = 4096
# Twice what one aggregator serves at a frame per rank and second. Its windows take 400 MB for this many ranks.
WORLD_LIMIT = 65_536


def schemas() -> dict[str, Any]:
    """Return each table's layout as in the hello: `[[field, code], ...]`, or `"msgpack"` for a log."""
    return {name: table.layout for name, table in schema.TABLES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Identity of a peer; the aggregator trusts it after the proof of the token."""

    # `rank` sends rows; `agent` acts for a host; `client` sends commands; `relay` is the aggregator of a host, which
    # sends the rows of its ranks.
    role: Role = "client"
    # The job key (`ids.job_key`), equal for all ranks of a job. For a client the run of its commands, or "".
    run: str = ""
    rank: int = 0  # rank in the job; 0 for clients
    world_size: int = 1  # ranks in the job
    local_rank: int = 0  # rank on this host
    attempt: int = 0  # number of restarts by the job's launcher
    host: str = field(default_factory=socket.gethostname)  # name of this host
    pid: int = field(default_factory=os.getpid)  # process id
    # That process's start time in kernel ticks: (boot_id, pid, start_ticks) is unique.
    start_ticks: int = field(default_factory=lambda: process_start_ticks(os.getpid()) or 0)
    boot_id: str = field(default_factory=boot_id)  # this boot of the machine
    recorder: str = ""  # id of this recorder; a second recorder of a process numbers its rows from 0 again
    parent: str = ""  # for a forked child that only logs, the recorder of the rank that it belongs to
    spawned_by: str = ""  # for a rank in a child process, the recorder of its parent, which only starts the ranks
    run_id: str = ""  # the user's name for the run's folder, if any
    name: str = ""  # default name of the run
    project: str = DEFAULT_PROJECT  # the project that it belongs to
    command: str = field(default_factory=lambda: " ".join(sys.argv))  # the command line of the job
    flight: str = ""  # path of this rank's flight file, "" when it is not on a file system
    runs_dir: str = ""  # runs folder of this job, if only an aggregator of that folder may take it in
    # That folder's identity (`folder_aggregator.folder_id`), by default as it is when the hello is sent.
    runs_dir_id: list[Any] = field(default_factory=list)
    # Number of restarts that the job's launcher has left.
    restarts_left: int = field(default_factory=lambda: _restarts_left(os.environ))
    # Age of the process in milliseconds, if it runs the user's script, by `clock`; its run began so much earlier.
    script_ms: int = 0
    schemas: dict[str, Any] = field(default_factory=schemas)  # see `schemas()`
    # (monotonic_ns, epoch_ns) read together; (0, 0) if the peer sent anything else.
    clock: tuple[int, int] = field(default_factory=clock_pair)

    def to_message(self, version: int, nonce: bytes, proof: bytes) -> dict[str, Any]:
        """Return the message `hello`."""
        facts = asdict(self)
        for name in ("command", "name", "project"):
            facts[name] = facts[name][:_TEXT_LIMIT]

        if self.runs_dir and not self.runs_dir_id:
            facts["runs_dir_id"] = folder_id(Path(self.runs_dir))

        if self.script_ms:  # an aggregator may have been started since
            facts["script_ms"] += (monotonic_ns() - self.clock[0]) // 10**6

        return {"t": "hello", "v": version, "nonce": nonce, "mac": proof, **facts}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Self:
        """Validate a `hello` and return it; unknown keys are ignored.

        Raises:
            ProtocolError: a field is missing, of the wrong type, or out of range.
        """
        facts = {known.name: message[known.name] for known in fields(cls) if known.name in message}
        for name in ("role", "run", "rank", "world_size", "local_rank", "host", "pid", "schemas", "clock"):
            if name not in facts:
                raise ProtocolError(f"the hello lacks {name!r}")

        for name, value in facts.items():
            _check(name, value)

        clock = facts["clock"]
        facts["clock"] = tuple(clock) if isinstance(clock, (list, tuple)) else (0, 0)
        facts.setdefault("start_ticks", 0)
        facts.setdefault("boot_id", "")
        facts.setdefault("command", "")
        facts.setdefault("restarts_left", 0)
        check_rank(facts["rank"], facts["world_size"])
        return cls(**facts)


def check_rank(rank: int, world_size: int) -> None:
    """Check a rank before memory is taken for its world.

    Raises:
        ProtocolError: it is not in its world, or the world has more ranks than one aggregator takes.
    """
    if world_size > WORLD_LIMIT:
        raise ProtocolError(
            f"a job of {world_size:,} ranks is above the limit of {WORLD_LIMIT:,} of an aggregator: it cannot be "
            "traced. Turn tracing off by TRACEML_ENABLED=0"
        )

    if not 0 <= rank < world_size:
        raise ProtocolError(f"rank {rank} of {world_size} is not possible")


def _restarts_left(environ: Mapping[str, str]) -> int:
    """Return the number of restarts that torchrun has left, by its variables."""
    try:
        return max(0, int(environ["TORCHELASTIC_MAX_RESTARTS"]) - int(environ["TORCHELASTIC_RESTART_COUNT"]))
    except (KeyError, ValueError):
        return 0


def _check(name: str, value: object) -> None:
    if name == "clock" and not isinstance(value, (list, tuple)):
        return  # useful as a pair only, and no reason to refuse a peer

    wanted: Any = _TYPES.get(name, str)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ProtocolError(f"the hello's {name!r} is a {type(value).__name__}")

    if isinstance(value, str) and len(value) > _TEXT_LIMIT:
        raise ProtocolError(f"the hello's {name!r} has {len(value)} characters, above {_TEXT_LIMIT}")

    if isinstance(value, int) and not 0 <= value < 2**63:
        raise ProtocolError(f"the hello's {name!r} is out of range: {value}")

    if name == "role" and value not in get_args(Role):
        raise ProtocolError(f"the hello's role is {value!r}, not one of {', '.join(get_args(Role))}")

    if name == "clock" and not (len(value) == 2 and all(isinstance(item, int) for item in value)):  # type: ignore[arg-type, attr-defined]
        raise ProtocolError("the hello's 'clock' is not [monotonic_ns, epoch_ns]")


_NUMBERS = ("rank", "world_size", "local_rank", "attempt", "pid", "start_ticks", "restarts_left", "script_ms")
_LISTS = ("runs_dir_id", "clock")
_TYPES: dict[str, Any] = {**dict.fromkeys(_NUMBERS, int), **dict.fromkeys(_LISTS, (list, tuple)), "schemas": dict}
