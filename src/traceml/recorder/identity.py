"""Identity of a recorder: its rank and job, as sent in the hello and written into the flight file."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from traceml.clock import process_start_ticks
from traceml.formatting import shell_joined
from traceml.ids import RankIdentity, detect_rank, group_address, job_key, launcher_job
from traceml.inspection.kernel_state import ancestors_of
from traceml.inspection.loaded_modules import multiprocessing_parent
from traceml.inspection.program_names import python_module
from traceml.inspection.script_time import script_age_ms
from traceml.privacy import secrets_only
from traceml.settings import Config
from traceml.transport.hello import Hello

__all__ = [
    "Identity",
    "SpawnedFrom",
    "export_to_children",
    "identify",
    "inherit_settings",
    "is_of_traced_job",
    "settings_of_parent",
    "spawned_from",
    "stop_export",
]

_PARENT = "TRACEML_PARENT"
_RAY_WORKER = "ray/_private/workers/default_worker.py"  # the program of each worker of Ray
_spawned: SpawnedFrom | None = None
_inherited: dict[str, Any] = {}


class Identity(NamedTuple):
    """Identity of one recorder, whose rows are numbered from 0.

    Args:
        recorder: unique id; a second recorder of the same process has another.
        job: key by which the ranks of a job find each other's run.
        parent: for a child process that only logs, the recorder of the rank that it belongs to.
        provisional: whether the rank may still change, because this child process may join a process group.
        spawned_by: for a rank in a child process, the recorder of its parent.
    """

    recorder: str
    job: str
    rank_identity: RankIdentity
    provisional: bool
    parent: str = ""
    spawned_by: str = ""

    def hello(self, config: Config, flight: Path | None) -> Hello:
        """Return the hello for the aggregator."""
        return Hello(
            role="rank",
            run=self.job,
            command=_command()[:4000],
            flight=str(flight or ""),
            runs_dir=_wanted_folder(config),
            **self._shared(config),
        )

    def of_child(self, *, provisional: bool = False) -> Identity:
        """Return the identity of a child of this process: it logs for the same rank of the same job.

        Args:
            provisional: whether it may become a rank itself; a forked one does not.
        """
        return self._replace(
            recorder=secrets.token_hex(8), provisional=provisional, parent=self.parent or self.recorder
        )

    def probe(self, config: Config) -> Hello:
        """Return the hello of a client that only checks whether an aggregator answers."""
        return Hello(role="client", run=self.job, runs_dir=_wanted_folder(config))

    def facts(self, config: Config) -> dict[str, Any]:
        """Return the identity fields of the flight file."""
        return {
            "runs_dir": str(config.runs_dir),
            "job": self.job,
            "host": socket.gethostname(),
            "hang_timeout_s": config.hang_timeout,
            "on_hang": config.on_hang,
            **self._shared(config),
        }

    def _shared(self, config: Config) -> dict[str, Any]:
        """Return the fields that both have."""
        own = self.rank_identity
        return {
            "name": config.run_name or script_name(),
            "project": config.project,
            "run_id": config.run_id or "",
            "rank": own.rank,
            "world_size": own.world_size,
            "local_rank": own.local_rank,
            "attempt": own.attempt,
            "recorder": self.recorder,
            "parent": self.parent,
            "spawned_by": self.spawned_by,
            "script_ms": 0 if self.parent else script_age_ms(),
        }


class SpawnedFrom(NamedTuple):
    """Facts about the recording process that has started this one.

    Args:
        settings: settings for `load` with which the parent records.
        experiment: number of the parent's active experiment.
        pid: of the parent.
    """

    identity: Identity
    settings: dict[str, Any]
    experiment: int
    pid: int

    @property
    def is_self(self) -> bool:
        """Whether the parent is this process, before it replaced its program by `exec`."""
        return self.pid == os.getpid()


def export_to_children(identity: Identity, config: Config, experiment: int = 0) -> None:
    """Export this process's run to children that are spawned later, through the environment that they inherit."""
    own = identity.rank_identity
    facts = {
        "pid": os.getpid(),
        "identity": [identity.recorder, identity.job, identity.parent],
        "rank": [own.rank, own.world_size, own.local_rank, own.attempt],
        "settings": _settings_of(config),
        "experiment": experiment,
    }
    os.environ[_PARENT] = json.dumps(facts)


def _settings_of(config: Config) -> dict[str, Any]:
    """Return the settings with which a child finds the aggregator of this process."""
    address = {"host": config.host, "port": config.port} if config.address_given else {}
    return {**address, "runs_dir": str(config.runs_dir), "local": config.local, "quiet": config.quiet}


def stop_export() -> None:
    """Stop the export: children that are spawned from now on log for themselves."""
    os.environ.pop(_PARENT, None)


def inherit_settings(settings: Mapping[str, Any]) -> None:
    """Note settings of the parent that are not in the environment, where a key would be seen by every program."""
    _inherited.update(settings)


