"""Specification of a launched job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from traceml.launch.wire.payload import SerializedValue

__all__ = ["JobSpec"]


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """Specification of a launched job: what all workers run, and how.

    Attributes:
        script: instead of a call, a script: `path` or `module`, and `argv`.
        backend: of the process group; `auto`: nccl where there are enough GPUs, else gloo; None: no group.
        timeout_s: for start-up, and for the group's collectives.
        environ: variables for workers of other hosts; workers of this host inherit all.
        env_file: a file that bash sources on each host.
        sys_path: folders where workers look for modules.
        main: description of the launcher's `__main__`, see `assembly`.
        cpu_affinity: whether workers are distributed over the cores.
        keep_agents: whether agents may serve the next launch.
    """

    call: SerializedValue | None = None
    script: Mapping[str, Any] | None = None
    backend: str | None = "auto"
    timeout_s: float = 600
    environ: Mapping[str, str] = field(default_factory=dict)
    env_file: str | None = None
    cwd: str = "."
    sys_path: Sequence[str] = ()
    main: Mapping[str, str | None] = field(default_factory=dict)
    cpu_affinity: bool = True
    keep_agents: bool = True
