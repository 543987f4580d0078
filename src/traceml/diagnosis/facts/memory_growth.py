"""Memory over the run, by rank: steady growth apart from caches that fill and peaks that pass; and its last minute.

Few samples are kept, evenly spread over the run. Each stands for several and is the lowest of them, so that peaks of a
checkpoint or an evaluation do not count.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from itertools import pairwise

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows, rows_by

__all__ = ["DeviceMemory", "EndMemory", "GrowthEstimate", "HostMemory", "MemoryCurve", "MemoryHistory", "MemoryKind"]

MAX_POINTS = 96
"""Samples that are kept of each curve."""
MIN_GROWN_BYTES = 32 << 20
"""Growth below this is not reported: an allocator's arenas, torch.compile, and lazy imports cost that much."""
MIN_GROWN_SHARE = 0.05
"""Growth below this share of the memory in use is not reported."""
STEADY = 0.97
"""Share of pairs of samples that rise with time, from which on growth is steady; of stairs, those that do not fall."""
MIN_RISES = 0.45
"""Share of the parts of the run that must rise: growth in each epoch makes stairs, and a few stairs are not a leak."""
MIN_S = 3.0
"""Samples must cover at least this many seconds, and `MIN_STEPS` steps or `LONG_S` seconds."""
MIN_STEPS, LONG_S = 60, 30.0  # LBFGS fills its history of 100 updates within 50 steps
_PARTS = 24
_MIN_SAMPLES = 8
_WARM_UP_STEPS = 20
_LATE = 0.5  # share of the samples, the newest ones, in which a leak is looked for that begins late
_NEWEST = 3
_MAX_RISE = 2.5  # of the median rise of a part, of growth that begins late
_LEVEL_SHARE = 0.1  # of the mean rise of a part: on a stair, some pages come and go
_UNEVEN_PARTS = 1.5  # stairs begin somewhere in a part, so that the distances between them differ by this many
_MIN_RISE = 0.25  # of the mean rise of a quarter, for each quarter
_MIN_LATE_RISE = 0.4  # of the mean rise of a part, for the newest ones: what slows down more is a cache that fills
_LATELY = 6  # the newest parts are one in this many
_RECENT = 12
_TAIL_NS = 60 * 10**9
_TAIL_ROWS = 256  # a sample is taken twice a second at most
_MIN_TAIL_ROWS, _MIN_TAIL_NS = 3, 10**9
# Of the growth, the first half of the time has this share; else it was a jump, for which a rate means nothing.
_STEADY_HALF = (0.25, 0.75)
_Points = NDArray[np.int64]  # rows of (step, t_ns, bytes)


class MemoryKind(StrEnum):
    """A kind of memory that may grow; the value is its name in evidence."""

    RESIDENT = "resident"  # of a rank's process
    DEVICE = "device"  # that torch has allocated on a device
    PINNED = "pinned"  # page-locked memory of the host
    WORKERS = "workers"  # private memory of a rank's loader workers, all together


class GrowthEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Growth of a curve after its warm-up."""

    bytes_per_step: float  # the median slope
    bytes_per_s: float
    grown_bytes: int  # growth from the first quarter of the time, or of the steps, to the last
    since_step: int  # first step of the samples
    now_bytes: int
    rises: bool  # whether each quarter of it is above the one before, by an amount that counts
    steady: bool  # whether it also grew all the time; else it may be noise, or copies that come and go
    in_stairs: bool = False  # whether it did not rise from each part of the run to the next one
    samples: int = 0  # number of samples that it was seen in
    swing_bytes: float = 0.0  # the mean difference from one of them to the next


class MemoryCurve:
    """Samples of one memory of one rank, thinned evenly: the lowest of each few."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._points: _Points = np.empty((0, 3), np.int64)
        self._rest = self._points  # samples that do not fill a point yet
        self._every = 1
        self._growth: tuple[GrowthEstimate | None] | None = None  # until the next samples
        self._newest: tuple[int | None] | None = None

    def add(self, steps: _Points, times: _Points, values: _Points) -> None:
        """Take samples in order; those before the first step are left out."""
        self._growth = self._newest = None
        new = np.stack([steps, times, values], axis=1).astype(np.int64)[steps >= 0]
        if len(new) and len(self.points) and new[0, 0] < self.points[-1, 0]:
            self._clear()  # another process of the same rank

        rest = np.concatenate([self._rest, new])
        whole = len(rest) // self._every * self._every
        self._points = np.concatenate([self._points, _lowest(rest[:whole], self._every)])
        self._rest = rest[whole:]
        while len(self._points) > MAX_POINTS:
            even = len(self._points) // 2 * 2
            odd = self._points[even:]
            self._points, self._every = _lowest(self._points[:even], 2), 2 * self._every
            self._rest = np.concatenate([odd, self._rest])

    @property
    def points(self) -> _Points:
        """Rows of (step, monotonic ns, bytes), in order."""
        return np.concatenate([self._points, _lowest(self._rest, len(self._rest))])

    def newest(self) -> int | None:
        """Return the bytes of the last point in training; None without any."""
        if self._newest is None:  # asked for each second, of thousands of ranks that sample once a minute
            points = self.points
            # At the newest step the training may be over, and the script may have dropped what it held.
            trained = points[points[:, 0] < points[-1, 0]] if len(points) else points
            self._newest = (int((trained if len(trained) else points)[-1, 2]) if len(points) else None,)

        return self._newest[0]

    def growth(self) -> GrowthEstimate | None:
        """Return the growth after warm-up; None with too few samples."""
        if self._growth is None:  # verdict and report ask for the same
            self._growth = (_growth_of(self.points),)

        return self._growth[0]

    def since_it_began(self, growth: GrowthEstimate) -> GrowthEstimate:
        """Return its growth with the step at which memory left its level, and with all that it grew since.

        The level, and the line of that growth from some sample on, fit all samples best there.
        """
        points = self.points
        points = points[(points[:, 0] >= min(_WARM_UP_STEPS, growth.since_step)) & (points[:, 0] < points[-1, 0])]
        steps, _, values = points.T.astype(float)
        levels = np.array([np.median(values[: at + 1]) for at in range(len(points))])
        lines = levels[:, None] + growth.bytes_per_step * np.maximum(steps - steps[:, None], 0.0)
        at = int(np.abs(values - lines).sum(axis=1).argmin())
        return replace(growth, since_step=int(steps[at]), grown_bytes=int(growth.now_bytes - levels[at]))


