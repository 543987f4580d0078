"""Who this recorder is: its rank, its job, and what it says of them in the hello and in its flight file."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from traceml.clock import process_start_ticks
from traceml.ids import RankIdentity, detect_rank, group_address, job_key, launcher_job
from traceml.privacy import secrets_only
from traceml.settings import Config
from traceml.transport.hello import Hello

__all__ = ["Identity", "SpawnedFrom", "forget_children", "identify", "spawned_from", "tell_children"]

_PARENT = "TRACEML_PARENT"
_spawned: SpawnedFrom | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """One life of one recorder. Rows are numbered from 0 in it.

    Args:
        recorder: tells this life from any other of the same process.
        job: what the ranks of a job find each other's run by.
        rank_identity: rank, world size, local rank, attempt.
        parent: of a forked child that only logs: the recorder of the rank that it belongs to.
        provisional: whether the rank is still to be told, by a process group that this child of a process will join.
    """

    recorder: str
    job: str
    rank_identity: RankIdentity
    provisional: bool
    parent: str = ""

    def hello(self, config: Config, flight: Path | None) -> Hello:
        """Return what is told to the aggregator."""
        own = self.rank_identity
        return Hello(
            role="rank",
            run=self.job,
            rank=own.rank,
            world_size=own.world_size,
            local_rank=own.local_rank,
            attempt=own.attempt,
            recorder=self.recorder,
            parent=self.parent,
            run_id=config.run_id or "",
            name=config.run_name or script_name(),
            project=config.project,
            command=_command()[:4000],
            flight=str(flight or ""),
        )

    def of_child(self, *, provisional: bool = False) -> Identity:
        """Return who a child of this process is: it logs for the same rank of the same job.

        Args:
            provisional: whether it may become a rank itself; a forked one does not.
        """
        return replace(
            self, recorder=secrets.token_hex(8), provisional=provisional, parent=self.parent or self.recorder
        )

    def probe(self) -> Hello:
        """Return the hello of somebody who only asks whether the aggregator is there."""
        return Hello(role="client", run=self.job)

    def facts(self, config: Config) -> dict[str, Any]:
        """Return what the flight file says of its writer."""
        own = self.rank_identity
        return {
            "name": config.run_name or script_name(),
            "project": config.project,
            "run_id": config.run_id or "",
            "runs_dir": str(config.runs_dir.absolute()),
            "job": self.job,
            "rank": own.rank,
            "world_size": own.world_size,
            "local_rank": own.local_rank,
            "attempt": own.attempt,
            "host": socket.gethostname(),
            "recorder": self.recorder,
            "parent": self.parent,
        }


@dataclass(frozen=True, slots=True)
class SpawnedFrom:
    """What a child that `multiprocessing` spawned knows of its parent.

    Args:
        identity: who the parent is.
        settings: where it records: settings for `load`.
        experiment: number of the experiment that was active there.
    """

    identity: Identity
    settings: dict[str, Any]
    experiment: int


def tell_children(identity: Identity, config: Config, experiment: int = 0) -> None:
    """Tell children to be spawned whose run they log for: the environment is all that they inherit."""
    own = identity.rank_identity
    told = {
        "pid": os.getpid(),
        "identity": [identity.recorder, identity.job, identity.parent],
        "rank": [own.rank, own.world_size, own.local_rank, own.attempt],
        "settings": {"host": config.host, "port": config.port, "runs_dir": str(config.runs_dir.absolute())},
        "experiment": experiment,
    }
    os.environ[_PARENT] = json.dumps(told)


def forget_children() -> None:
    """Tell children no longer: what is spawned from now on logs for itself."""
    os.environ.pop(_PARENT, None)


def spawned_from() -> SpawnedFrom | None:
    """Return the parent of this process, if that recorded and has spawned it through `multiprocessing`.

    None also for a rank of a process group: what it logs is its own.
    """
    told = _told()
    return told if told is not None and detect_rank().source != "torch.distributed" else None


def _told() -> SpawnedFrom | None:
    global _spawned
    if _spawned is not None:  # the variable says by now what this process tells its own children
        return _spawned

    try:
        told = json.loads(os.environ[_PARENT])
        if told["pid"] != _parent_process():
            return None

        recorder, job, parent = told["identity"]
        rank, world_size, local_rank, attempt = told["rank"]
        own = RankIdentity(rank=rank, world_size=world_size, local_rank=local_rank, attempt=attempt)
        identity = Identity(recorder, job, own, provisional=False, parent=parent)
        _spawned = SpawnedFrom(identity, told["settings"], int(told["experiment"]))
    except (KeyError, ValueError, TypeError):
        return None

    return _spawned


def identify(config: Config, before: Identity | None = None) -> Identity:
    """Find out who this process is now.

    Args:
        config: the settings; `run_id` is the job key where it is set.
        before: what was found earlier: the job stays, unless a process group has told more of it.
    """
    own = detect_rank()
    parent = _parent_process()
    unlaunched = own.source in ("single process", "torch.distributed") and not config.run_id
    job = config.run_id or (before.job if before is not None else job_key())
    if own.source == "torch.distributed" and own.world_size > 1 and unlaunched and launcher_job() is None:
        job = _group_key(job, parent)

    provisional = own.source == "single process" and parent is not None
    return Identity(secrets.token_hex(8), job, own, provisional)


def _command() -> str:
    """Return the command line of the job, without the secrets in it."""
    given = os.environ.get("TRACEML_COMMAND")
    masker = secrets_only()
    return masker.mask_text(given) if given else shlex.join(masker.mask_value("command", sys.argv))


def script_name() -> str:
    """Return what to call a run of this program."""
    script = sys.argv[0] if sys.argv else ""
    path = Path(script)
    if path.name == "ipykernel_launcher.py":
        return "notebook"
    if path.name == "__main__.py":
        return path.parent.name or "run"
    if script in ("", "-c", "-"):
        return "interactive" if hasattr(sys, "ps1") else "python"

    return path.stem if path.suffix == ".py" else path.name


def _group_key(job: str, parent: int | None) -> str:
    """Return a key on which the ranks of a group agree that no launcher started: by its address, or their parent."""
    if address := group_address():
        return address
    if parent is not None:
        return f"group-{socket.gethostname()}-{parent}-{process_start_ticks(parent)}"

    return job


def _parent_process() -> int | None:
    """Return the pid of the process that started this one through `multiprocessing`, if it was so."""
    process = sys.modules.get("multiprocessing.process")
    parent = process.parent_process() if process is not None else None
    return None if parent is None else parent.pid
