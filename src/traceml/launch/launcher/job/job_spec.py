"""Specification of a launched job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from traceml.launch.shared.payload import SerializedValue

__all__ = ["JobSpec"]


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """Specification of a launched job: what all workers run, and how."""

    call: SerializedValue | None = None
    script: Mapping[str, Any] | None = None  # instead of a call, a script: `path` or `module`, and `argv`
    # Of the process group; `auto`: nccl where there are enough GPUs, else gloo; None: no group.
    backend: str | None = "auto"
    timeout_s: float = 600  # for start-up, and for the group's collectives
    # Variables for workers of other hosts; workers of this host inherit all.
    environ: Mapping[str, str] = field(default_factory=dict)
    env_file: str | None = None  # a file that bash sources on each host
    cwd: str = "."
    sys_path: Sequence[str] = ()  # folders where workers look for modules
    # Description of the launcher's `__main__`, see `assembly`.
    main: Mapping[str, str | None] = field(default_factory=dict)
    cpu_affinity: bool = True  # whether workers are distributed over the cores
    keep_agents: bool = True  # whether agents may serve the next launch
