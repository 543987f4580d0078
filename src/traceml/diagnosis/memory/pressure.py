"""Memory that is nearly full, or given back to the driver in each step, and ranks that need more than the others."""

from __future__ import annotations

from statistics import median

from traceml.database.schema import Resource
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.memory_growth import DeviceMemory, HostMemory
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.formatting import bytes_text, capitalized, line_text, percent_text, plural, ranks_text

__all__ = ["allocator_churn", "full_devices", "full_hosts", "memory_imbalance"]

FULL_SHARE = 0.93
"""Memory is nearly full from this used share on; of a device, the peak counts."""
MIN_RETRIES = 5
"""So many allocations that needed the cache to be freed are pressure, too."""
UNEVEN = 1.25
"""A rank needs this many times the median of the ranks, to be reported."""
UNEVEN_SHARE = 0.10
"""The difference is also this share of the memory that there is."""
TIGHT_SHARE = 0.85
"""The largest rank is a warning from this share of its memory on; below, tensors leave room on a device."""
MIN_PER_STEP = 0.9
"""Blocks per step that are given back and requested again, from which on the loop does it."""
_EMPTIES = " empty_cache"
_CAUSES = (
    "the script or a library calls torch.cuda.empty_cache() in the loop, or garbage_collection_threshold of "
    "PYTORCH_CUDA_ALLOC_CONF is low"
)
_OF_OTHERS = (
    "Tensors leave room on the device: look for other programs on it (nvidia-smi), and set "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which avoids memory lost to fragmentation."
)


def full_hosts(facts: JobFacts) -> Finding | None:
    """Return the finding about hosts whose memory is nearly full."""
    # That of a container is reported as its limit.
    limited = {facts.hosts.get(use.rank) for use in facts.limits if use.resource is Resource.MEMORY and use.is_near}
    full = {
        rank: host
        for rank, host in facts.memory.hosts().items()
        if host.held_share >= FULL_SHARE and facts.hosts.get(rank) not in limited
    }
    if not full:
        return None

    rank = max(full, key=lambda each: full[each].held_share)
    others = len({facts.hosts.get(each) for each in full}) - 1  # of one host several ranks may tell
    return _full_host(facts, rank, full[rank], others=others)


def _full_host(facts: JobFacts, rank: int, host: HostMemory, *, others: int) -> Finding:
    name = facts.hosts.get(rank)
    own = sum(size for each, size in facts.memory.resident().items() if facts.hosts.get(each) == name)
    at = facts.of_host(rank) or " of the host"
    share = host.used_bytes / max(host.total_bytes, 1)
    # Files that several ranks map are in the resident memory of each.
    held = f"; the training processes hold {bytes_text(own)}" if own <= host.used_bytes else ""
    too = f" The memory of {plural(others, 'other host')} is nearly full, too." if others else ""
    return Finding.of(
        Kind.MEMORY_PRESSURE,
        summary=(
            f"The memory{at} is nearly full: {bytes_text(host.used_bytes)} of {bytes_text(host.total_bytes)} are in "
            f"use ({percent_text(share)}){held}.{too}"
        ),
        next=_for_full_host(facts, host, own),
        evidence={
            "memory": "host",
            "used_bytes": host.used_bytes,
            "limit_bytes": host.total_bytes,
            "used_share": share,
            "ranks_bytes": own,
        },
    )


def _for_full_host(facts: JobFacts, host: HostMemory, own: int) -> str:
    """Return advice on a host that is nearly full.

    Args:
        own: bytes that the training processes hold.
    """
    if facts.has_loader_workers:
        less = "Use fewer loader workers, a smaller prefetch_factor or data set in memory, or"
    elif own >= host.used_bytes / 2:
        less = "Use a smaller data set in memory, or"
    else:
        less = "Look at what else holds it (other processes, which `top` names, or files in /dev/shm), or use"

    return f"{less} a host with more memory: when it is full, the kernel kills the largest process."


def full_devices(facts: JobFacts) -> Finding | None:
    """Return the finding about devices whose memory is nearly full."""
    known = [each for each in facts.memory.devices() if each.total_bytes > 0]
    full = [each for each in known if _share(each) >= FULL_SHARE or each.retries >= MIN_RETRIES]
    if not full:
        return None

    worst = max(full, key=lambda each: (each.retries >= MIN_RETRIES, _share(each)))
    ranks = {each.rank for each in full}
    retried = (
        f" {plural(worst.retries, 'allocation')} succeeded only after torch had freed its cache, which takes time."
        if worst.retries
        else ""
    )
    of_all = f" {len(ranks)} of {facts.world_size} ranks are short of device memory." if len(ranks) > 1 else ""
    device = f"the device of {ranks_text((worst.rank,))}" if facts.world_size > 1 else "the device"
    return Finding.of(
        Kind.MEMORY_PRESSURE,
        ranks=() if len(ranks) >= facts.world_size else tuple(sorted(ranks)),
        summary=(
            f"Tensors took up to {bytes_text(worst.peak_bytes)} of the {bytes_text(worst.total_bytes)} of {device} "
            f"({percent_text(_share(worst))}).{retried}{of_all}"
        ),
        next=_for_smaller(facts) if _share(worst) >= TIGHT_SHARE else _OF_OTHERS,
        evidence={
            "memory": "device",
            "used_bytes": worst.peak_bytes,
            "limit_bytes": worst.total_bytes,
            "used_share": _share(worst),
            "alloc_retries": worst.retries,
        },
    )


