"""Memory that grows steadily: how fast, since when, and when it is full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import msgspec
import numpy as np

from traceml.diagnosis.advice import WITHOUT_PROFILER
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.memory_growth import GrowthEstimate, MemoryKind
from traceml.diagnosis.facts.resource_use import SOON_S
from traceml.diagnosis.findings import Explanation, Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.memory.growth_causes import growth_cause, is_kept_in_copies
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.formatting import bytes_text, count_text, left_text, plural, ranks_text

__all__ = ["memory_leaks"]

FAR_S = 30 * 86400.0
"""Beyond this nothing is said about when it is full."""
MORE_THAN_ONE_PASS = 1.2
"""A data set that was read this many times has filled its caches."""
_MOST = 0.5
_UNEXPLAINED_SAMPLES = 16
"""Samples in which resident memory must have grown where no container explains it,"""
_UNEXPLAINED_SWINGS = 3.0
"""and by this many times what it differs from one sample to the next: large arrays that come and go rise by chance."""
_LARGER, _LARGER_IN_ALL = 1.02, 1.2
"""Batches grow if each quarter of the steps has so much larger ones than that before, and the last than the first."""

_WORDS = {
    MemoryKind.RESIDENT: "Resident memory",
    MemoryKind.DEVICE: "Memory that torch has allocated on the device",
    MemoryKind.PINNED: "Pinned host memory",
    MemoryKind.WORKERS: "Private memory of the loader workers",
}
_ADVICE = {
    MemoryKind.RESIDENT: (
        "Look for what is kept from step to step: losses and outputs in lists (append loss.item() or loss.detach()), "
        "caches in the Dataset, and hooks that store activations."
    ),
    MemoryKind.DEVICE: (
        "Look for tensors that are kept from step to step: losses and outputs in lists hold their graphs (append "
        "loss.item() or loss.detach()), and so does a running sum of losses."
    ),
    MemoryKind.PINNED: (
        "Look for batches that are kept after their copy to the device: pinned memory is never paged out, and torch "
        "reuses it only when nothing holds it."
    ),
    MemoryKind.WORKERS: (
        "Look for what the Dataset keeps between samples: caches, lists of decoded files. Each worker has its own copy "
        "of it."
    ),
}


_UNSEEN = " No container that the script's variables refer to was seen to grow that much."
_NATIVE = (
    " If nothing is kept there, native code does it (an extension, a decoder, a library called by ctypes), or objects "
    "refer to each other while the garbage collector is off (gc.disable, gc.freeze)."
)
_MAY_END = " The data is read for the first time: a cache that fills looks the same."


_Growths = dict[int, tuple[int, GrowthEstimate]]
"""Rank -> device, or loader, and growth of a memory there."""


class _Room(msgspec.Struct, frozen=True):
    """Time until a memory is full."""

    left_s: float
    left_steps: float
    of: str
    total_bytes: int


def memory_leaks(facts: JobFacts, window: AlignedSteps) -> list[Finding]:
    """Return a finding for each kind of memory that grows steadily or by copies, about the rank where it grows most.

    Where batches grow too, as longer sequences do, memory follows their size, with attention the square of it: if it
    grows by no more, only a container that grows is a leak.
    """
    by_kind: dict[MemoryKind, _Growths] = {}
    for rank, kind, device, growth in facts.memory.rising():
        if not growth.steady and (kind is MemoryKind.WORKERS or not is_kept_in_copies(facts, rank, growth)):
            continue

        known = by_kind.setdefault(kind, {})
        if rank not in known or known[rank][1].bytes_per_step < growth.bytes_per_step:
            known[rank] = (device, growth)

    _leave_out_pinned(by_kind)
    of_batches = _growth_of_batches(window) if by_kind else 1.0
    findings = (_finding(facts, kind, by_kind, of_batches) for kind in by_kind)
    return [each for each in findings if each is not None]


def _leave_out_pinned(by_kind: dict[MemoryKind, _Growths]) -> None:
    """Leave out resident memory of ranks where most of its growth is pinned memory, which may count as resident."""
    pinned = by_kind.get(MemoryKind.PINNED, {})
    resident = by_kind.pop(MemoryKind.RESIDENT, {})
    others = {
        rank: (device, growth)
        for rank, (device, growth) in resident.items()
        if rank not in pinned or pinned[rank][1].bytes_per_step < _MOST * growth.bytes_per_step
    }
    if others:
        by_kind[MemoryKind.RESIDENT] = others


def _finding(
    facts: JobFacts, kind: MemoryKind, by_kind: Mapping[MemoryKind, _Growths], of_batches: float
) -> Finding | None:
    found = by_kind[kind]
    rank = max(found, key=lambda each: found[each][1].bytes_per_step)
    device, growth = found[rank]
    growth = facts.memory.curve(rank, kind, device).since_it_began(growth)
    workers = facts.workers.workers(rank, device) if kind is MemoryKind.WORKERS else 0
    copied = copied_objects(facts, rank, device) if workers else None
    room = _room(facts, kind, rank, by_kind)
    if copied and room and room.left_s > facts.workers.uncopied_bytes(rank, device) / max(growth.bytes_per_s, 1.0):
        room = None  # all is copied before it is full

    cause = None if workers or kind is MemoryKind.PINNED else growth_cause(facts, rank, growth)
    if cause and cause.left_steps < (room.left_steps if room else math.inf):
        return None  # a container with a bound is full before memory is

    is_resident = kind is MemoryKind.RESIDENT
    if cause is None:
        # The history of an optimizer ends when it is full, and an allocator may just have taken some blocks more.
        is_history = growth.grown_bytes <= facts.history_bytes and (is_resident or kind is MemoryKind.DEVICE)
        is_sure = (
            growth.samples >= _UNEXPLAINED_SAMPLES and growth.grown_bytes >= _UNEXPLAINED_SWINGS * growth.swing_bytes
        )
        if is_history or (is_resident and not is_sure):
            return None

    follows = growth.now_bytes <= of_batches**2 * (growth.now_bytes - growth.grown_bytes)
    if follows and cause is None and copied is None:
        return None

    why = copied or cause
    is_unseen = is_resident and rank in facts.growing and why is None
    unread = _unread_steps(facts)
    is_open = unread > 0 and copied is None and (cause is None or cause.is_cache)
    grown = grown_workers(workers, growth) if workers else _grown(facts, kind, rank, growth)
    ranks = () if len(found) >= facts.world_size else tuple(sorted(found))
    return Finding.of(
        Kind.MEMORY_LEAK,
        severity=_severity(room, unread if is_open else 0.0, facts),
        ranks=ranks,
        summary=f"{grown}{_full(room)}{why.text if why else _UNSEEN if is_unseen else ''}{_MAY_END if is_open else ''}",
        next=why.action if why else _advice(kind, facts, is_unseen=is_unseen),
        evidence={
            "memory": str(kind),
            "bytes_per_step": growth.bytes_per_step,
            "bytes_per_s": growth.bytes_per_s,
            "grown_bytes": growth.grown_bytes,
            "now_bytes": growth.now_bytes,
            "since_step": growth.since_step,
            **({"workers": workers} if workers else {}),
            **(why.evidence if why else {}),
            **({"left_s": room.left_s, "left_steps": room.left_steps, "limit_bytes": room.total_bytes} if room else {}),
        },
    )


def _advice(kind: MemoryKind, facts: JobFacts, *, is_unseen: bool) -> str:
    """Return advice where no container is known; a profiler that is on keeps what it records of each step."""
    profiler = f"{WITHOUT_PROFILER} " if kind is MemoryKind.RESIDENT and facts.profiles else ""
    return f"{profiler}{_ADVICE[kind]}{_NATIVE if is_unseen else ''}"


def _growth_of_batches(window: AlignedSteps) -> float:
    """Return by which factor the last batches are larger than the first; 1 if they do not grow all the time."""
    quarters = [float(np.median(part)) for part in np.array_split(window.mean_elements, 4) if len(part)]
    if len(quarters) < 2 or not all(0 < before * _LARGER <= then for before, then in pairwise(quarters)):
        return 1.0

    factor = quarters[-1] / quarters[0]
    return factor if factor >= _LARGER_IN_ALL else 1.0


def _severity(room: _Room | None, unread_steps: float, facts: JobFacts) -> Severity:
    """Return how bad it is; a cache would stop growing after `unread_steps`, which is 0 if it is not a cache.

    A run that finished had room: only one without room for another run of the same length was close to its end.
    """
    soon_s = min(SOON_S, facts.time.wall_s) if facts.time is not None and facts.state == "finished" else SOON_S
    if room is not None and room.left_s <= soon_s and (not unread_steps or room.left_steps < unread_steps):
        return Severity.CRITICAL

    return Severity.INFO if unread_steps else Severity.WARNING


def _unread_steps(facts: JobFacts) -> float:
    """Return the steps until the data set has been read once: before, a cache that fills looks like a leak."""
    loader = facts.loader
    if loader is None or not loader.length or len(facts.epochs) > 1:
        return 0.0

    per_step = facts.micro_batches * (loader.batch_size or 1) * facts.topology.readers(facts.world_size)
    return max(MORE_THAN_ONE_PASS * loader.length / per_step - facts.steps_made, 0.0)


def _room(facts: JobFacts, kind: MemoryKind, rank: int, by_kind: Mapping[MemoryKind, _Growths]) -> _Room | None:
    device, growth = by_kind[kind][rank]
    if kind is MemoryKind.DEVICE:
        use = next((each for each in facts.memory.devices() if (each.rank, each.device) == (rank, device)), None)
        left, total = (use.total_bytes - use.allocated_bytes, use.total_bytes) if use is not None else (0, 0)
        rate, name = growth.bytes_per_s, "device's"
    else:
        host = facts.hosts.get(rank)
        memory = next((each for at, each in facts.memory.hosts().items() if facts.hosts.get(at) == host), None)
        left, total = (memory.total_bytes - memory.used_bytes, memory.total_bytes) if memory is not None else (0, 0)
        rate, name = _host_rate(facts, host, by_kind), "container's" if facts.has_memory_limit(host) else "host's"

    if total <= 0 or rate <= 0:
        return None

    left_s = max(left, 0) / rate
    return _Room(left_s, left_s * growth.bytes_per_s / max(growth.bytes_per_step, 1.0), name, total)


def _host_rate(facts: JobFacts, host: str | None, by_kind: Mapping[MemoryKind, _Growths]) -> float:
    """Return the growth in bytes per second of all ranks of a host; pinned memory may be resident too."""
    return sum(
        growth.bytes_per_s
        for kind, found in by_kind.items()
        if kind is not MemoryKind.DEVICE
        for rank, (_, growth) in found.items()
        if facts.hosts.get(rank) == host
        and (kind is not MemoryKind.PINNED or rank not in by_kind.get(MemoryKind.RESIDENT, {}))
    )


def _grown(facts: JobFacts, kind: MemoryKind, rank: int, growth: GrowthEstimate) -> str:
    where = f" of {ranks_text((rank,))}" if facts.world_size > 1 else ""
    return (
        f"{_WORDS[kind]}{where} grows by {bytes_text(int(growth.bytes_per_step))} per step: by "
        f"{bytes_text(growth.grown_bytes)} since step {count_text(growth.since_step)}, to "
        f"{bytes_text(growth.now_bytes)}."
    )


def _full(room: _Room | None) -> str:
    if room is None or room.left_s > FAR_S:
        return ""

    return (
        f" At this rate the {room.of} {bytes_text(room.total_bytes)} are full in {left_text(room.left_s)} "
        f"({plural(int(room.left_steps), 'step')})."
    )


def grown_workers(workers: int, growth: GrowthEstimate) -> str:
    """Return the growth of a loader's workers as a sentence."""
    rate = f"{bytes_text(int(60 * growth.bytes_per_s))} per minute"
    grow = f"{workers} loader workers grow by {rate} together" if workers > 1 else f"The loader worker grows by {rate}"
    return (
        f"{grow}: private memory grew by {bytes_text(growth.grown_bytes)} since step "
        f"{count_text(growth.since_step)}, to {bytes_text(growth.now_bytes)}."
    )


def copied_objects(facts: JobFacts, rank: int, loader: int) -> Explanation | None:
    """Return the objects that the workers copy; None if their growth is not from copies, or not known to be."""
    described = facts.loader_of(rank, loader) or (facts.loader if loader == 0 else None)
    if described is None or described.start_method != "fork":
        return None

    if not facts.workers.copies(rank, loader):
        return None

    text = (
        " These are copies of memory shared since the fork: reading a Python object updates its reference count, which "
        "copies its page, until all are copied."
    )
    if not described.objects:
        return Explanation(text, f"Keep what the Dataset holds {_AS_ARRAYS}", {"copies": True})

    held = described.objects[0]
    what = f" {held['path']} is a {held['type']} of {plural(held['count'], 'object')} ({held['of']})."
    evidence = {"copies": True, "attribute": held["path"], "objects": held["count"], "object_type": held["of"]}
    return Explanation(f"{text}{what}", f"Keep {held['path']} {_AS_ARRAYS}", evidence)


_AS_ARRAYS = (
    "in a numpy array or a tensor (strings as one byte array with offsets) instead of Python objects: an array has "
    "one reference count for all elements, so workers keep sharing its memory."
)
