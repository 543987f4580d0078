"""Samples of torch's allocator on each device that this rank uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.database.schema import TORCH_MEMORY, Table
from traceml.samplers.base import Sampler, SampleRow

__all__ = ["SegmentWatch", "TorchMemorySampler", "initialized_cuda"]

_UNUSED_EVERY = 10  # samples between two looks at a device without allocations
_FIRST_NS = 5 * 10**9
_LATER = 4
"""Later rows come after a quarter of the time so far, so that a long run has few of them."""


class _Count(NamedTuple):
    t_ns: int
    step: int
    requested: int
    given_back: int


class SegmentWatch:
    """Notes the turnover of each device; one that only requests memory, as all do at first, is not noted.

    A row `segments` has `{"device", "from_step", "step", "requested", "given_back"}`, counted between the two steps.
    """

    def __init__(self, note: InfoSender) -> None:
        self._note = note
        self._began_ns: dict[int, int] = {}
        self._before: dict[int, _Count] = {}

    def take(self, t_ns: int, step: int, device: int, figures: Mapping[str, Any]) -> None:
        """Take a sample.

        Args:
            figures: what `torch.cuda.memory_stats` returned.
        """
        now = _Count(t_ns, step, *(int(figures.get(f"segment.all.{name}", 0)) for name in ("allocated", "freed")))
        before = self._before.get(device)
        if step < 0:
            return

        if before is None or step < before.step:
            self._began_ns[device], self._before[device] = t_ns, now
        elif t_ns - before.t_ns >= max(_FIRST_NS, (before.t_ns - self._began_ns[device]) // _LATER):
            self._before[device] = now
            self._append(device, before, now)

    def _append(self, device: int, before: _Count, now: _Count) -> None:
        requested, given_back = now.requested - before.requested, now.given_back - before.given_back
        if requested > 0 and given_back > 0:
            self._note(
                InfoKind.SEGMENTS, device=device, from_step=before.step, step=now.step, requested=requested,
                given_back=given_back,
            )  # fmt: skip


class TorchMemorySampler(Sampler):
    """Samples torch.cuda's allocator after the script has initialized CUDA; before, it calls neither.

    Args:
        modules: the loaded modules; None: `sys.modules`.
        note: appends a row to `info`, about memory that is given back and requested again.
    """

    name: ClassVar[str] = "torch_memory"
    table: ClassVar[Table] = TORCH_MEMORY

    def __init__(self, modules: Any = None, note: InfoSender | None = None) -> None:
        self._segments = None if note is None else SegmentWatch(note)
        self._modules = sys.modules if modules is None else modules
        self._used: set[int] = set()
        self._samples = 0

    def sample(self, t_ns: int, step: int) -> Iterator[SampleRow]:
        """Yield one row per device on which this process has allocated."""
        cuda = initialized_cuda(self._modules)
        if cuda is None:
            return

        self._samples += 1
        for device in range(cuda.device_count()):
            # A rank sees all devices of its host, and uses one. Each reading holds the GIL for some 0.1 ms.
            if self._used and device not in self._used and self._samples % _UNUSED_EVERY != 1:
                continue

            figures = cuda.memory_stats(device)
            reserved = figures.get("reserved_bytes.all.current", 0)
            peak = figures.get("allocated_bytes.all.peak", 0)
            if self._segments is not None:
                self._segments.take(t_ns, step, device, figures)

            if reserved or peak:
                self._used.add(device)
                allocated = figures.get("allocated_bytes.all.current", 0)
                total = int(cuda.get_device_properties(device).total_memory)
                retries = figures.get("num_alloc_retries", 0)
                yield t_ns, step, device, allocated, reserved, peak, total, retries, _pinned_bytes(cuda)


def initialized_cuda(modules: Any = sys.modules) -> Any:
    """Return `torch.cuda` if the script has initialized it, else None: asking more would initialize it."""
    cuda = getattr(modules.get("torch"), "cuda", None)  # None, too, while torch is still being imported
    return cuda if cuda is not None and cuda.is_initialized() else None


def _pinned_bytes(cuda: Any) -> int:
    """Return the pinned memory in use; -1 where this torch does not count it."""
    read = getattr(cuda, "host_memory_stats_as_nested_dict", None)
    found = read() if read is not None else {}
    return int(found.get("active_bytes", found.get("allocated_bytes", {})).get("current", -1))
