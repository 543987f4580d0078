"""Use of cores, memory and devices over the run, by ranges of steps: what changed when the steps did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows, rows_by
from traceml.database.schema import GPU, HOST, PROCESS, Table

__all__ = ["POWER_LIMIT", "SET_LIMIT", "LoweredClock", "MachineSamples", "MachineUse", "SharedDevice", "ThinnedRows"]

MAX_RANKS = 8
"""Ranks whose samples are kept: they stand for the others, and a live verdict has thousands."""
_MAX_ROWS = 1024
_MIN_PASSED_NS = 4e8
_PACE_NS = 1e9  # before a sample, whose utilization is of up to a second
_ALL = 1 << 62

POWER_LIMIT = "power limit"
REASONS = {
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake (hardware)",
    0x4: POWER_LIMIT,
}
"""Bits of NVML's throttle reasons that lower a clock below what the job asks for."""
MIN_SAMPLES = 10
"""Samples of a computing device, at least."""
MIN_SHARE = 0.3
"""Share of these in which the clock was lowered, at least."""
MIN_DROP = 0.15
"""A power limit is usual under load: it counts from this loss of clock on, against the device's other samples."""
_MIN_SHARED_SAMPLES = 5
_BUSY_PCT = 50.0
_POWER_LIMIT = 0x4
_SET_LIMIT, SET_LIMIT = 0x2, "a clock limit that was set"
_MIN_CAP = 0.25  # loss of the highest clock from which on a limit is reported: few devices keep that under load


class LoweredClock(msgspec.Struct, frozen=True, kw_only=True):
    """A device whose clock was lowered."""

    index: int  # NVML's number of the device
    reason: str
    share: float  # of the samples in which the device computed
    clock_mhz: float  # median clock while lowered
    usual_mhz: float | None  # median clock otherwise; None if it was always lowered
    temperature_c: float  # highest temperature while lowered
    power_w: float  # mean power while lowered

    @property
    def lost(self) -> float:
        """Share of the clock that is lost; 0 if the usual one is not known."""
        return max(1 - self.clock_mhz / self.usual_mhz, 0.0) if self.usual_mhz else 0.0


class SharedDevice(msgspec.Struct, frozen=True):
    """Use of a device while steps continued."""

    index: int  # NVML's number of the device
    others: float  # share of the time in which kernels of other programs ran
    utilization: float  # the same of all programs


class MachineUse(msgspec.Struct, frozen=True, kw_only=True):
    """Means over a range of steps; None if unknown."""

    # share of the time in which a rank's main thread waited for a core; that of the whole training is
    # `JobFacts.waited_share`
    waited: float | None = None
    busy_cores: float | None = None  # cores that the threads of a rank used
    host_cores: float | None = None  # cores in use on the host, by all programs
    clock_mhz: float | None = None
    temperature_c: float | None = None
    utilization: float | None = None  # share of the time in which the devices computed, 0..1
    throttled: bool | None = None  # whether faults or heat lowered the devices' clocks in most samples
    power_w: float | None = None  # median power of a device
    major_faults: float | None = None  # page faults per second that read from a disk, of a rank
    disk_read_bytes: float | None = None  # bytes per second that the host read from its disks
    # used share of the memory of the host, or of its container where that has a limit
    memory_share: float | None = None

    def others_cores(self, ranks: int = 1) -> float | None:
        """Return the cores that other programs used, beside so many ranks on the host; None if unknown."""
        if self.host_cores is None or self.busy_cores is None:
            return None

        return max(self.host_cores - ranks * self.busy_cores, 0.0)


