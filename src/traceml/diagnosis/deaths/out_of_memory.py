"""Ends for lack of memory: killed by the kernel, or by an allocation that failed; with the memory at the end."""

from __future__ import annotations

import re
import signal

import msgspec
from msgspec.structs import asdict

from traceml.database.schema import Resource
from traceml.diagnosis.facts.ends import LostWorker, RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.memory_growth import MemoryKind
from traceml.formatting import bytes_text

__all__ = ["MemoryEnd", "is_out_of_memory", "memory_end", "memory_end_of_worker"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = r"(?P<size>\d+(?:\.\d*)?) ?(?P<unit>[KMGT]?)i?(?:B|b|bytes)\b"
# What allocators say: torch's of the CPU, of devices (CUDA, HIP, XPU), NumPy's.
_REQUESTED = re.compile(rf"(?:tried|unable) to (?:allocate|mmap) {_SIZE}", re.IGNORECASE)
_OF_DEVICE = re.compile(r"\b(cuda|hip|xpu|mps)\b[^.\n]*out of memory|OutOfMemoryError", re.IGNORECASE)
_OF_HOST = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|^(?:\S*\.)?_?(?:Array)?MemoryError\b|"
    r"Cannot allocate memory|std::bad_alloc",
    re.MULTILINE,
)
_CAPACITY = re.compile(rf"total capacity of {_SIZE}")
_IN_USE = re.compile(rf"this process has {_SIZE} memory in use")
_MIN_GROWN = 16 << 20


class MemoryEnd(msgspec.Struct, frozen=True):
    """An end for lack of memory, and what is known of the memory then."""

    cause: str  # `killed` by the kernel, `host_allocation` or `device_allocation` that failed
    certain: bool = True  # whether the kernel's counter is that of the rank's own cgroup; else of the whole host
    requested_bytes: int | None = None
    # resident memory, or memory allocated on the device, in the last sample; on CUDA what the error itself says
    used_bytes: int | None = None
    peak_bytes: int | None = None
    # growth of resident memory over the last minute; None if it did not grow steadily
    per_minute_bytes: int | None = None
    # what there was: the cgroup's limit, the host's memory, the device's, or that of `ulimit -v`
    limit_bytes: int | None = None
    limit_of: str = "host"  # `group`, `host`, `device` or `address_space`
    of_workers: bool = False  # whether the memory is that of all workers of the rank's loader: one of them was killed

    def words(self) -> str:
        """Return what a sentence says about the memory: `; it used 1.2 GiB, …`; empty if nothing is known."""
        if self.used_bytes is None:
            return ""

        where = " of device memory" if self.limit_of == "device" else ""
        grew = f", {bytes_text(self.per_minute_bytes)} more each minute" if self.grows else ""
        whose = "the loader's workers" if self.of_workers else "it"
        return f"; {whose} used {bytes_text(self.used_bytes)}{where}{grew}{self._limit_words()}"

    @property
    def grows(self) -> bool:
        """Whether resident memory grew steadily until the end, by an amount that counts."""
        return (self.per_minute_bytes or 0) >= _MIN_GROWN and not self.is_too_large

    @property
    def is_too_large(self) -> bool:
        """Whether the allocation that failed alone is larger than all the memory that there is."""
        asked, limit = self.requested_bytes, self.limit_bytes
        return asked is not None and limit is not None and asked > limit

    def _limit_words(self) -> str:
        if self.limit_bytes is None:
            return ""

        limit = bytes_text(self.limit_bytes)
        if self.limit_of == "group":
            return f", with a limit of {limit} for its cgroup"
        if self.limit_of == "address_space":
            return f", with a limit of {limit} for its address space (ulimit -v)"

        return f"; the {self.limit_of} has {limit}"

    def evidence(self) -> dict[str, object]:
        """Return the figures for a finding's evidence."""
        return {
            "cause": "out_of_memory",
            "how": self.cause,
            "requested_bytes": self.requested_bytes,
            "used_bytes": self.used_bytes,
            "peak_bytes": self.peak_bytes,
            "bytes_per_minute": self.per_minute_bytes,
            "limit_bytes": self.limit_bytes,
            "limit_of": self.limit_of if self.limit_bytes is not None else None,
        }


def is_out_of_memory(exception: str) -> bool:
    """Return whether an exception is that of an allocation that failed."""
    return bool(_OF_DEVICE.search(exception) or _OF_HOST.search(exception))


def memory_end(ended: RankExit, facts: JobFacts) -> MemoryEnd | None:
    """Return the facts of an end for lack of memory; None for any other end."""
    text = ended.exception or ""
    if _OF_DEVICE.search(text):
        return _on_device(ended, facts, text)
    if ended.oom or _OF_HOST.search(text):
        return _on_host(ended, facts, text)

    return None


def memory_end_of_worker(worker: LostWorker, rank: int, facts: JobFacts) -> MemoryEnd | None:
    """Return the facts of a loader worker's end for lack of memory; None for any other end."""
    last = facts.memory.at_end(rank, MemoryKind.WORKERS)
    if worker.signal != signal.SIGKILL or not worker.oom_kills or last is None:
        return None

    return MemoryEnd(
        cause="killed",
        **asdict(last),
        limit_bytes=worker.memory_limit_bytes,
        limit_of="group",
        of_workers=True,
    )


def _on_host(ended: RankExit, facts: JobFacts, text: str) -> MemoryEnd:
    last = facts.memory.at_end(ended.rank, trained=ended.last_step is not None)
    limit, limit_of = _host_limit(ended, facts)
    return MemoryEnd(
        cause="killed" if ended.oom else "host_allocation",
        certain=ended.oom != "host",
        requested_bytes=_size(_REQUESTED, text),
        **({} if last is None else asdict(last)),
        limit_bytes=limit,
        limit_of=limit_of,
    )


def _host_limit(ended: RankExit, facts: JobFacts) -> tuple[int | None, str]:
    """Return the memory limit of the rank, and whose it is: its own, its cgroup's, or the host's."""
    if not ended.oom and ended.address_limit_bytes is not None:
        return ended.address_limit_bytes, "address_space"

    beside = {rank for rank, host in facts.hosts.items() if host == facts.hosts.get(ended.rank)} | {ended.rank}
    for use in facts.limits:
        if use.resource is Resource.MEMORY and use.rank in beside:
            return use.limit, "group"

    sizes = [host.total_bytes for rank, host in facts.memory.hosts().items() if rank in beside]
    return (sizes[0], "host") if sizes else (None, "host")


def _on_device(ended: RankExit, facts: JobFacts, text: str) -> MemoryEnd:
    own = (each for each in facts.memory.devices() if each.rank == ended.rank)
    device = max(own, key=lambda each: each.allocated_bytes, default=None)
    total, used = _size(_CAPACITY, text), _size(_IN_USE, text)
    return MemoryEnd(
        cause="device_allocation",
        requested_bytes=_size(_REQUESTED, text),
        used_bytes=used or (device.allocated_bytes if device else None),  # the sample may be of what it began with
        peak_bytes=device.peak_bytes if device else None,
        limit_bytes=total or (device.total_bytes if device else None),
        limit_of="device",
    )


def _size(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return int(float(found["size"]) * _UNITS[found["unit"].upper()]) if found else None
