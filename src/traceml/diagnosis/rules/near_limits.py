"""Resources that run out: open files, CPU time, shared memory, disk, processes, memory, CPU quota."""

from __future__ import annotations

import math

from traceml.database.schema import Resource
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import Kind, Severity
from traceml.formatting import bytes_text, count_text, left_text, percent_text, plural, ranks_text

__all__ = ["QUOTA_ADVICE", "limits_near"]

VERY_SOON_S = 600.0
"""A resource that ends within this time is critical."""

QUOTA_ADVICE = (
    "Ask for more CPUs, or run fewer threads: OMP_NUM_THREADS and num_workers beyond the quota are only throttled."
)

_DISKS = (Resource.DISK, Resource.CHECKPOINT_DISK)
_OF_RANK = (Resource.OPEN_FILES, Resource.CPU_TIME)
_BYTES = (Resource.SHARED_MEMORY, *_DISKS, Resource.MEMORY)
_WORDS = {
    Resource.OPEN_FILES: "open files",
    Resource.SHARED_MEMORY: "shared memory (/dev/shm)",
    Resource.DISK: "disk of the working directory",
    Resource.PROCESSES: "processes and threads",
    Resource.MEMORY: "memory of the container",
    Resource.CPU_QUOTA: "CPU quota",
    Resource.CHECKPOINT_DISK: "disk of the checkpoints",
    Resource.CPU_TIME: "seconds of CPU time (ulimit -t)",
}
_ADVICE = {
    Resource.OPEN_FILES: (
        "Find what is opened and never closed (files in a Dataset, loggers, tensors shared by loader workers); "
        "torch.multiprocessing.set_sharing_strategy('file_system') or `ulimit -n` only postpones the failure."
    ),
    Resource.SHARED_MEMORY: (
        "Look at what is kept in /dev/shm (`ls -l /dev/shm`: files, shared memory of other programs or of those that "
        "were killed), or give it more (docker run --shm-size, --ipc=host; an emptyDir with medium Memory in "
        "Kubernetes)."
    ),
    Resource.DISK: "Keep fewer checkpoints and logs, or write them to another disk.",
    Resource.CHECKPOINT_DISK: "Keep fewer checkpoints, save only what a restart needs, or write them to another disk.",
    Resource.PROCESSES: "Use fewer processes and threads, or raise the container's pids limit.",
    Resource.MEMORY: "Find what grows (lists of losses that keep graphs, caches in a Dataset), or ask for more memory.",
    Resource.CPU_QUOTA: QUOTA_ADVICE,
    Resource.CPU_TIME: (
        "Raise the limit, run the training as a job of the scheduler instead of on a login host, or save checkpoints "
        "to resume from: the kernel ends the process at the limit."
    ),
}

_WITH_WORKERS = {
    Resource.SHARED_MEMORY: (
        "Loader workers pass batches through /dev/shm: give it more (docker run --shm-size, --ipc=host; an emptyDir "
        "with medium Memory in Kubernetes), or use fewer workers or a smaller prefetch_factor."
    ),
    Resource.PROCESSES: "Use fewer loader workers and threads, or raise the container's pids limit.",
}
"""Advice to a training whose loaders have workers."""
_WHILE_LEVEL = {
    Resource.OPEN_FILES: (
        "Keep fewer files open at a time (files in a Dataset, loggers), call "
        "torch.multiprocessing.set_sharing_strategy('file_system') if loader workers share tensors, or raise the limit "
        "(`ulimit -n`)."
    ),
    Resource.MEMORY: (
        "Use smaller batches or fewer loader workers, keep less in memory, or ask for more: at the limit the kernel "
        "ends a process of the container."
    ),
}
"""Advice where the use does not grow."""


def limits_near(facts: JobFacts) -> list[Finding]:
    """Return a finding per resource that runs out, of the rank that is the first to reach its limit."""
    near: dict[Resource, ResourceUse] = {}
    for use in sorted((use for use in facts.limits if use.is_near), key=_urgency):
        near.setdefault(use.resource, use)

    return [_finding(use, facts) for use in near.values()]


def _urgency(use: ResourceUse) -> tuple[float, float]:
    return math.inf if use.ends_in_s is None else use.ends_in_s, -use.share


def _finding(use: ResourceUse, facts: JobFacts) -> Finding:
    folder = facts.save_folders.get(use.rank) if use.resource is Resource.CHECKPOINT_DISK else None
    soon = use.left_s is not None and use.left_s <= VERY_SOON_S
    of_host = "" if use.resource in _OF_RANK else facts.of_host(use.rank)
    words = _WORDS[use.resource] + (f" in {folder}" if folder else "") + of_host
    if use.resource is Resource.CPU_QUOTA:
        summary = (
            f"The container{of_host} was throttled in {percent_text(use.share)} of its scheduling periods, because its "
            "CPU quota was used up."
        )
    else:
        where = f" on {ranks_text((use.rank,))}" if use.resource in _OF_RANK else ""
        text = bytes_text if use.resource in _BYTES else count_text
        summary = f"{text(use.used)} of {text(use.limit)} {words} in use{where}{_when(use)}."

    advice = _ADVICE | (_WITH_WORKERS if facts.has_loader_workers else {})
    advice |= _WHILE_LEVEL if use.ends_in_s is None else {}
    return Finding.of(
        Kind.LIMIT_NEAR,
        severity=Severity.CRITICAL if soon else Severity.WARNING,
        ranks=(use.rank,) if use.resource in _OF_RANK else (),
        summary=summary,
        next=advice[use.resource],
        evidence={
            "resource": use.resource.name.lower(),
            "used": use.used,
            "limit": use.limit,
            **known_facts(
                folder=folder,
                host=facts.hosts[use.rank] if of_host else None,
                left_s=use.left_s,
                left_steps=use.left_steps,
            ),
        },
    )


def _when(use: ResourceUse) -> str:
    if use.ends_in_s is None:
        return ""

    steps = "" if use.left_steps is None else f", {plural(int(use.left_steps), 'step')}"
    return f", and it grows: at this rate it is full in {left_text(use.ends_in_s)}{steps}"