class MachineSamples(msgspec.Struct):
    """Samples of processes, hosts and devices, by rank, thinned evenly over the run."""

    machine_cores: dict[int, int] = {}  # cores of the machine that each rank is on
    _kept: dict[tuple[str, int], ThinnedRows] = {}

    def add(self, table: str, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of a rank, in order."""
        if rank < MAX_RANKS and len(rows):
            self._kept.setdefault((table, rank), ThinnedRows()).add(rows)

    def use(self, first: int = 1, last: int = _ALL, ranks: Collection[int] = ()) -> MachineUse:
        """Return the use in steps `first` to `last`, without the last, of some ranks or of all."""
        spans = self._spans(first, last, ranks)
        processes, hosts = ([rows for _, rows in self._rows(table, spans)] for table in (PROCESS, HOST))
        return MachineUse(
            # The kernel may not count it.
            waited=_median(_rate(rows, "main_wait_ns", 1e9) for rows in processes if rows["main_wait_ns"][0] >= 0),
            busy_cores=_median(_rate(rows, "cpu_ns", 1e9) for rows in processes),
            major_faults=_median(_rate(rows, "major_faults") for rows in processes),
            host_cores=_median(
                float(rows["cpu_pct"].mean()) / 100 * self.machine_cores[rank]
                for rank, rows in self._rows(HOST, spans, least=1)  # each is a mean of the time before it
                if rank in self.machine_cores
            ),
            disk_read_bytes=_median(_rate(rows, "disk_read_bytes") for rows in hosts),
            memory_share=_median(
                float((rows["memory_used_bytes"] / np.maximum(rows["memory_total_bytes"], 1)).mean()) for rows in hosts
            ),
            **self._devices(spans),  # type: ignore[arg-type]
        )

    def background_cores(self) -> dict[int, float]:
        """Return the cores that threads other than the main one used in training, by rank."""
        found = {}
        for rank, rows in self._rows(PROCESS, self._spans()):
            if rows["main_run_ns"][0] >= 0:
                used = (_rate(rows, "cpu_ns") or 0.0) - (_rate(rows, "main_run_ns") or 0.0)
                found[rank] = max(used, 0.0) / 1e9

        return found

    def idle_ns(self) -> dict[int, tuple[float, float]]:
        """Return the wall time per step in training, and that in which the main thread slept, by rank.

        It sleeps where it neither runs nor waits for a core.
        """
        found = {}
        for rank, rows in self._rows(PROCESS, self._spans()):
            columns = ("t_ns", "main_run_ns", "main_wait_ns", "step")
            passed, ran, waited, steps = (float(rows[name][-1] - rows[name][0]) for name in columns)
            if rows["main_wait_ns"][0] >= 0 and steps > 0:
                found[rank] = passed / steps, max(passed - ran - waited, 0.0) / steps

        return found

    def shared_devices(self) -> Iterator[tuple[int, SharedDevice]]:
        """Yield (rank that sampled it, device) of the devices whose use by other programs is known."""
        for rank, rows in self._rows(GPU, self._spans()):
            known = self._while_training(rank, rows)
            known = known[(known["others_pct"] >= 0) & (known["utilization_pct"] >= 0)]
            for index, own in rows_by(known, "index"):
                if len(own) >= _MIN_SHARED_SAMPLES:
                    others, busy = (float(own[name].mean()) / 100 for name in ("others_pct", "utilization_pct"))
                    yield rank, SharedDevice(index, others, busy)

    def lowered_clocks(self) -> list[tuple[int, LoweredClock]]:
        """Return (rank that sampled it, clock) of the devices whose clocks were lowered while they computed."""
        devices = self._computing_devices()
        return [(rank, clock) for (rank, _), busy in devices if (clock := _lowered_clock(busy)) is not None]

    def capped_clocks(self, highest_mhz: Mapping[tuple[int, int], int]) -> list[tuple[int, LoweredClock]]:
        """Return the same of those that computed far below their highest clock because a limit was set.

        Args:
            highest_mhz: highest clock by rank and NVML's number of the device.
        """
        devices = ((key, busy) for key, busy in self._computing_devices() if key in highest_mhz)
        return [
            (key[0], clock) for key, busy in devices if (clock := _capped_clock(busy, highest_mhz[key])) is not None
        ]

    def _computing_devices(self) -> Iterator[tuple[tuple[int, int], NDArray[np.void]]]:
        """Yield the samples in which a device computed, where there are enough, by rank and number of the device."""
        for (table, rank), kept in self._kept.items():
            for index, rows in rows_by(kept.rows, "index") if table == GPU.name else ():
                busy = rows[(rows["utilization_pct"] >= _BUSY_PCT) & (rows["throttle_reasons"] >= 0)]
                if len(busy) >= MIN_SAMPLES:
                    yield (rank, index), busy

    def _spans(self, first: int = 1, last: int = _ALL, ranks: Collection[int] = ()) -> dict[int, tuple[int, int]]:
        """Return the times of the samples within a range of steps, by rank: of some, or of all that have any."""
        some = ranks or range(MAX_RANKS)
        return {rank: span for rank in some if (span := self._span(rank, first, last)) is not None}

    def _span(self, rank: int, first: int, last: int) -> tuple[int, int] | None:
        """Return the times of the samples of a rank that are within a range of steps."""
        kept = self._kept.get((PROCESS.name, rank))
        if kept is None:
            return None

        times = kept.rows["t_ns"][(kept.rows["step"] >= max(first, 0)) & (kept.rows["step"] < last)]
        return (int(times[0]), int(times[-1])) if len(times) > 1 and times[-1] - times[0] >= _MIN_PASSED_NS else None

    def _rows(
        self, table: Table, spans: Mapping[int, tuple[int, int]], least: int = 2
    ) -> Iterator[tuple[int, NDArray[np.void]]]:
        """Yield each rank and its rows of a table within its span; at least this many."""
        for rank, (first, last) in spans.items():
            kept = self._kept.get((table.name, rank))
            if kept is not None:
                rows = kept.rows[(kept.rows["t_ns"] >= first) & (kept.rows["t_ns"] <= last)]
                if len(rows) >= least:
                    yield rank, rows

    def _while_training(self, rank: int, rows: NDArray[np.void]) -> NDArray[np.void]:
        """Return the samples of devices before which steps continued at half of their usual pace at least.

        The others are of evaluation, of saving, or of what else the script does between steps.
        """
        known = self._kept[PROCESS.name, rank].rows
        known = known[known["step"] >= 0]
        times = rows["t_ns"].astype(np.float64)
        done = np.interp(times, known["t_ns"], known["step"])
        began = np.interp(times - _PACE_NS, known["t_ns"], known["step"])
        pace = done - began
        return rows[pace >= 0.5 * np.median(pace[pace > 0])] if (pace > 0).any() else rows[:0]

    def _devices(self, spans: dict[int, tuple[int, int]]) -> dict[str, float | bool | None]:
        rows = [self._while_training(rank, each) for rank, each in self._rows(GPU, spans)]
        joined = join_rows(rows) if rows else np.empty(0, GPU.dtype)
        if not len(joined):
            return {}

        return {
            "clock_mhz": float(np.median(joined["sm_clock_mhz"])),
            "temperature_c": float(np.median(joined["temperature_c"])),
            "utilization": float(joined["utilization_pct"].mean()) / 100,
            # Bit 0 is an idle device, bit 1 a clock that was set, bit 2 the power limit: all are usual.
            "throttled": bool((joined["throttle_reasons"] & ~7 != 0).mean() > 0.5),
            "power_w": float(np.median(joined["power_w"])),
        }


class ThinnedRows:
    """Rows of which every n-th is kept, so that they stay few and evenly spread."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.void]] = []
        self._every, self._seen = 1, 0

    def add(self, rows: NDArray[np.void]) -> None:
        """Take rows, in order."""
        first = -self._seen % self._every
        self._seen += len(rows)
        if len(rows) > first:
            self._parts.append(rows[first :: self._every].copy())

        while sum(map(len, self._parts)) > _MAX_ROWS:
            self._parts = [self.rows[::2]]
            self._every *= 2

    @property
    def rows(self) -> NDArray[np.void]:
        """All kept rows, in order."""
        if len(self._parts) > 1:
            self._parts = [join_rows(self._parts)]

        return self._parts[0]


def _rate(rows: NDArray[np.void], column: str, unit: float = 1.0) -> float | None:
    """Return how much of a counter came per second; None where no time passed."""
    passed = int(rows["t_ns"][-1] - rows["t_ns"][0])
    return float(rows[column][-1] - rows[column][0]) / passed * 1e9 / unit if passed > 0 else None


def _median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are known; None without any."""
    known = [each for each in values if each is not None]
    return float(np.median(known)) if known else None


def _lowered_clock(busy: NDArray[np.void]) -> LoweredClock | None:
    """Return the lowered clock of one device; None if it was not lowered for long."""
    bits = np.bitwise_or.reduce(np.array(list(REASONS), np.int64))
    is_low = (busy["throttle_reasons"] & bits) != 0
    if is_low.mean() < MIN_SHARE:
        return None

    low, usual = busy[is_low], busy[~is_low]
    counts = Counter({bit: int(((low["throttle_reasons"] & bit) != 0).sum()) for bit in REASONS})
    # The hardware's reason says more than the limit that the driver reports with it.
    bit = max(REASONS, key=lambda each: (counts[each] >= len(low) / 2 and each != _POWER_LIMIT, counts[each]))
    usual_mhz = float(np.median(usual["sm_clock_mhz"])) if len(usual) else None
    found = _low_clock(busy, is_low, REASONS[bit], usual_mhz)
    return None if bit == _POWER_LIMIT and found.lost < MIN_DROP else found


def _capped_clock(busy: NDArray[np.void], highest_mhz: int) -> LoweredClock | None:
    """Return the clock of a device that a set limit keeps far below its highest one; None if none does."""
    is_set = (busy["throttle_reasons"] & _SET_LIMIT) != 0
    if is_set.mean() < MIN_SHARE:
        return None

    found = _low_clock(busy, is_set, SET_LIMIT, float(highest_mhz))
    return found if found.lost >= _MIN_CAP else None


def _low_clock(busy: NDArray[np.void], is_low: NDArray[np.bool_], reason: str, usual_mhz: float | None) -> LoweredClock:
    low = busy[is_low]
    return LoweredClock(
        index=int(low["index"][0]),
        reason=reason,
        share=float(is_low.mean()),
        clock_mhz=float(np.median(low["sm_clock_mhz"])),
        usual_mhz=usual_mhz,
        temperature_c=float(low["temperature_c"].max()),
        power_w=float(low["power_w"].mean()),
    )