def _growth_of(points: _Points) -> GrowthEstimate | None:
    if not len(points):
        return None

    first, last = int(points[0, 0]), int(points[-1, 0])
    # Samples at the newest step may be of the time after training, when the script drops what it held.
    points = points[(points[:, 0] >= max(_WARM_UP_STEPS, first + (last - first) // 4)) & (points[:, 0] < last)]
    growth = _estimate(points)
    if growth is None or growth.steady:
        return growth

    return _late(points) or growth


def _late(points: _Points) -> GrowthEstimate | None:
    """Return the growth in the newest samples.

    None unless memory rises all the time there, and above what it was before: lists of an epoch grow again in the next.
    """
    count = int(_LATE * len(points))
    before, newest = points[:-count, 2], points[-count:]
    growth = _estimate(newest)
    if growth is None or not growth.steady or growth.in_stairs or not _is_even(newest):
        return None

    if newest[-1, 2] - newest[0, 2] < before[-1] - before[0]:
        return None  # it did not begin late, but slowed down

    return growth if newest[-_NEWEST:, 2].min() - before.max() >= _least_bytes(growth.now_bytes) else None


def _estimate(points: _Points) -> GrowthEstimate | None:
    if len(points) < _MIN_SAMPLES or 1 + np.count_nonzero(np.diff(points[:, 0])) < _MIN_SAMPLES:
        return None

    count = min(_PARTS, len(points) // 2)
    steps, times, values = _lowest_of_parts(points, count).T.astype(float)
    values[:-1] = np.minimum(values[:-1], values[1:])  # a copy passes: what grows by copies briefly exists twice
    first, second = _pairs(count)
    apart = steps[second] > steps[first]
    first, second = first[apart], second[apart]
    if not len(first):
        return None

    rises = values[second] - values[first]
    quarters = [statistics.median(part.tolist()) for part in np.array_split(values, 4)]
    if not _all_rise(quarters) and _all_rise(by_steps := _of_steps(steps, values)):
        quarters = by_steps

    grown = quarters[-1] - quarters[0]
    least = _least_bytes(values[-1])
    level = _LEVEL_SHARE * grown / count
    passed, seconds = points[-1, 0] - points[0, 0], (points[-1, 1] - points[0, 1]) / 1e9
    is_long = seconds >= MIN_S and (passed >= MIN_STEPS or seconds >= LONG_S)
    is_grown = _all_rise(quarters) and _rises_lately(steps, values) and grown >= least and is_long
    in_stairs = float((rises > 0).mean()) < STEADY
    is_even = not in_stairs or _is_in_stairs(steps, values, rises, level)
    return GrowthEstimate(
        bytes_per_step=_median(rises / (steps[second] - steps[first])),
        bytes_per_s=_median(rises / np.maximum(times[second] - times[first], 1.0)) * 1e9,
        grown_bytes=int(grown),
        since_step=int(points[0, 0]),
        now_bytes=int(points[-1, 2]),
        rises=bool(is_grown),
        steady=bool(is_grown and is_even),
        in_stairs=in_stairs,
        samples=len(points),
        swing_bytes=float(np.abs(np.diff(points[:, 2])).mean()),
    )


def _is_even(points: _Points) -> bool:
    """Return whether no part rises much more than others: a few jumps rise all the time, too, in few points."""
    rises = np.diff(_lowest_of_parts(points, min(_PARTS, len(points) // 2))[:, 2])
    return bool(rises.max() <= _MAX_RISE * np.median(rises))


def _least_bytes(used_bytes: float) -> float:
    return max(MIN_GROWN_BYTES, MIN_GROWN_SHARE * used_bytes)


def _all_rise(quarters: list[float]) -> bool:
    """Return whether each quarter is above the one before, by an amount that counts."""
    least = _MIN_RISE * (quarters[-1] - quarters[0]) / 3
    return min(later - earlier for earlier, later in pairwise(quarters)) >= least


def _rises_lately(steps: NDArray[np.float64], values: NDArray[np.float64]) -> bool:
    """Return whether the newest parts rise, by time or by steps: not after growth has ended, or clearly slowed down."""
    since = -1 - max(len(values) // _LATELY, 2)
    share = min((-1 - since) / (len(values) - 1), (steps[-1] - steps[since]) / max(steps[-1] - steps[0], 1.0))
    return bool(values[-1] - values[since] >= _MIN_LATE_RISE * share * (values[-1] - values[0]))


def _of_steps(steps: NDArray[np.float64], values: NDArray[np.float64]) -> list[float]:
    """Return the memory in each quarter of the steps: a leak that slows them down grows less and less with time."""
    edges = np.linspace(steps[0], steps[-1], 5)
    parts = np.split(values, np.searchsorted(steps, edges[1:-1]))
    middles = np.interp((edges[1:] + edges[:-1]) / 2, steps, values).tolist()
    return [
        statistics.median(part.tolist()) if len(part) else middle for part, middle in zip(parts, middles, strict=True)
    ]


def _is_in_stairs(
    steps: NDArray[np.float64], values: NDArray[np.float64], rises: NDArray[np.float64], level: float
) -> bool:
    """Whether memory grows by stairs that come evenly, as epochs do, and is level between them.

    Irregular jumps are not a leak: each has its own cause.

    Args:
        rises: between all pairs of values.
        level: smaller differences do not count.
    """
    at = np.flatnonzero(np.diff(values) > level)
    if float((rises >= -level).mean()) < STEADY or len(at) < MIN_RISES * len(values):
        return False

    return bool(np.ptp(np.diff(steps[at])) <= _UNEVEN_PARTS * np.diff(steps).max())


@cache
def _pairs(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    first, second = np.triu_indices(count, 1)
    return first, second


def _median(values: NDArray[np.float64]) -> float:
    """Return the median; `np.median` takes several times as long, which counts for a thousand ranks."""
    half = len(values) // 2
    if len(values) % 2:
        return float(np.partition(values, half)[half])

    return float(np.partition(values, (half - 1, half))[half - 1 : half + 1].mean())


def _lowest(points: _Points, every: int) -> _Points:
    """Return the point with the fewest bytes of each group of `every`."""
    if not len(points):
        return points

    groups = points.reshape(-1, every, 3)
    lowest: _Points = groups[np.arange(len(groups)), groups[:, :, 2].argmin(axis=1)]
    return lowest


def _lowest_of_parts(points: _Points, count: int) -> _Points:
    """Return the point with the fewest bytes of each of `count` parts; the first ones are longer by one point."""
    each, longer = divmod(len(points), count)
    cut = longer * (each + 1)
    return np.concatenate([_lowest(points[:cut], each + 1), _lowest(points[cut:], each)])


class EndMemory(msgspec.Struct, frozen=True):
    """Resident memory of a rank, or private memory of its loader's workers, in the last sample."""

    used_bytes: int
    peak_bytes: int  # of all samples
    # its growth until then, of the last minute at most; None if it did not grow, or by a jump
    per_minute_bytes: int | None


class MemoryTail:
    """Samples of the last minute of one rank's memory."""

    def __init__(self) -> None:
        self._times: NDArray[np.int64] = np.empty(0, np.int64)
        self._sizes: NDArray[np.int64] = np.empty(0, np.int64)
        self._peak = 0
        self._training = False

    def add(self, times_ns: NDArray[np.int64], sizes: NDArray[np.int64], training: NDArray[np.bool_]) -> None:
        """Take samples in order: monotonic nanoseconds, bytes, and whether the first step had begun."""
        if not len(times_ns):
            return

        if not self._training and training.any():  # imports and data that are loaded are no growth of the training
            self._times, self._sizes, self._training = self._times[:0], self._sizes[:0], True

        if self._training:
            times_ns, sizes = times_ns[training], sizes[training]
            if not len(times_ns):
                return

        times, sizes = np.concatenate([self._times, times_ns]), np.concatenate([self._sizes, sizes])
        recent = times >= times[-1] - _TAIL_NS
        self._times, self._sizes = times[recent][-_TAIL_ROWS:], sizes[recent][-_TAIL_ROWS:]
        self._peak = max(self._peak, int(sizes.max()))

    def at_end(self, *, trained: bool = False) -> EndMemory | None:
        """Return the memory in the last sample; None without any.

        Args:
            trained: whether the rank has trained, maybe too short for a sample: what it loaded before is no growth.
        """
        if not len(self._sizes):
            return None

        rate = None if trained and not self._training else self._per_minute()
        return EndMemory(int(self._sizes[-1]), self._peak, rate)

    def _per_minute(self) -> int | None:
        """Return the growth of the longest part up to the end that is steady: it may have begun late."""
        count = len(self._times)
        while count >= _MIN_TAIL_ROWS:
            if (rate := _steady_rate(self._times[-count:], self._sizes[-count:])) is not None:
                return rate

            count -= max(count // 4, 1)

        return None


def _steady_rate(times: NDArray[np.int64], sizes: NDArray[np.int64]) -> int | None:
    passed_ns, grown = int(times[-1] - times[0]), int(sizes[-1] - sizes[0])
    if passed_ns < _MIN_TAIL_NS or grown <= 0:
        return None

    half = float(np.interp(times[0] + passed_ns / 2, times, sizes)) - float(sizes[0])
    return int(grown * 60e9 / passed_ns) if _STEADY_HALF[0] * grown <= half <= _STEADY_HALF[1] * grown else None


class HostMemory(msgspec.Struct, frozen=True):
    """Memory of a host, or of its container where that has a limit."""

    used_bytes: int  # in use in the newest sample, without file cache
    total_bytes: int
    held_share: float  # used share that no recent sample is below


class DeviceMemory(msgspec.Struct, frozen=True):
    """Memory of a device as torch's allocator in one rank sees it."""

    rank: int
    device: int  # the rank's number of it
    allocated_bytes: int  # in use now
    peak_bytes: int  # in use at most so far
    total_bytes: int
    retries: int  # allocations that succeeded only after the cache was freed


_OF_DEVICE = {
    "allocated_bytes": "allocated_bytes",
    "peak_bytes": "peak_allocated_bytes",
    "total_bytes": "total_bytes",
    "retries": "alloc_retries",
}


class MemoryHistory:
    """Memory of ranks, devices, workers and hosts: curves by rank, kind and device, and the newest samples."""

    def __init__(self) -> None:
        self._curves: dict[tuple[int, MemoryKind, int], MemoryCurve] = {}
        self._hosts: dict[int, NDArray[np.void]] = {}
        self._host_memory: dict[int, HostMemory] = {}
        self._tails: defaultdict[tuple[int, MemoryKind], MemoryTail] = defaultdict(MemoryTail)
        self._devices: dict[tuple[int, int], DeviceMemory] = {}

    def process_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.PROCESS`, in order."""
        self.curve(rank, MemoryKind.RESIDENT).add(rows["step"], rows["t_ns"], rows["rss_bytes"])
        self._tails[rank, MemoryKind.RESIDENT].add(rows["t_ns"], rows["rss_bytes"], rows["step"] >= 0)

    def host_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.HOST`, in order, of the rank that samples its host."""
        known = self._hosts.get(rank)
        recent = self._hosts[rank] = (rows if known is None else join_rows([known, rows]))[-_RECENT:]
        if len(recent):
            used, total = recent["memory_used_bytes"], int(recent["memory_total_bytes"][-1])
            self._host_memory[rank] = HostMemory(int(used[-1]), total, int(used.min()) / max(total, 1))

    def device_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.TORCH_MEMORY`, in order."""
        for device, own in rows_by(rows, "device"):
            self.curve(rank, MemoryKind.DEVICE, device).add(own["step"], own["t_ns"], own["allocated_bytes"])
            newest = {field: int(own[name][-1]) for field, name in _OF_DEVICE.items()}
            self._devices[rank, device] = DeviceMemory(rank, device, **newest)

        if len(rows):  # pinned memory is the process's: each device's row has it
            first = rows[rows["device"] == rows["device"].min()]
            self.curve(rank, MemoryKind.PINNED).add(first["step"], first["t_ns"], first["pinned_bytes"])

    def worker_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.LOADER_WORKERS`, in order; the device of a curve is the loader's number."""
        known = rows[rows["private_bytes"] >= 0]
        for loader, own in rows_by(known, "loader"):
            self.curve(rank, MemoryKind.WORKERS, loader).add(own["step"], own["t_ns"], own["private_bytes"])
            self._tails[rank, MemoryKind.WORKERS].add(own["t_ns"], own["private_bytes"], own["step"] >= 0)

    def curve(self, rank: int, kind: MemoryKind, device: int = 0) -> MemoryCurve:
        """Return the curve of a memory; an empty one where there are no samples yet."""
        return self._curves.setdefault((rank, kind, device), MemoryCurve())

    def resident(self) -> dict[int, int]:
        """Return the newest resident memory of each rank."""
        found = {rank: curve.newest() for (rank, kind, _), curve in self._curves.items() if kind is MemoryKind.RESIDENT}
        return {rank: size for rank, size in sorted(found.items()) if size is not None}

    def at_end(self, rank: int, kind: MemoryKind = MemoryKind.RESIDENT, *, trained: bool = False) -> EndMemory | None:
        """Return the memory of a rank, or of all workers of its loader, in the last sample; None without any."""
        return self._tails[rank, kind].at_end(trained=trained)

    def hosts(self) -> dict[int, HostMemory]:
        """Return the memory of each host, by the rank that samples it."""
        return dict(sorted(self._host_memory.items()))

    def devices(self) -> list[DeviceMemory]:
        """Return the memory of each rank's devices."""
        return [found for _, found in sorted(self._devices.items())]

    def rising(self) -> Iterator[tuple[int, MemoryKind, int, GrowthEstimate]]:
        """Yield (rank, kind, device, growth) of each memory that rises, by rank."""
        for (rank, kind, device), curve in sorted(self._curves.items()):
            growth = curve.growth()
            if growth is not None and growth.rises:
                yield rank, kind, device, growth

    def steady(self) -> Iterator[tuple[int, MemoryKind, int, GrowthEstimate]]:
        """Yield (rank, kind, device, growth) of each memory that grows steadily, by rank."""
        return (each for each in self.rising() if each[3].steady)
