"""Facts of a recorder: its process, the sizes of its tables, counts and costs so far."""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.database.schema import PACKED, TELEMETRY
from traceml.fail_open import fail_open
from traceml.ids import RankIdentity
from traceml.inspection.git_head import git_head, repository_folders
from traceml.inspection.user_files import working_folder
from traceml.privacy import secrets_only
from traceml.recorder.identity import Identity
from traceml.recorder.network_topology import switches_above
from traceml.samplers.base import SamplerStatistics
from traceml.version import __version__

if TYPE_CHECKING:
    from traceml.settings import Config

__all__ = ["RecorderEnd", "RecorderStatistics", "capacities", "child_capacities", "process_facts", "wanted_collectors"]


@dataclass(frozen=True, slots=True)
class RecorderStatistics:
    """Counts and costs of a recorder so far.

    Attributes:
        state: `disabled`, `running` or `stopped`.
        rank, world_size: its place in the job.
        address: the aggregator's, as host:port.
        connected: whether there is a connection now.
        rows_appended, rows_acked, rows_lost: rows of all tables; appended = acked + lost + still here.
        bytes_sent: bytes put on the wire.
        reconnects: connections after the first.
        cpu_ns: CPU time of its thread, as of its last telemetry row.
        hook_ns_per_step: cost of the hooks per step.
        errors: cycles of its thread that failed.
        samplers: counts and costs of each sampler.
        clock_offset_ns, clock_rtt_ns: the aggregator's wall clock minus this monotonic clock, and how exact that is.
    """

    state: str
    rank: int = 0
    world_size: int = 1
    address: str = ""
    connected: bool = False
    rows_appended: int = 0
    rows_acked: int = 0
    rows_lost: int = 0
    bytes_sent: int = 0
    reconnects: int = 0
    cpu_ns: int = 0
    hook_ns_per_step: int = 0
    errors: int = 0
    samplers: tuple[SamplerStatistics, ...] = ()
    clock_offset_ns: int | None = None
    clock_rtt_ns: int | None = None


_log = logging.getLogger("traceml")

# A child that only logs has no steps, and no samples but those of its own recorder, one in five seconds.
_CHILD_CAPACITIES = {table.name: 2 for table in PACKED} | {TELEMETRY.name: 64}
_MAX_PATHS = 64


def _capacity_of_metrics(config: Config) -> dict[str, int]:
    return {"metrics": max(config.max_queue_size, 64)}


def child_capacities(config: Config) -> dict[str, int]:
    """Return the rows that each table of a child that only logs holds."""
    return _CHILD_CAPACITIES | _capacity_of_metrics(config)


@dataclass(slots=True)
class RecorderEnd:
    """Facts about a recorder's end, which outlive its tables; filled when it has stopped.

    Attributes:
        rank_identity: its rank and world size.
        all_stored: whether everything was stored.
        is_stored_late: whether it has stopped before a slow aggregator, which is still at work, had stored everything.
        failed: whether an exit with an exception or a status other than 0 was recorded.
        viewer: shows a run's folder.
    """

    rank_identity: RankIdentity = field(default_factory=RankIdentity)
    all_stored: bool = False
    is_stored_late: bool = False
    failed: bool = False
    viewer: Callable[[Path], None] | None = None


def capacities(config: Config) -> dict[str, int]:
    """Return the rows that tables hold, where they differ from their default."""
    device_rows = config.ring_rows if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() else 256
    return {"steps": config.ring_rows, "device_steps": device_rows} | _capacity_of_metrics(config)


def _job_end(environ: Mapping[str, str]) -> dict[str, float]:
    """Return the time at which Slurm ends the job, and its time limit, as it informs the job's processes."""
    start, end = environ.get("SLURM_JOB_START_TIME", ""), environ.get("SLURM_JOB_END_TIME", "")
    if not end.isdecimal():
        return {}

    return {"job_end_s": float(end)} | ({"job_limit_s": float(int(end) - int(start))} if start.isdecimal() else {})


def _store_restarts(environ: Mapping[str, str]) -> dict[str, int]:
    """Return how often torchrun has restarted the ranks, where its agent's store serves them in each attempt."""
    restarts = environ.get("TORCHELASTIC_RESTART_COUNT", "")
    is_shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and restarts.isdecimal() and int(restarts) > 0
    return {"store_restarts": int(restarts)} if is_shared else {}


def _switches(config: Config) -> dict[str, list[str]]:
    """Return the switches above this host, the leaf first, where they are known."""
    found: list[str] = []
    with fail_open(_log, "recorder", "the switches above this host are not known"):
        found = switches_above(socket.gethostname(), os.environ, config.topology_file)

    return {"switches": found} if found else {}


def _git(identity: Identity, config: Config) -> dict[str, dict[str, str]]:
    """Return commit and branch of the script's repository, from rank 0 alone: a shared disk may be slow."""
    found: dict[str, str] = {}
    if config.track_git and identity.rank_identity.rank == 0:
        with fail_open(_log, "recorder", "the git commit of the script is not known"):
            found = git_head(repository_folders(sys.argv[0] if sys.argv else "", Path(working_folder())))

    return {"git": found} if found else {}


def process_facts(identity: Identity, config: Config) -> dict[str, Any]:
    """Return what the row `process` of `info` says of this process."""
    return {
        "hang_timeout_s": config.hang_timeout,
        "on_hang": config.on_hang,
        "python": platform.python_version(),
        "traceml": __version__,
        "executable": sys.executable,
        "argv": secrets_only().mask_value("argv", sys.argv[:64]),
        "folder": working_folder(),
        "rank_from": identity.rank_identity.source,
        "cores": len(os.sched_getaffinity(0)),
        "machine_cores": os.cpu_count(),
        **_job_end(os.environ),
        **_store_restarts(os.environ),
        **_switches(config),
        **_git(identity, config),
        **_to_collect(identity, config),
    }


def wanted_collectors(config: Config) -> list[str]:
    """Return the built-in collectors that the settings ask for; one process of a job runs them."""
    wanted = {"git": config.track_git, "environment": config.track_env, "system": config.track_system}
    return [name for name, is_on in wanted.items() if is_on]


def _to_collect(identity: Identity, config: Config) -> dict[str, Any]:
    """Return what rank 0 leaves to the aggregator of its host to read; nothing where it reads by itself."""
    if identity.rank_identity.rank != 0 or config.backend or config.collectors:
        return {}

    folder = working_folder()
    path = [os.path.normpath(f"{folder}/{each}" if each[:1] != "/" else each) for each in sys.path[:_MAX_PATHS]]
    return {
        "collect": {
            "names": wanted_collectors(config),
            "path": path,
            "mask": list(config.mask),
            "after_s": config.collect_after,
        }
    }