def spawned_from() -> SpawnedFrom | None:
    """Return the parent of this process, if it records and has spawned this one through `multiprocessing`.

    None also for a rank of a process group, which logs for itself.
    """
    if multiprocessing_parent() is None or detect_rank().source == "torch.distributed":
        return None

    parent = _exported_parent()
    return None if parent is None else parent._replace(settings=settings_of_parent())


def is_of_traced_job() -> bool:
    """Whether a recording process is an ancestor of this one, or has become it by `exec`."""
    return _exported_parent() is not None


def _exported_parent() -> SpawnedFrom | None:
    """Return the recording process that started this one, or that this one was before `exec`; None if there is none."""
    global _spawned
    if _spawned is not None:  # by now the variable holds what this process exports to its own children
        return _spawned

    try:
        facts = json.loads(os.environ[_PARENT])
        above = (each.pid for each in ancestors_of(os.getpid()))
        if facts["pid"] not in (multiprocessing_parent(), *above):
            return None

        recorder, job, parent = facts["identity"]
        rank, world_size, local_rank, attempt = facts["rank"]
        own = RankIdentity(rank=rank, world_size=world_size, local_rank=local_rank, attempt=attempt)
        identity = Identity(recorder, job, own, provisional=False, parent=parent)
        _spawned = SpawnedFrom(identity, facts["settings"], int(facts["experiment"]), int(facts["pid"]))
    except (KeyError, ValueError, TypeError):
        return None

    return _spawned


def identify(config: Config, before: Identity | None = None, joining: tuple[int, int] | None = None) -> Identity:
    """Return the current identity of this process.

    Args:
        config: the settings; `run_id` is the job key where it is set.
        before: the identity so far: the job stays, unless a process group gives a better key.
        joining: rank and size of the process group that this process is about to join.
    """
    own = detect_rank(joining=joining)
    parent = multiprocessing_parent()
    job = config.run_id or (before.job if before is not None else job_key())
    # A script that starts its other ranks itself, as Lightning does, sets the address in its own environment, too.
    unlaunched = launcher_job() in (None, group_address()) and not config.run_id
    if own.source == "torch.distributed" and own.world_size > 1 and unlaunched:
        job = _job_of_local_parent(parent) or _group_key(job, parent)

    provisional = own.source == "single process" and parent is not None
    return Identity(secrets.token_hex(8), job, own, provisional, spawned_by=_recorder_of_parent(before))


def settings_of_parent() -> dict[str, Any]:
    """Return settings for `load` with which the parent of this process records; empty if none does."""
    parent = _exported_parent()
    return _inherited | ({} if parent is None else parent.settings)


def _recorder_of_parent(before: Identity | None) -> str:
    if before is not None:
        return before.spawned_by

    parent = _exported_parent()
    return "" if parent is None or parent.is_self else parent.identity.recorder


def _wanted_folder(config: Config) -> str:
    """Return the runs folder that the aggregator must serve; "" for any, as its address was given."""
    return "" if config.address_given else str(config.runs_dir)


def _command() -> str:
    """Return the command line of the job with its secrets masked."""
    given = os.environ.get("TRACEML_COMMAND")
    masker = secrets_only()
    return masker.mask_text(given) if given else shell_joined(masker.mask_value("command", _program_words()))


def _program_words() -> list[str]:
    """Return the words with which a program was started: its file, or `-m` and its module, and its arguments."""
    if not sys.argv or not (module := python_module(sys.orig_argv)):
        return sys.argv

    # Of a process that was started in another way, the interpreter's own command line tells nothing.
    file, path = "/" + os.path.splitext(sys.argv[0])[0], "/" + module.replace(".", "/")  # noqa: PTH122 - may be empty
    return ["-m", module, *sys.argv[1:]] if file.endswith((path, f"{path}/__main__")) else sys.argv


def script_name() -> str:
    """Return the default name of a run of this program."""
    script = sys.argv[0] if sys.argv else ""
    path = Path(script)
    if path.name == "ipykernel_launcher.py":
        return "notebook"
    if script.endswith(_RAY_WORKER):
        return "ray"
    if path.name == "__main__.py":
        return path.parent.name or "run"
    if script in ("", "-c", "-"):
        return "interactive" if hasattr(sys, "ps1") else "python"

    return path.stem if path.suffix == ".py" else path.name


def _job_of_local_parent(parent: int | None) -> str:
    """Return the job of a parent that records on this host only, as other hosts have no ranks of its run; else ""."""
    recording = _exported_parent()
    is_local = recording is not None and recording.pid == parent and recording.settings.get("local")
    return recording.identity.job if recording is not None and is_local else ""


def _group_key(job: str, parent: int | None) -> str:
    """Return a key that is equal for all ranks of a group without a launcher: its address, or their parent."""
    if address := group_address():
        return address
    if parent is not None:
        return f"group-{socket.gethostname()}-{parent}-{process_start_ticks(parent)}"

    return job