def _for_smaller(facts: JobFacts) -> str:
    lower = ", or a lower precision" * (not facts.has_16_bits)
    return (
        f"Use a smaller batch with gradient accumulation{',' if lower else ' or'} activation checkpointing{lower}; "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True avoids memory lost to fragmentation."
    )


def _share(device: DeviceMemory) -> float:
    return device.peak_bytes / max(device.total_bytes, 1)


def memory_imbalance(facts: JobFacts) -> Finding | None:
    """Return the finding about a rank that needs much more memory than the others, of devices or else of hosts."""
    devices = facts.memory.devices()
    if devices:
        ranks = {each.rank for each in devices}
        peaks = {rank: max(each.peak_bytes for each in devices if each.rank == rank) for rank in ranks}
        return _uneven(peaks, min(each.total_bytes for each in devices), "device memory")

    hosts = facts.memory.hosts()
    total = min((host.total_bytes for host in hosts.values()), default=0)
    return _uneven(facts.memory.resident(), total, "host memory")


def _uneven(needs: dict[int, int], total: int, words: str) -> Finding | None:
    if len(needs) < 2 or total <= 0:
        return None

    rank = max(needs, key=lambda each: needs[each])
    most, usual = needs[rank], median(size for each, size in needs.items() if each != rank)
    if most < UNEVEN * usual or most - usual < UNEVEN_SHARE * total:
        return None

    tight = words.startswith("device") and most >= TIGHT_SHARE * total
    return Finding.of(
        Kind.MEMORY_IMBALANCE,
        severity=Severity.WARNING if tight else Severity.INFO,
        ranks=(rank,),
        summary=(
            f"{capitalized(ranks_text((rank,)))} takes {bytes_text(most)} of {words}, the others "
            f"{bytes_text(int(usual))} (median)."
        ),
        next=(
            f"Look at what only {ranks_text((rank,))} holds: gathered outputs, evaluation, a second model, longer "
            "sequences, or checkpoints that are loaded on its device (map_location)."
        ),
        evidence={
            "memory": words.partition(" ")[0],
            "most_bytes": most,
            "median_bytes": usual,
            "limit_bytes": total,
            "ratio": most / max(usual, 1),
        },
    )


def allocator_churn(facts: JobFacts) -> Finding | None:
    """Return the finding about ranks that give device memory back in each step: `empty_cache()` in the loop.

    An allocator that lacks memory does so too: that is pressure, unless the call was seen.
    """
    lacking = {(each.rank, each.device) for each in facts.memory.devices() if each.retries}
    steady = facts.turnover.steady(facts.last_step, MIN_PER_STEP)
    found = {key: each for key, each in steady.items() if key not in lacking or _empties_at(key[0], facts)}
    if not found:
        return None

    ranks = tuple(sorted({rank for rank, _ in found}))
    worst = max(found, key=lambda key: found[key].per_step)
    turnover, place = found[worst], _empties_at(worst[0], facts)
    gives, requests = ("give", "request") if len(ranks) > 1 else ("gives", "requests")
    cause = f"empty_cache() is called at {line_text(*place)}" if place else _CAUSES
    return Finding.of(
        Kind.ALLOCATOR_CHURN,
        ranks=ranks if len(ranks) < facts.world_size else (),
        summary=(
            f"{capitalized(ranks_text(ranks))} {gives} {turnover.per_step:.1f} blocks of device memory per step "
            f"back to the driver and {requests} as many again: {cause}."
        ),
        next=(
            "Do not empty the cache in the loop: torch reuses freed memory automatically, and each call waits for "
            "the device. Against fragmentation set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
        ),
        evidence={
            "blocks_per_step": turnover.per_step,
            "device": turnover.device,
            "since_step": turnover.first_step,
            **(dict(zip(("file", "line", "function"), place, strict=True)) if place else {}),
        },
    )


def _empties_at(rank: int, facts: JobFacts) -> tuple[str, int, str] | None:
    """Return the user's line that was seen most in `empty_cache`; None if it was not seen."""
    seen = [each for each in facts.lines if each.rank == rank and (each.library or "").endswith(_EMPTIES)]
    most = max((each for each in seen if each.file), key=lambda each: each.samples, default=None)
    return None if most is None else (str(most.file), int(most.line or 0), str(most.function))
